"""From the tape to frames on the wire, never blocking the step.

Steps that follow each other within ``TELL_EVERY_NS`` are told together, in one frame. After a
forward pass the caches hold nothing of ours, so it is calls that cost: a decoding step after others
like it is counted, and that is all. A frame that cannot be sent is dropped and counted; the count
travels in every later frame, so that the hub knows what it did not see. Under speculative decoding
a step is held until the scheduler says which of its tokens were accepted.

Frames that wait for a hub that is gone are for the next one, which is told anew of the requests
that run, from the first step on that ends without the hub.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from steerscope.engine.hub_news import HubNews, Reused
from steerscope.engine.plan import EMPTY_LAYOUT, BatchPlan, IntArray, StepLayout
from steerscope.engine.roster import Roster
from steerscope.engine.sender import FrameSender
from steerscope.engine.slots import NO_VALUES, SiteValues, SlotCache, Values
from steerscope.engine.tape import Reading, ReadStep, Tape
from steerscope.engine.taps import SiteTap
from steerscope.steering.stamp import Stamp
from steerscope.telemetry.frames import (
    FRAME_VERSION,
    MAX_FRAME_BYTES,
    CachedActivations,
    Frame,
    SiteActivations,
    encode,
)

TELL_EVERY_NS = 200_000_000
"""How long tokens may wait for more to be told with them. Where steps take longer none wait.

To hand a message to ZeroMQ wakes its thread, which costs a step more than all else."""

NEWS_WITHIN_NS = 10_000_000
"""The same where a response waits for the report of a request that ended."""

MAX_REUSED_BYTES = MAX_FRAME_BYTES // 2
"""Of one request's first tokens: of more none is told, and they are unobserved."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Who sends: constant for the life of a worker."""

    catalog_digest: str
    model_name: str
    engine: str
    rank: int


