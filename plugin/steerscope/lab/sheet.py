"""The sheet: every case's answer, labels, signals and baselines, ready to be judged.

Scores are those that serving computes, from the same code and the same observed activations.
Shape: N cases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from steerscope.catalog.model import Signal, Target
from steerscope.catalog.store import Catalog
from steerscope.lab import judging
from steerscope.lab.bench import Answer, Bench
from steerscope.lab.cases import Case, Message
from steerscope.lab.judging import Judge, Outcome
from steerscope.telemetry.signals import weighted_sum
from steerscope.telemetry.tracks import RequestTrack

Floats = npt.NDArray[np.float64]

SIGNS_OF_DOUBT = frozenset({"wrong", "declined", "malformed"})
"""Labels that a lack of confidence predicts; all others are predicted by confidence."""

_NUMBER = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d+)?(?!\d)")


@dataclass(frozen=True, slots=True)
class Row:
    """One case."""

    case: Case
    text: str
    outcome: Outcome
    labels: dict[str, bool]
    z: dict[str, float]
    """By signal, before the calibrated map; NaN where the signal has no score."""
    probability: dict[str, float]
    baselines: dict[str, float]
    """Confidences: higher means surer."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The cases that a target applies to, as arrays [N]."""

    rows: Sequence[Row]
    labels: npt.NDArray[np.bool_]
    names: npt.NDArray[np.str_]

    def z(self, signal: str) -> Floats:
        """Weighted sums."""
        return np.array([row.z[signal] for row in self.rows], np.float64)

    def probability(self, signal: str) -> Floats:
        """Calibrated probabilities."""
        return np.array([row.probability[signal] for row in self.rows], np.float64)

    def baseline(self, name: str, target: Target) -> Floats:
        """A baseline, turned so that higher means that the target's label holds."""
        values = np.array([row.baselines[name] for row in self.rows], np.float64)
        return -values if target.label in SIGNS_OF_DOUBT else values


def fill(
    bench: Bench,
    catalog: Catalog,
    cases: Sequence[Case],
    judge: Judge,
    self_report: str = "",
    visit: Callable[[RequestTrack], None] | None = None,
) -> list[Row]:
    """Ask every case unsteered. ``self_report`` is a question about the answer's certainty."""
    rows = []
    for answer in bench.ask(cases):
        rows.append(_row(answer, catalog.signals, judge))
        if visit is not None:
            visit(answer.track)
    if self_report:
        _ask_back(bench, rows, self_report)
    return rows


def applying(rows: Iterable[Row], target: Target) -> Scored:
    """Those that the target says anything about."""
    chosen = [
        row
        for row in rows
        if target.label in row.labels and (target.among is None or row.labels.get(target.among))
    ]
    return Scored(
        chosen,
        np.array([row.labels[target.label] for row in chosen], np.bool_),
        np.array([row.case.name for row in chosen], np.str_),
    )


def _row(answer: Answer, signals: Sequence[Signal], judge: Judge) -> Row:
    outcome = judge.outcome(answer.case, answer.text)
    scores = {score.signal: score.score for score in answer.track.scores}
    sums = {signal.name: weighted_sum(signal, answer.track) for signal in signals}
    return Row(
        case=answer.case,
        text=answer.text,
        outcome=outcome,
        labels=judging.labels(answer.case, outcome),
        z={name: _number(value) for name, value in sums.items()},
        probability={name: _number(value) for name, value in scores.items()},
        baselines={
            "mean_logprob": answer.mean_logprob,
            "min_logprob": float(answer.logprobs.min()) if len(answer.logprobs) else np.nan,
            "first_token_certainty": -answer.first_entropy,
        },
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _ask_back(bench: Bench, rows: Sequence[Row], question: str) -> None:
    """Ask how sure the model is, as the next turn; an answer without a number is no score."""
    again = [_follow_up(row, question) for row in rows]
    for row, answer in zip(rows, bench.ask(again), strict=True):
        row.baselines["self_report"] = certainty(answer.text)


def certainty(said: str) -> float:
    """The first number that can be a percentage's; NaN where there is none, or it is above 100."""
    found = _NUMBER.search(said)
    return float(found[0]) if found and float(found[0]) <= 100 else float("nan")


def _follow_up(row: Row, question: str) -> Case:
    if row.case.prompt is not None:  # the model may have no chat template
        return Case(prompt=f"{row.case.prompt}{row.text}\n{question}\n")
    before = row.case.messages or (Message(role="user", content=row.case.text),)
    turns = (
        *before,
        Message(role="assistant", content=row.text),
        Message(role="user", content=question),
    )
    return Case(messages=turns)


def to_json(rows: Iterable[Row]) -> bytes:
    """One line a case: what was said and scored, for looking closer."""
    return b"".join(
        msgspec.json.encode(
            {
                "text": row.case.text,
                "group": row.case.group,
                "said": row.text,
                "outcome": row.outcome,
                "probability": row.probability,
                "baselines": row.baselines,
            }
        )
        + b"\n"
        for row in rows
    )
