"""What was seen of one sequence: every position at most once, the newest value kept.

Shapes: N positions, n tokens just added, F features of the catalog, C of them that a signal
reads, S sites. Positions beyond the limit (where room ran out, if that came first) are observed and
reduced like all others: of their values only those that signals read are kept, and only until the
sequence ends.

Nearly all tokens come one by one, new and of every site at once. Of these a track only keeps
the row, and files ``MAX_UNFILED`` of them together, or whatever there is when it is asked.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from steerscope.steering.interventions import Intervention
from steerscope.telemetry.columns import Block, BoolArray, Columns, FloatArray, grown
from steerscope.telemetry.frames import (
    MAX_POSITION,
    RequestStart,
    SteeringChange,
    without_cached,
)
from steerscope.telemetry.room import Holding
from steerscope.telemetry.steered import SteeredTokens

BYTES_PER_TRACK = 4096
"""Of a track beside its values: measured."""

MAX_UNFILED = 32
"""More save little, and each keeps alive its row of every sequence of its step."""


class Unobserved(enum.StrEnum):
    """Why there is no activation for a token."""

    PREFIX_CACHE = "prefix_cache"
    EXTERNAL_KV = "external_kv"
    DROPPED_FRAME = "dropped_frame"
    UNKNOWN_REQUEST = "unknown_request"
    CATALOG_MISMATCH = "catalog_mismatch"
    NOT_FINITE = "not_finite"
    OVER_LIMIT = "over_limit"
    """Observed but not kept in the report; never in the metric."""


@dataclass(frozen=True, slots=True)
class Score:
    """A signal's outcome; without a ``score``, the label says why (``reductions.Missing``)."""

    signal: str
    score: float | None
    label: str


class EngineKey(NamedTuple):
    """Which engine of which model: the labels that vLLM's own metrics have."""

    model_name: str
    engine: str


@dataclass(frozen=True, slots=True)
class Added:
    """Which of the tokens just added are news (bool [n])."""

    fresh: BoolArray
    """Seen for the first time at this block's sites."""
    completed: BoolArray
    """Now seen at every site, and not so before."""


@dataclass(slots=True)
class Pass:
    """Tokens that came one after the other at some sites, from ``first`` to before ``stop``.

    Only the newest pass of its sites grows. A sequence that was preempted is computed again
    from an earlier token on, which is a pass of its own.
    """

    sites: slice
    first: int
    stop: int


