"""The front end's half: admission wired to the hub's policies. One per vLLM front end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerscope.catalog.store import Catalog
from steerscope.config import Settings
from steerscope.errors import SpecError
from steerscope.hub.link import FrontendLink
from steerscope.steering.admission import STEERING_KEY, UNKNOWN, Admission, Asked
from steerscope.steering.stamp import encode


class FrontEnd:
    """Admits requests, and tells the hub which were steered and which refused."""

    def __init__(
        self, catalog: Catalog, settings: Settings, link: FrontendLink, refused: str = ""
    ) -> None:
        self._link = link
        self._admission = Admission(catalog, settings.steering, lambda: link.policies, refused)

    def resolve(self, external_id: str, extra_args: Mapping[str, Any] | None) -> Asked | None:
        """The steering asked for, or None. A refusal is counted, then raised."""
        try:
            return self._admission.resolve(extra_args)
        except SpecError as error:
            self.rejected(external_id, (extra_args or {}).get(STEERING_KEY), error)
            raise

    def stamp(self, external_id: str, asked: Asked | None, num_prompt_tokens: int) -> bytes:
        """The bytes that travel with the request. A refusal is counted, then raised."""
        try:
            made = self._admission.stamp(external_id, asked, num_prompt_tokens)
        except SpecError as error:
            self.rejected(external_id, asked.policy if asked else None, error)
            raise
        if asked is not None:
            self._link.admitted(external_id, made.policy, made.digest)
        return encode(made)

    def rejected(self, external_id: str, flag: object, error: SpecError) -> None:
        """Count a refusal under the policy's name if there is such a policy."""
        policy = flag if isinstance(flag, str) and flag in self._link.policies else UNKNOWN
        self._link.rejected(external_id, policy, error.field, error.reason)
