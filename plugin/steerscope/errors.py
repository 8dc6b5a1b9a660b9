"""Every error Steerscope raises on purpose.

    SteerscopeError
    ├── ConfigError              a setting is missing, malformed or contradictory
    ├── CatalogError             a catalog cannot be read or is not well formed
    │   └── ModelMismatchError   a catalog was made for another model
    ├── SpecError                a steering request is refused; names the field
    │   ├── UnknownFeatureError
    │   └── UnknownPolicyError
    ├── UnsupportedEngineError   vLLM runs in a mode we cannot serve exactly
    ├── HubError                 the hub could not be started or reached
    └── LabError                 an experiment cannot be run as asked
        └── CaseError            a file of cases is malformed, or does not fit the question

``SpecError`` is also a ``ValueError``, for those who call us without vLLM; at the seam it becomes
vLLM's own validation error, which is HTTP 400.
"""

from __future__ import annotations


class SteerscopeError(Exception):
    """Root of the tree above."""


class ConfigError(SteerscopeError):
    """A setting is missing, malformed or contradictory."""


class CatalogError(SteerscopeError):
    """A catalog cannot be read or is not well formed."""


class ModelMismatchError(CatalogError):
    """A catalog was made for another model than the one being served."""


class SpecError(SteerscopeError, ValueError):
    """A steering request is refused.

    Attributes:
        field: path of the offending field, e.g. ``interventions[0].clamp``.
        reason: what is wrong with it, as a sentence fragment.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def under(self, prefix: str) -> SpecError:
        """The same error with ``prefix`` put before its field path."""
        sep = "" if self.field.startswith("[") or not self.field else "."
        return type(self)(f"{prefix}{sep}{self.field}", self.reason)


class UnknownFeatureError(SpecError):
    """The spec names a feature that the catalog does not hold."""


class UnknownPolicyError(SpecError):
    """The request names a policy that does not exist."""


class UnsupportedEngineError(SteerscopeError):
    """vLLM runs in a mode that Steerscope cannot serve exactly; names the flag."""


class HubError(SteerscopeError):
    """The hub could not be started or reached."""


class LabError(SteerscopeError):
    """An experiment cannot be run as asked."""


class CaseError(LabError):
    """A file of cases is malformed, or does not fit the question."""
