"""Running totals of one engine: plain counts and arrays, read by the exporters.

Shapes: F features of the catalog, phases (0 prompt, 1 generation).
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from steerscope.catalog.model import Signal
from steerscope.steering.interventions import Intervention, Op, Phase
from steerscope.telemetry.columns import BoolArray, Columns, Edits
from steerscope.telemetry.frames import Frame
from steerscope.telemetry.histograms import HistogramArray
from steerscope.telemetry.marks import Mark
from steerscope.telemetry.requests import BlockNews, Share, Step
from steerscope.telemetry.tracks import RequestTrack, Unobserved
from steerscope.telemetry.windows import DriftWindow

PHASES = (Phase.PROMPT, Phase.GENERATION)
OPS = tuple(Op)


class Outcome(enum.StrEnum):
    """What became of a request that asked for steering."""

    ADMITTED = "admitted"
    REJECTED = "rejected"
    APPLIED = "applied"
    OVERRULED = "overruled"
    """A rule beat what the request asked for, this policy; another one may count as admitted."""


class CanaryOutcome(enum.StrEnum):
    """What became of a synthetic request of ours."""

    PASSED = "passed"
    UNEXPECTED = "unexpected"
    """A signal's label was another one than the check expects."""
    UNSCORED = "unscored"
    """It was seen, and a signal has no score."""
    UNREPORTED = "unreported"
    """It was answered, and nothing of it was seen."""
    FAILED = "failed"
    """The server refused it, or did not answer in time."""


class FrameLoss(enum.StrEnum):
    """Why a frame's contents never counted."""

    NOT_SENT = "not_sent"
    LOST = "lost"
    """Sent, but never counted: it died with an earlier hub."""
    SHED = "shed"
    """Waited for the hub too long, which took what it told of requests and nothing else."""
    MALFORMED = "malformed"
    CATALOG_MISMATCH = "catalog_mismatch"
    TOO_MANY_ENGINES = "too_many_engines"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bucket bounds, as ``export.instruments`` gives them."""

    activation: tuple[float, ...]
    score: tuple[float, ...]
    dose: tuple[float, ...]
    lag: tuple[float, ...]
    overhead: tuple[float, ...]


@dataclass(slots=True)
class CanaryTotals:
    """What came of one check of the canary."""

    runs: Counter[CanaryOutcome] = field(default_factory=Counter)
    last_success: float = 0.0
    """When it passed last, in seconds since 1970; 0 for never."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of the newest run that has any, by signal."""


@dataclass(slots=True)
class HubTotals:
    """What comes from no engine: front ends, and frames that cannot be told apart."""

    frames_lost: Counter[FrameLoss] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    propagation_timeouts: int = 0
    restarts: int = 0
    """How many times the hub of this launch was started again."""
    undelivered: Counter[str] = field(default_factory=Counter)
    """What no OTLP collector took, by ``export.otlp_sender.Telemetry``; empty without one."""
    canaries: dict[str, CanaryTotals] = field(default_factory=dict)
    """By the check's name; empty without a canary."""