class Readout:
    """Tells the hub of what each step left on the tape."""

    def __init__(
        self,
        source: Source,
        sites: Sequence[SiteTap],
        tape: Tape,
        sender: FrameSender,
        roster: Roster,
    ) -> None:
        self._source = source
        self._sites = sites
        self._tape = tape
        self._sender = sender
        self._roster = roster
        self._kept: SlotCache | None = None
        self._block_size = 1
        num_features = sum(len(tap.features) for tap in sites)
        self._news = HubNews(source.catalog_digest, roster, self._reused, num_features)
        self._step = 0
        self._dropped = 0
        self._dropped_tokens = 0
        self._told_tokens = 0
        self._overhead_ns = 0
        self._overheads_ns: list[int] = []
        """Of the steps since the last frame."""
        self._held: ReadStep | None = None
        """Read, but not there yet, or not accepted yet."""
        self._waiting: list[ReadStep] = []
        self._met: Sequence[str] = ()
        """The requests of the step."""
        self._rows_R: IntArray | None = None
        """Of those, in the roster; None where it does not know them all."""
        self._newcomers: set[str] = set()
        """Those that no hub was told of."""
        self._num_kept = 0
        """How many of those are kept by KV slot."""
        self._due_ns = 0
        """When what waits is to be told."""

    def keep(self, kept: SlotCache | None, block_size: int) -> None:
        """From now on keep activations by KV slot."""
        self._kept, self._block_size = kept, block_size

    def charge(self, nanoseconds: int) -> None:
        """Add host time that Steerscope spent in this step."""
        self._overhead_ns += nanoseconds

    def end(self, ended: Mapping[str, int]) -> None:
        """Requests ended, which the roster still has."""
        self._met = ()
        if self._news.are_untold(ended):
            self.tell()
        if self._news.end(ended):
            self._due_ns = min(self._due_ns, time.monotonic_ns() + NEWS_WITHIN_NS)

    def change(self, req_id: str, position: int, stamp: Stamp) -> None:
        """A request's steering changed from ``position`` on."""
        if self._news.concerns(req_id):
            self.tell()  # what came before the change
            self._news.change(req_id, position, stamp)

    def meet(self, layout: StepLayout) -> None:
        """The step is about to run; those after it that go on from it are not told of."""
        if layout.req_ids == self._met and not self._newcomers and self._rows_R is not None:
            return
        self._met, self._rows_R = layout.req_ids, None  # never those of another step
        self._newcomers = self._news.strangers(layout)
        if self._news.are_leaving(self._newcomers):
            self.tell()  # the id comes back as another request
            self._newcomers = self._news.strangers(layout)
        with contextlib.suppress(KeyError):
            self._rows_R = self._roster.rows(layout.req_ids)

    def emit(self, layout: StepLayout, steered_E: IntArray) -> None:
        """Take the step's values: at once, or on a GPU in ``release``. Never raises."""
        self.hold(layout, steered_E)
        if not self._tape.is_deferred:
            self.release({})

    def hold(self, layout: StepLayout, steered_E: IntArray) -> None:
        """Have the step taken once ``release`` says what was accepted."""
        try:
            if self._rows_R is None:
                raise KeyError("a request that the scheduler did not tell of")
            self._held = self._tape.add(layout, self._rows_R, steered_E)
        except Exception:
            self._lose_step(int(layout.query_start_loc[-1]))

    def release(self, ends: Mapping[str, int]) -> None:
        """Take the step that was held, if there is one.

        ``ends``: of drafts, what was accepted; see ``StepNote``.
        """
        step, self._held = self._held, None
        if step is not None:
            self._take(step, ends)

    def extend(self, plan: BatchPlan, steered_E: IntArray) -> None:
        """The step went on from the last one: one more token of each request, steered alike."""
        if len(self._waiting) == self._num_kept:
            self.emit(plan.last, steered_E)
            return
        step = self._waiting[-1]
        try:
            self._tape.add_to(step, steered_E)
        except Exception:
            self._lose_step(step.num_each)
            return
        self._account()
        if self._tape.is_full or time.monotonic_ns() >= self._due_ns:
            self.tell()

    def settle(self) -> None:
        """Keep what was read by KV slot, before it is asked for or a token's slot is another."""
        steps = self._waiting[self._num_kept :]
        if self._kept is None or not steps:
            return
        try:
            self._tape.wait()
            num_tokens = sum(step.num_tokens for step in steps)
            requests = self._tape.requests(steps)
            slots = self._roster.slots(requests, num_tokens, self._block_size)
            self._kept.write(slots, self._tape.values(steps))
        except Exception:
            self._fail(0)
        self._num_kept = len(self._waiting)

    def tell(self) -> None:
        """Tell of the steps that wait."""
        steps = self._waiting
        try:
            if steps:
                self._tape.wait()
            self.settle()
            readings = self._tape.readings(steps)
        except Exception:
            self._fail(sum(step.num_tokens for step in steps))
            readings = []
        self._waiting, self._num_kept = [], 0
        self._roster.recycle()
        for i, reading in enumerate(readings):
            self._send(reading, readings[i + 1 :])
        if self._held is None:
            self._tape.rewind()

    def flush(self) -> None:
        """Tell the hub what there is to tell when no token was computed."""
        self.tell()
        self._account()
        self._send(Reading(EMPTY_LAYOUT, NO_VALUES, time.monotonic_ns()))

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell besides tokens of this step."""
        return bool(self._news.ended or self._news.changed or self._waiting)

    def _lose_step(self, num_tokens: int) -> None:
        """It is nowhere on the tape: none goes on from it."""
        self._fail(num_tokens)
        self.tell()

    def _take(self, step: ReadStep, ends: Mapping[str, int]) -> None:
        """Let the step wait for more to be told with it, if it may."""
        self._account()
        if ends:
            self.tell()
            self._tell_accepted(step, ends)
            return
        self._waiting.append(step)
        if self._newcomers:
            try:
                self._start(step.layout, self._newcomers, self._waiting)
                self._newcomers = set()
            except Exception:
                self._waiting.pop()
                self._lose_step(step.num_tokens)
        if self._tape.is_full or step.read_ns >= self._due_ns:
            self.tell()

    def _start(
        self, layout: StepLayout, newcomers: Set[str], told_next: Sequence[ReadStep]
    ) -> None:
        """Have the hub told of them, before their tokens where much is kept of the first ones."""
        for r in sorted(map(layout.req_ids.index, newcomers)):
            if not self._news.concerns(layout.req_ids[r]):
                self._news.start(layout, r)
            if self._news.is_full:
                self._send(Reading(EMPTY_LAYOUT, NO_VALUES, time.monotonic_ns()), told_next)

    def _account(self) -> None:
        """A step is over."""
        self._overheads_ns.append(self._overhead_ns)
        self._overhead_ns = 0

    def _tell_accepted(self, step: ReadStep, ends: Mapping[str, int]) -> None:
        try:
            self._tape.wait()
            read = self._tape.read(step).accepted(ends)
            if self._kept is not None:
                lengths_R = np.diff(read.layout.query_start_loc)
                accepted = self._tape.requests([step])._replace(lengths_P=lengths_R)
                slots = self._roster.slots(accepted, read.num_tokens, self._block_size)
                self._kept.write(slots, read.values)
            self._start(step.layout, self._news.strangers(step.layout), [step])
        except Exception:
            self._fail(step.num_tokens)
        else:
            self._send(read)
        self._tape.rewind()

    def _send(self, read: Reading, rest: Sequence[Reading | ReadStep] = ()) -> None:
        """``rest`` follows soon: requests may have tokens there, so none ends before."""
        self._news.num_cached = 0
        try:
            if self._sender.has_lost_hub():
                self._news.begin_anew([read.layout, *(each.layout for each in rest)])
                self._met = ()
            sent = self._sender.send(encode(self._frame(read, with_ends=not rest)))
        except Exception:
            self._fail(read.num_tokens)
            return
        self._overheads_ns.clear()
        self._step += 1
        if not rest:
            self._due_ns = time.monotonic_ns() + TELL_EVERY_NS
        if sent:
            self._news.told(with_ends=not rest)
            self._told_tokens += read.num_tokens
        else:  # what is to be known of requests is told again with the next frame
            self._news.lose_cached()
            self._lose(read.num_tokens)

    def _fail(self, num_tokens: int) -> None:
        """Telemetry fails open, whatever is wrong: the loss is counted, nothing stale is kept."""
        _log.exception("steerscope: a step could not be read out")
        self._kept = None
        self._step += 1
        self._lose(num_tokens)

    def _lose(self, num_tokens: int) -> None:
        self._dropped += 1
        self._dropped_tokens += num_tokens

    def _frame(self, read: Reading, with_ends: bool) -> Frame:
        return Frame(
            version=FRAME_VERSION,
            catalog_digest=self._source.catalog_digest,
            model_name=self._source.model_name,
            engine=self._source.engine,
            rank=self._source.rank,
            step=self._step,
            monotonic_ns=read.read_ns,
            overhead_ns=tuple(self._overheads_ns),
            dropped=self._dropped,
            dropped_tokens=self._dropped_tokens,
            started=self._news.started,
            finished=tuple(self._news.ended) if with_ends else (),
            changed=tuple(self._news.changed),
            request_ids=tuple(read.layout.req_ids),
            query_start_loc=tuple(read.layout.query_start_loc.tolist()),
            positions=tuple(read.layout.first_positions.tolist()),
            sites=self._activations(read.values),
            told_tokens=self._told_tokens,
        )

    def _reused(self, req_id: str, num_positions: int) -> Reused:
        """What is kept of tokens whose KV the request found, which may be of a step that waits."""
        self.settle()
        if self._kept is None:
            return None, 0
        slots = self._roster.leading_slots(req_id, num_positions, self._block_size)
        num_external = self._kept.num_foreign(slots)
        if num_positions * self._kept.bytes_per_slot > MAX_REUSED_BYTES:
            return None, num_external
        known, values = self._kept.read(slots)
        if not known.any():
            return None, num_external
        return CachedActivations(known.tobytes(), self._activations(values)), num_external

    def _activations(self, values: Values) -> tuple[SiteActivations, ...]:
        """Of every site, or, in a step without tokens, of none."""
        return tuple(
            _activations(tap, values.steered, site)
            for tap, site in zip(self._sites, values.sites, strict=bool(values.sites))
        )


def _activations(tap: SiteTap, steered: IntArray, values: SiteValues) -> SiteActivations:
    name, num_features, acts = tap.name, len(tap.features), _bytes(values.acts)
    edited = np.flatnonzero(values.doses > 0.0) if steered.size else steered
    if not edited.size:
        return SiteActivations(name, num_features, acts)
    deltas, doses = values.deltas, values.doses
    if edited.size < steered.size:
        steered, deltas, doses = steered[edited], deltas[edited], doses[edited]
    tokens = steered.astype(np.int32)
    return SiteActivations(name, num_features, acts, _bytes(tokens), _bytes(deltas), _bytes(doses))


def _bytes(array: npt.NDArray[np.generic]) -> bytes:
    """A view, which msgspec writes like bytes: the one copy made is the frame."""
    return cast(bytes, array.data)
