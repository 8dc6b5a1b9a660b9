"""The ledger: frames in, one track for each sequence of each engine.

Shapes: T tokens of the frame, R its requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

from steerscope.telemetry.columns import Block, BoolArray, Columns
from steerscope.telemetry.frames import Frame, RequestEnd, RequestStart, without_activations
from steerscope.telemetry.room import Room
from steerscope.telemetry.tracks import EngineKey, RequestTrack, Score, Unobserved

TrackKey = tuple[EngineKey, str]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the ledger may hold. ``max_tracks`` evicts the oldest, finished ones first.

    ``max_bytes`` evicts the oldest finished ones, but the newest stays; where that is not enough,
    those that run keep no more values than they have.
    """

    max_tracks: int
    ttl_seconds: float
    max_tokens_per_track: int
    max_bytes: int = 1 << 62


class Share(NamedTuple):
    """One request's rows of a frame: ``first`` to ``last``, the first one at ``position``."""

    track: RequestTrack
    first: int
    last: int
    position: int

    @property
    def stop(self) -> int:
        """One past the position of the last one."""
        return self.position + self.last - self.first


@dataclass(frozen=True, slots=True)
class BlockNews:
    """A block, whose its tokens are, and which of them are generated and news (bool [T])."""

    block: Block
    shares: list[Share]
    generated_T: BoolArray
    fresh_T: BoolArray
    completed_T: BoolArray
    cached: bool
    """Whether it was kept from an earlier request, whose KV this one reused."""


@dataclass(slots=True)
class Step:
    """All that one frame brought."""

    key: EngineKey
    blocks: list[BlockNews] = field(default_factory=list)
    started: list[RequestTrack] = field(default_factory=list)
    finished: list[RequestTrack] = field(default_factory=list)
    unobserved: Counter[Unobserved] = field(default_factory=Counter)
    num_shed: int = 0
    """Its tokens, if the frame was shed, but for those that were seen or missed before."""


class RequestLedger:
    """Tracks by the engine's id and by the client's. One owner, one thread."""

    def __init__(
        self,
        columns: Columns,
        limits: Limits,
        score: Callable[[RequestTrack], tuple[Score, ...]],
    ) -> None:
        self._columns = columns
        self._limits = limits
        self._score = score
        self._running: dict[TrackKey, RequestTrack] = {}
        self._finished: dict[TrackKey, RequestTrack] = {}
        self._room = Room(limits.max_bytes, self._free)
        self._by_external_id: dict[str, list[RequestTrack]] = {}
        self._ranks: dict[EngineKey, set[int]] = {}
        self._serials = count(1)

    def report(self, external_id: str) -> tuple[RequestTrack, ...]:
        """Every sequence known under the client's id, in order of start; may be empty."""
        return tuple(self._by_external_id.get(external_id, ()))

    def feed(self, frame: Frame, now: float, *, is_shed: bool = False) -> Step:
        """Take one frame; raise ``ValueError``, changing nothing, if its sites are unknown.

        One that is shed only tells what became of requests: its tokens were computed, not seen.
        """
        if is_shed:
            frame = without_activations(frame)
        blocks = list(self._columns.blocks(frame.sites))
        cached = {
            start.request_id: list(self._columns.blocks(start.cached.sites))
            for start in frame.started
            if start.cached is not None
        }
        key = EngineKey(frame.model_name, frame.engine)
        self._ranks.setdefault(key, set()).add(frame.rank)
        step = Step(key)
        present = set(frame.request_ids)
        for start in frame.started:
            if start.resumed_at is not None:  # before the ends: it may have ended since
                self._start(step, start, now)
        self._finish(step, frame, (e for e in frame.finished if e.request_id not in present), now)
        for start in frame.started:
            if start.resumed_at is not None:
                continue
            self._start(step, start, now)
            self._take_cached(step, start, cached.get(start.request_id, ()))
        for change in frame.changed:
            if (track := self._running.get((key, change.request_id))) is not None:
                track.change(change)
        shares = list(self._shares(step, frame, now))
        if is_shed:
            step.num_shed = sum(s.track.give_up(s.position, s.stop) for s in shares)
        _take(step, blocks, shares, frame.query_start_loc[-1])
        self._finish(step, frame, (e for e in frame.finished if e.request_id in present), now)
        return step

    def expect(self, key: EngineKey, ranks: Iterable[int]) -> None:
        """Workers that an earlier hub knew: a sequence only ends once all have said so."""
        self._ranks.setdefault(key, set()).update(ranks)

    def running(self) -> tuple[RequestTrack, ...]:
        """The sequences that have not ended."""
        return tuple(self._running.values())

    def expire(self, now: float) -> list[RequestTrack]:
        """Forget what is past its time; return the sequences that never finished."""
        deadline = now - self._limits.ttl_seconds
        for key, track in list(self._finished.items()):
            if track.updated_at > deadline:
                break
            self._forget(key, self._finished)
        lost = [(k, t) for k, t in self._running.items() if t.updated_at <= deadline]
        for key, _ in lost:
            self._forget(key, self._running)
        return [track for _, track in lost]

    def _start(self, step: Step, start: RequestStart, now: float) -> None:
        key = (step.key, start.request_id)
        if key in self._running:
            return
        if key in self._finished:
            if start.resumed_at is not None:
                return
            self._forget(key, self._finished)
        self._make_room()
        limit = self._limits.max_tokens_per_track
        track = RequestTrack(start, step.key, self._columns, limit, now, self._room.take)
        track.serial = next(self._serials)
        self._running[key] = track
        self._by_external_id.setdefault(start.external_id, []).append(track)
        step.started.append(track)
        num_known = sum(start.cached.known) if start.cached else 0
        step.unobserved[Unobserved.EXTERNAL_KV] += start.num_external
        rest = start.first_position - num_known - start.num_external
        step.unobserved[Unobserved.PREFIX_CACHE] += max(rest, 0)

    def _take_cached(self, step: Step, start: RequestStart, blocks: Iterable[Block]) -> None:
        """Tokens whose KV was reused: seen when an earlier request computed them."""
        track = self._running.get((step.key, start.request_id))
        if track is None or start.cached is None:
            return
        known = np.frombuffer(start.cached.known, np.int8)
        edges = np.flatnonzero(np.diff(known, prepend=0, append=0)).tolist()
        runs = zip(edges[::2], edges[1::2], strict=True)
        shares = [Share(track, first, last, first) for first, last in runs]
        _take(step, blocks, shares, start.first_position, cached=True)

    def _shares(self, step: Step, frame: Frame, now: float) -> Iterator[Share]:
        bounds = pairwise(frame.query_start_loc)
        rows = zip(frame.request_ids, bounds, frame.positions, strict=True)
        for request_id, (first, last), position in rows:
            track = self._running.get((step.key, request_id))
            if track is None:
                step.unobserved[Unobserved.UNKNOWN_REQUEST] += last - first
                continue
            if position > track.end:
                step.unobserved[Unobserved.DROPPED_FRAME] += position - track.end
            track.updated_at = now
            track.dropped_at[frame.rank] = frame.dropped
            yield Share(track, first, last, position)

    def _finish(self, step: Step, frame: Frame, ends: Iterable[RequestEnd], now: float) -> None:
        for end in ends:
            key = (step.key, end.request_id)
            track = self._running.get(key)
            if track is None:
                continue
            dropped = track.dropped_at.pop(frame.rank, frame.dropped)
            track.tail_lost |= not end.end and frame.dropped > dropped
            track.reach(end.end)
            track.ended_at.add(frame.rank)
            if track.ended_at >= self._ranks[step.key]:
                track.finish(self._score(track), now)
                self._finished[key] = self._running.pop(key)
                self._room.charge(track.num_bytes - track.holding.num_taken)
                track.holding.num_taken = track.num_bytes
                step.finished.append(track)

    def _free(self) -> bool:
        """Forget the oldest that finished, but for the newest."""
        if len(self._finished) < 2:
            return False
        self._forget(next(iter(self._finished)), self._finished)
        return True

    def _make_room(self) -> None:
        while len(self._running) + len(self._finished) >= self._limits.max_tracks:
            oldest = self._finished or self._running
            self._forget(next(iter(oldest)), oldest)

    def _forget(self, key: TrackKey, tracks: dict[TrackKey, RequestTrack]) -> None:
        track = tracks.pop(key)
        self._room.give(track.holding.num_taken)
        siblings = self._by_external_id[track.start.external_id]
        siblings.remove(track)
        if not siblings:
            del self._by_external_id[track.start.external_id]