class EngineTotals:
    """Everything counted for one engine since the hub first heard of it.

    What the canary asks is in none of the features' and signals' numbers, only in those of
    tokens and frames.
    """

    def __init__(
        self, columns: Columns, signals: Sequence[Signal], bounds: Bounds, drift: DriftWindow
    ) -> None:
        num_features = len(columns.features)
        self.columns = columns
        self.signals = tuple(signals)
        self.activation = HistogramArray(bounds.activation, 2 * num_features)
        """Series of feature c in phase p is ``2 * c + p``."""
        self.active = np.zeros((num_features, 2), np.int64)
        self.drift = drift
        self.steered = np.zeros((num_features, len(OPS)), np.int64)
        self.observed = np.zeros(2, np.int64)
        self.cached = 0
        """Of ``observed``, how many were kept from an earlier request, whose KV was reused."""
        self.unobserved: Counter[Unobserved] = Counter()
        self.score = HistogramArray(bounds.score, len(signals))
        self.labels: Counter[tuple[str, str]] = Counter()
        self.dose = HistogramArray(bounds.dose, 1)
        self.lag = HistogramArray(bounds.lag, 1)
        self.overhead = HistogramArray(bounds.overhead, 1)
        self.frames = 0
        self.last_seen_ns = 0
        """When the newest frame that counted came, on the clock of ``receive``."""
        self.frames_lost: Counter[FrameLoss] = Counter()
        self.applied: Counter[str] = Counter()
        self._reported_lost_tokens = 0
        self._missed_tokens = 0
        self._shed_tokens = 0

    def receive(self, frame: Frame, now_ns: int, since: Mark) -> None:
        """Count the frame itself: its delay, its cost, and what its worker lost since the mark."""
        self.frames += 1
        self.last_seen_ns = now_ns
        self.lag.observe_one(0, max(now_ns - frame.monotonic_ns, 0) * 1e-9)
        for overhead_ns in frame.overhead_ns:
            self.overhead.observe_one(0, overhead_ns * 1e-9)
        if frame.dropped < since.dropped:
            since = since._replace(dropped=0, dropped_tokens=0)
        self.frames_lost[FrameLoss.NOT_SENT] += frame.dropped - since.dropped
        lost = frame.step - frame.dropped - since.num_frames
        self.frames_lost[FrameLoss.LOST] += max(lost, 0)
        self._reported_lost_tokens += max(frame.dropped_tokens - since.dropped_tokens, 0)
        self._reported_lost_tokens += max(frame.told_tokens - since.num_tokens, 0)
        self._settle_lost_tokens()

    def refuse(self, frame: Frame, reason: FrameLoss) -> None:
        """Count a frame whose contents cannot be used."""
        self.frames_lost[reason] += 1
        self.unobserved[Unobserved.CATALOG_MISMATCH] += frame.query_start_loc[-1]

    def add(self, step: Step, now_ns: int) -> None:
        """Count what the step brought."""
        for reason, count in step.unobserved.items():
            if reason is Unobserved.DROPPED_FRAME:
                self._missed_tokens += count
            else:
                self.unobserved[reason] += count
        self._shed_tokens += step.num_shed
        self._settle_lost_tokens()
        for news in step.blocks:
            self._add_acts(news, now_ns * 1e-9)
            if news.block.edits is not None:
                self._add_edits(news, news.block.edits)
        for track in step.finished:
            self.add_scores(track)

    def add_scores(self, track: RequestTrack) -> None:
        """Count a finished sequence's signals."""
        if track.is_canary:
            return
        for series, score in enumerate(track.scores):
            self.labels[score.signal, score.label] += 1
            if score.score is not None:
                self.score.observe_one(series, score.score)

    def _settle_lost_tokens(self) -> None:
        """A lost token may be both missed here and reported by its worker: count it once.

        One that was shed is neither: it came, and its sequence knows that it was computed.
        """
        lost = max(self._missed_tokens, self._reported_lost_tokens) + self._shed_tokens
        self.unobserved[Unobserved.DROPPED_FRAME] = lost

    def _add_acts(self, news: BlockNews, now: float) -> None:
        generated_T, columns = news.generated_T, news.block.columns
        completed = np.bincount(generated_T[news.completed_T], minlength=2)
        self.observed += completed
        self.cached += int(completed.sum()) * news.cached
        asked_T = _without(news.fresh_T, [s for s in news.shares if s.track.is_canary])
        steered = [share for share in news.shares if share.track.interventions]
        for phase, in_phase_T in enumerate((~generated_T, generated_T)):
            asked_in_phase_T = asked_T & in_phase_T
            acts_nF = news.block.rows(asked_in_phase_T)
            if not len(acts_nF):
                continue
            series = slice(2 * columns.start + phase, 2 * columns.stop, 2)
            self.activation.observe_columns(series, acts_nF)
            self.active[columns, phase] += (acts_nF > 0.0).sum(axis=0)
            if steered:
                acts_nF = news.block.rows(_without(asked_in_phase_T, steered))
            self.drift.add(phase, columns, acts_nF, now)

    def _add_edits(self, news: BlockNews, edits: Edits) -> None:
        changed_TF = (edits.deltas_TF != 0.0) & news.fresh_T[:, None]
        if not changed_TF.any():
            return
        doses = edits.doses_TS[news.fresh_T]
        doses = doses[doses > 0.0]
        self.dose.observe(np.zeros(len(doses), np.intp), doses)
        for share in news.shares:
            self._add_share(news.block.columns, changed_TF[share.first : share.last], share)

    def _add_share(self, columns: slice, changed_nF: BoolArray, share: Share) -> None:
        if not changed_nF.any():
            return
        for intervention in share.track.interventions:
            column = self.columns.index.get(intervention.feature, -1)
            if columns.start <= column < columns.stop:
                covered = _covered(intervention, share, len(changed_nF))
                changed = changed_nF[:, column - columns.start] & covered
                self.steered[column, OPS.index(intervention.op)] += int(changed.sum())


def _without(of_T: BoolArray, left_out: Sequence[Share]) -> BoolArray:
    """Those tokens, less the ones of some sequences (bool [T])."""
    if not left_out:
        return of_T
    rest_T = of_T.copy()
    for share in left_out:
        rest_T[share.first : share.last] = False
    return rest_T


def _covered(intervention: Intervention, share: Share, num_tokens: int) -> BoolArray:
    """Which of the share's tokens the intervention's phase and span cover."""
    positions = np.arange(share.position, share.position + num_tokens)
    covered: BoolArray = np.ones(num_tokens, np.bool_)
    if intervention.phase is not Phase.ALL:
        generated = positions >= share.track.start.num_prompt_tokens
        covered = generated == (intervention.phase is Phase.GENERATION)
    if intervention.span is not None:
        start, stop = intervention.span
        covered = covered & (positions >= start) & (positions < stop)
    return covered
