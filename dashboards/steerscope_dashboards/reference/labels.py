"""Which values each label of a metric can take: from the enums that the exporter counts by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from steerscope.catalog.model import ModelMatch
from steerscope.export import instruments as names
from steerscope.export.instruments import Instrument
from steerscope.export.otlp_sender import Telemetry
from steerscope.export.prometheus import (
    ENGINE_LOSSES,
    FRONT_END_OUTCOMES,
    HUB_LOSSES,
    OVERRIDES,
    UNOBSERVED_REASONS,
)
from steerscope.steering.admission import INLINE, UNKNOWN
from steerscope.steering.interventions import Op
from steerscope.telemetry.reductions import Missing
from steerscope.telemetry.totals import PHASES, CanaryOutcome, Outcome


def _listed(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


_FEATURES: Final = "the catalog's features"
_SIGNALS: Final = "the catalog's signals"
_WITH_BASELINE: Final = "features for which the catalog has a baseline in that phase"
_CHECKS: Final = "the names under `canary.checks`"
_ENGINELESS: Final = ", which have no `model_name` and no `engine`"

_ANYWHERE: Final = {
    "model_name": "the model as vLLM serves it",
    "engine": "vLLM's engine, `0` unless data parallel",
    "signal": _SIGNALS,
    "feature": _FEATURES,
    "phase": _listed(PHASES),
    "canary": _CHECKS,
    "op": _listed(Op),
    "policy": f"policies in force, `{INLINE}` (edits given in the request), `{UNKNOWN}` (a name "
    "that is not in force, now or any more)",
    "mode": _listed(OVERRIDES),
    "label": f"the labels of the signal's bands, {_listed(Missing)}",
    "version": "the plugin's",
    "catalog": "its name",
    "catalog_version": "its version",
    "catalog_digest": "its digest",
    "model_match": _listed(ModelMatch),
}

_HERE: Final = {
    (names.UNOBSERVED_TOKENS, "reason"): _listed(UNOBSERVED_REASONS),
    (
        names.FRAMES_DROPPED,
        "reason",
    ): f"{_listed(ENGINE_LOSSES)}; {_listed(HUB_LOSSES)}{_ENGINELESS}",
    (names.STEERING_REQUESTS, "outcome"): f"`{Outcome.APPLIED}`; {_listed(FRONT_END_OUTCOMES)}"
    f"{_ENGINELESS}",
    (names.CANARY_RUNS, "outcome"): _listed(CanaryOutcome),
    (names.OTEL_DROPPED, "signal"): _listed(sorted(Telemetry)),
    (
        names.STEERED_TOKENS,
        "feature",
    ): "the catalog's features that can be written, in the ways (`op`) that a "
    "policy edits them or a request did",
    (names.FEATURE_DRIFT_PSI, "feature"): _WITH_BASELINE,
    (names.FEATURE_DRIFT_KS, "feature"): _WITH_BASELINE,
    (names.FEATURE_DRIFT_TOKENS, "feature"): _WITH_BASELINE,
}


def values(instrument: Instrument, label: str) -> str:
    """What the label of that metric can be, as Markdown."""
    return _HERE.get((instrument, label)) or _ANYWHERE[label]