class RequestTrack:
    """One sequence of one engine.

    ``end`` is one past the last position known to have been computed; ``tail_lost`` says
    that frames were dropped after it, so that there may have been more. ``serial`` tells the
    tracks of one ledger apart, for good. ``take`` grants bytes for values, or not.
    """

    def __init__(
        self,
        start: RequestStart,
        key: EngineKey,
        columns: Columns,
        limit: int,
        now: float,
        take: Callable[[int], bool],
    ) -> None:
        self.start = without_cached(start)  # its values are filed like all others
        self.key = key
        self.columns = columns
        self.end = start.first_position if start.resumed_at is None else start.resumed_at
        self.num_prompt_tokens = start.num_prompt_tokens
        self.updated_at = now
        self.finished = False
        self.is_canary = False
        """Whether it is a synthetic request of ours, which no user asked."""
        self.tail_lost = False
        self.serial = 0
        self.dropped_at: dict[int, int] = {}
        """By rank: how many frames it had dropped when its newest one with a token was sent."""
        self.ended_at: set[int] = set()
        """Ranks that told the end."""
        self.scores: tuple[Score, ...] = ()
        self.policy, self.digest, self.changed_at = start.policy, start.digest, 0
        self.source, self.rule, self.asked = start.source, start.rule, start.asked
        self.holding = Holding(take)
        """Of the ledger's room."""
        self.steered = SteeredTokens(len(columns.features), limit, self.holding.take)
        self.interventions = _interventions(start.interventions)
        self._limit = limit
        self._passes: list[Pass] = []
        self._unfiled: dict[int, FloatArray] = {}
        """The newest positions that were seen, ascending: a row [F] of each."""
        self._not_finite: set[int] = set()
        self._acts_NF: FloatArray = np.zeros((0, len(columns.features)), np.float32)
        self._beyond_NC: FloatArray = np.zeros((0, len(columns.read_by_signals)), np.float32)
        self._seen_NS: BoolArray = np.zeros((0, len(columns.site_names)), np.bool_)

    @property
    def passes(self) -> list[Pass]:
        """In which order tokens came."""
        self._file()
        return self._passes

    def append(self, position: int, row_F: FloatArray) -> None:
        """Take one token, at ``end`` or beyond, which is finite, unchanged and of every site.

        The row is kept for a while, and must not be written to.
        """
        self.end = position + 1
        self._unfiled[position] = row_F
        if len(self._unfiled) >= MAX_UNFILED:
            self._file()

    def reach(self, end: int) -> None:
        """Every position before that was computed."""
        self.end = max(self.end, end)

    def give_up(self, position: int, stop: int) -> int:
        """Tokens were computed and will not be seen: how many of them were neither seen nor missed.

        Of those before ``end``, that are the ones of which another rank has told its part.
        """
        num_lost = max(stop - max(position, self.end), 0)
        if position < self.end:
            self._file()
            seen_nS = self._seen_NS[position : min(stop, self.end)]
            num_lost += int((seen_nS.any(axis=1) & ~seen_nS.all(axis=1)).sum())
        self.reach(stop)
        return num_lost

    def add(self, block: Block, first: int, last: int, position: int) -> Added:
        """Take the block's rows ``first`` to ``last``, whose first one is at ``position``."""
        self._file()
        stop = position + last - first
        self._make_room(stop)
        self.end = max(self.end, stop)
        self._note_pass(block.sites, position, stop)
        seen_nS = self._seen_NS[position:stop]
        fresh = ~seen_nS[:, block.sites.start]
        missing = ~seen_nS.all(axis=1)
        seen_nS[:, block.sites] = True
        if block.finite_T is not None or self._not_finite:
            fresh &= self._mark_finite(block, first, last, position)
        self._keep(block.columns, block.acts_TF[first:last], position)
        if block.edits is not None and block.edits.deltas_TF[first:last].any():
            deltas, doses = block.edits.deltas_TF[first:last], block.edits.doses_TS[first:last]
            self.steered.add(block.columns, deltas, doses, position, fresh)
        completed = missing & np.logical_and.reduce(seen_nS, axis=1)
        return Added(fresh, completed)

    def values(self, feature: str, start: int, stop: int) -> FloatArray | None:
        """The feature at positions ``start`` to ``stop``; None unless all are known.

        Beyond the limit, a feature is known if a signal reads it, until the sequence ends.
        """
        self._file()
        column = self.columns.index[feature]
        seen = self._seen_NS[start:stop, self.columns.site_of[column]]
        if len(seen) < stop - start or not np.logical_and.reduce(seen):
            return None
        kept = self._acts_NF[start : min(stop, self._limit), column]
        if stop <= self._limit:
            return kept
        place = self.columns.place_of.get(column)
        if self.finished or place is None:
            return None
        first, last = max(start - self._limit, 0), stop - self._limit
        return np.concatenate([kept, self._beyond_NC[first:last, place]])

    def unobserved(self) -> dict[Unobserved, int]:
        """How many positions before ``end`` are missing, by reason; only those that are."""
        seen = self._seen_everywhere()
        cached = min(self.start.first_position, self.end)
        holes = int((~seen[cached:]).sum()) - len(self._not_finite)
        reused = int((~seen[:cached]).sum())
        external = min(self.start.num_external, reused)
        counts = {
            Unobserved.PREFIX_CACHE: reused - external,
            Unobserved.EXTERNAL_KV: external,
            Unobserved.DROPPED_FRAME: max(holes, 0),
            Unobserved.OVER_LIMIT: int(seen[self._limit :].sum()),
            Unobserved.NOT_FINITE: len(self._not_finite),
        }
        return {reason: count for reason, count in counts.items() if count}

    def change(self, change: SteeringChange) -> None:
        """Steering changed in flight; the receipt keeps what held before, too."""
        self.policy, self.digest, self.changed_at = change.policy, change.digest, change.position
        self.source, self.rule, self.asked = change.source, "", change.asked
        self.interventions = (*self.interventions, *_interventions(change.interventions))

    @property
    def num_cached(self) -> int:
        """Positions seen at every site that this sequence did not compute itself."""
        return int(self._seen_everywhere()[: self.start.first_position].sum())

    @property
    def num_observed(self) -> int:
        """Positions seen at every site, those over the limit included."""
        return int(self._seen_everywhere().sum())

    @property
    def is_complete(self) -> bool:
        """Every token so far was observed and kept, and none can have followed unseen."""
        is_whole = self.start.resumed_at is None and not self.tail_lost
        return self.end > 0 and is_whole and not self.unobserved()

    def spans(self, site: int, start: int = 0, stop: int = MAX_POSITION) -> list[tuple[int, int]]:
        """Adjacent positions that were seen at the site and are kept: from one to before other."""
        self._file()
        kept = min(self.end, len(self._acts_NF), self._limit, stop)
        seen = np.zeros(max(kept - start, 0) + 2, np.int8)
        seen[1:-1] = self._seen_NS[start:kept, site]
        edges = (start + np.flatnonzero(np.diff(seen))).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def runs(self, feature: str) -> list[tuple[int, FloatArray, FloatArray | None]]:
        """Adjacent kept positions as (first position, activations, deltas if any was changed)."""
        column = self.columns.index[feature]
        return [
            (first, self._acts_NF[first:last, column], self.steered.deltas(first, last, column))
            for first, last in self.spans(self.columns.site_of[column])
        ]

    def activations(self) -> FloatArray:
        """Every kept position's activations [N, F]; what was never seen is zero."""
        self._file()
        return self._acts_NF[: min(self.end, self._limit)]

    @property
    def num_bytes(self) -> int:
        """What a track that ended takes, near enough."""
        values = self._acts_NF.nbytes + self._seen_NS.nbytes
        return BYTES_PER_TRACK + values + self.steered.num_bytes

    def finish(self, scores: tuple[Score, ...], now: float) -> None:
        """No more tokens follow: keep the scores, give back spare memory."""
        self._file()
        self.finished, self.scores, self.updated_at = True, scores, now
        self._acts_NF = self._acts_NF[: min(self.end, self._limit)].copy()
        self._beyond_NC = self._beyond_NC[:0].copy()
        self._seen_NS = self._seen_NS[: self.end].copy()

    def _file(self) -> None:
        """Put what was appended where everything is."""
        if not self._unfiled:
            return
        positions = np.fromiter(self._unfiled, np.intp)
        acts_nF = np.concatenate(list(self._unfiled.values())).reshape(len(positions), -1)
        self._unfiled.clear()
        first, stop = int(positions[0]), int(positions[-1]) + 1
        self._make_room(stop)
        self._note_pass(slice(0, self._seen_NS.shape[1]), first, stop)
        self._seen_NS[positions] = True
        gaps = np.flatnonzero(np.diff(positions) > 1) + 1
        for start, end in pairwise((0, *gaps.tolist(), len(positions))):
            self._keep(slice(0, acts_nF.shape[1]), acts_nF[start:end], int(positions[start]))

    def _make_room(self, stop: int) -> None:
        self._seen_NS = grown(self._seen_NS, stop)
        wanted = min(stop, self._limit)
        self._acts_NF = grown(self._acts_NF, wanted, self.holding.take)
        if wanted > len(self._acts_NF):  # there is no room: from here on values are not kept
            self._limit = len(self._acts_NF)

    def _note_pass(self, sites: slice, position: int, stop: int) -> None:
        for newest in reversed(self._passes):
            if newest.sites == sites:
                if newest.stop > position:
                    break
                newest.stop = stop
                return
        if position < stop:
            self._passes.append(Pass(sites, position, stop))

    def _mark_finite(self, block: Block, first: int, last: int, position: int) -> BoolArray:
        finite = np.ones(last - first, np.bool_)
        if block.finite_T is not None:
            finite = block.finite_T[first:last]
        self._not_finite.difference_update((position + np.flatnonzero(finite)).tolist())
        bad = position + np.flatnonzero(~finite)
        self._not_finite.update(bad.tolist())
        self._seen_NS[bad, block.sites] = False
        return finite

    def _keep(self, columns: slice, acts_nF: FloatArray, position: int) -> None:
        kept = min(max(self._limit - position, 0), len(acts_nF))
        self._acts_NF[position : position + kept, columns] = acts_nF[:kept]
        if kept < len(acts_nF) and self.columns.read_by_signals:
            self._keep_beyond(columns, acts_nF[kept:], position + kept - self._limit)

    def _keep_beyond(self, columns: slice, acts_nF: FloatArray, row: int) -> None:
        places, inside = self.columns.signal_columns(columns)
        stop = row + len(acts_nF)
        self._beyond_NC = grown(self._beyond_NC, stop)
        self._beyond_NC[row:stop, places] = acts_nF[:, inside]

    def _seen_everywhere(self) -> BoolArray:
        self._file()
        seen: BoolArray = np.zeros(self.end, np.bool_)
        known_NS = self._seen_NS[: self.end]
        seen[: len(known_NS)] = True
        for site in range(known_NS.shape[1]):  # reducing short rows takes numpy 20 times as long
            seen[: len(known_NS)] &= known_NS[:, site]
        return seen


def _interventions(canonical_json: bytes) -> tuple[Intervention, ...]:
    if not canonical_json:
        return ()
    try:
        return msgspec.json.decode(canonical_json, type=tuple[Intervention, ...])
    except msgspec.MsgspecError:
        return ()