def _generated(shares: list[Share], num_tokens: int) -> BoolArray:
    """Which tokens were generated rather than given (bool [T]); of unknown requests, all."""
    generated_T: BoolArray = np.ones(num_tokens, np.bool_)
    for track, first, last, position in shares:
        if position < track.num_prompt_tokens:
            generated_T[first : min(first + track.num_prompt_tokens - position, last)] = False
    return generated_T


def _take(
    step: Step, blocks: Iterable[Block], shares: list[Share], num_tokens: int, cached: bool = False
) -> None:
    """Add the blocks, all of the same tokens, to their tracks and to the step's news."""
    generated_T = _generated(shares, num_tokens)
    for block in blocks:
        fresh_T, completed_T = _add(block, shares, step)
        step.blocks.append(BlockNews(block, shares, generated_T, fresh_T, completed_T, cached))


def _add(block: Block, shares: list[Share], step: Step) -> tuple[BoolArray, BoolArray]:
    """Which of the block's tokens are fresh and which completed (bool [T])."""
    fresh_T: BoolArray = np.zeros(len(block.acts_TF), np.bool_)
    completed_T: BoolArray = np.zeros(len(block.acts_TF), np.bool_)
    appended, others = _append(block, shares) if block.is_whole else ([], shares)
    fresh_T[appended] = completed_T[appended] = True
    for share in others:
        added = share.track.add(block, share.first, share.last, share.position)
        fresh_T[share.first : share.last] = added.fresh
        completed_T[share.first : share.last] = added.completed
        if block.finite_T is not None:
            num_bad = int((~block.finite_T[share.first : share.last]).sum())
            step.unobserved[Unobserved.NOT_FINITE] += num_bad
    return fresh_T, completed_T


def _append(block: Block, shares: list[Share]) -> tuple[list[int], list[Share]]:
    """Append tokens that came alone, and are new, to their tracks: their rows, the other shares."""
    alone = [share for share in shares if share.last - share.first == 1]
    others = [share for share in shares if share.last - share.first != 1]
    rows = [share.first for share in alone]
    # Tracks keep these for a while: rows of long prompts, which came with them, they need not.
    acts_nF = block.acts_TF if len(rows) == len(block.acts_TF) else block.acts_TF[rows]
    appended: list[int] = []
    for share, row_F, is_plain in zip(alone, acts_nF, block.plain_T()[rows].tolist(), strict=True):
        track, first, _, position = share
        if is_plain and position >= track.end:
            track.append(position, row_F)
            appended.append(first)
        else:
            others.append(share)
    return appended, others
