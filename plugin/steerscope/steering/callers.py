"""Who sent an HTTP request, and what rules can match, read from its headers."""

from __future__ import annotations

import datetime
import time

from steerscope.config import Settings
from steerscope.hub.auth.denials import AccessError
from steerscope.hub.auth.directory import Directory, IdentitiesFromFile, Shown
from steerscope.hub.auth.identity import anonymous
from steerscope.security import ANONYMOUS, Identity, Scope, Unauthenticated, anonymous_may
from steerscope.steering.exchange import Headers
from steerscope.steering.rules import Traits


class Callers:
    """Reads headers.

    Args:
        settings: say who is known, and which headers rules may match.
        model: the served model's name.
    """

    def __init__(self, settings: Settings, model: str) -> None:
        security = settings.security
        self._model = model
        self._wanted = frozenset(settings.steering.match_headers)
        self._file = None
        if security.identities_file is not None:
            self._file = IdentitiesFromFile(security, security.identities_file)
        self._reload_seconds = security.reload_seconds
        self._reload_at = time.monotonic() + self._reload_seconds
        self._directory = Directory(security, self._file, anonymous(Unauthenticated.NONE), _now)
        self._nobody = anonymous(anonymous_may(security, settings.addresses.values()))

    def identity(self, headers: Headers) -> Identity | None:
        """Whose token the request bears; None for nobody's."""
        shown = [value for name, value in headers if name.lower() == b"authorization"]
        if len(shown) != 1:
            return None
        self._refresh()
        try:
            found = self._directory.find(Shown("", shown[0].decode("latin-1")))
        except AccessError:
            return None
        return None if found.name == ANONYMOUS else found

    def may_observe(self, headers: Headers) -> bool:
        """Whether who sent these may read what the hub tells those with the scope ``observe``.

        A token that is nobody's shows nobody, and is no offence here: it may be vLLM's own key.
        """
        return Scope.OBSERVE in (self.identity(headers) or self._nobody).granted

    def traits(self, headers: Headers, identity: Identity | None, lora: str) -> Traits:
        """What rules can match. A header that is given twice is none."""
        found: dict[str, str] = {}
        for raw_name, value in headers:
            name = raw_name.decode("latin-1").lower()
            if name in self._wanted:
                found[name] = "" if name in found else value.decode("latin-1")
        return Traits(self._model, lora, identity.name if identity else "", found)

    def _refresh(self) -> None:
        if self._file is not None and time.monotonic() >= self._reload_at:
            self._reload_at = time.monotonic() + self._reload_seconds
            self._file.refresh()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
