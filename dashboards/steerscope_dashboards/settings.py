"""What an operator decides: objectives, thresholds, floors and where pages are. Strict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from steerscope.catalog.model import LabelSlug, Slug
from steerscope.errors import ConfigError
from steerscope.export.instruments import LAG_BOUNDS, SCORE_BOUNDS
from steerscope.steering.interventions import PolicyName

Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Duration = Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]*[smhd]$")]
Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s\"{}]+[^/\s\"{}]$")]
LabelName = Annotated[str, msgspec.Meta(pattern=r"^([a-zA-Z_][a-zA-Z0-9_]*)?$")]


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common decoding rules: immutable, strict, by keyword."""


class Objective(_Document, frozen=True):
    """``share`` of scored sequences have a ``score`` of at most this."""

    signal: Slug
    score: float
    share: Share

    @property
    def budget(self) -> float:
        """The share that may be above."""
        return round(1.0 - self.share, 10)


class Floors(_Document, frozen=True):
    """Traffic within an alert's window below which nothing is judged."""

    sequences: Count
    steered_requests: Count
    tokens: Count
    frames: Count
    drift_tokens: Count


class Settings(_Document, frozen=True):
    """The whole of ``settings.yaml``, where each field is explained."""

    runbooks: Url
    grafana: Url
    replica_label: LabelName
    objective: Objective
    high_label: LabelSlug
    high_share: Share
    high_window: Duration
    high_hold: Duration
    expected_policies: tuple[PolicyName, ...]
    rejected_share: Share
    coverage: Share
    unscored_share: Share
    dropped_share: Share
    lag_seconds: Positive
    lag_share: Share
    hub_cpu: Positive
    silent_seconds: Positive
    drift_psi: Positive
    canary_seconds: Positive
    canary_hold: Duration
    floors: Floors


def load(path: Path) -> Settings:
    """Read and check the file; raise ``ConfigError`` that names file and field."""
    try:
        settings = msgspec.yaml.decode(path.read_bytes(), type=Settings)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}") from None
    _check_bound(path, "objective.score", settings.objective.score, SCORE_BOUNDS)
    _check_bound(path, "lag_seconds", settings.lag_seconds, LAG_BOUNDS)
    return settings


def _check_bound(path: Path, field: str, value: float, bounds: tuple[float, ...]) -> None:
    if value not in bounds:
        raise ConfigError(f"{path}: {field}: {value} is not a bucket bound; these are: {bounds}")
