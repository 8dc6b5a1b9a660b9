"""Why a caller is refused. ``statuses`` makes gRPC statuses of them, ``hub/http.py`` HTTP answers.

None of them may hold a credential.
"""

from __future__ import annotations

from steerscope.errors import SteerscopeError


class AccessError(SteerscopeError):
    """A call is refused.

    Attributes:
        reason: for machines, e.g. ``NO_CREDENTIALS``; the ErrorInfo's reason.
        metadata: what the caller may know of it, by plain name.
    """

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = metadata


class UnauthenticatedError(AccessError):
    """It is not known who calls."""


class DeniedError(AccessError):
    """It is known who calls, and they may not."""


class TimeUpError(AccessError):
    """The call took longer than any may."""


class ExhaustedError(AccessError):
    """They may, but not so much; ``retry_after`` is in seconds, where waiting helps."""

    def __init__(
        self, reason: str, message: str, retry_after: float | None = None, **metadata: str
    ) -> None:
        super().__init__(reason, message, **metadata)
        self.retry_after = retry_after
