"""From device buffers to frames on the wire, never blocking the step.

Steps that follow each other within ``TELL_EVERY_NS`` are told together: as one frame while the
same requests decode, and in one message in any case. A frame that cannot be sent is dropped and
counted; the count travels in every later frame, so that the hub knows what it did not see. Under
speculative decoding a step is held until the scheduler says which of its tokens were accepted.

Frames that wait for a hub that is gone are for the next one, which is told anew of the requests
that run, from the first step on that ends without the hub.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from steerscope.engine.plan import EMPTY_LAYOUT, IntArray, RequestInfo, StepLayout
from steerscope.engine.readback import Readback
from steerscope.engine.roster import Roster
from steerscope.engine.runs import DecodeRun, ReadStep
from steerscope.engine.slots import NO_VALUES, SiteValues, SlotCache, Values
from steerscope.engine.taps import SiteTap
from steerscope.hub.protocol import frames_address
from steerscope.steering.interventions import canonical_json, steering_digest
from steerscope.steering.stamp import Stamp
from steerscope.telemetry.frames import (
    FRAME_VERSION,
    CachedActivations,
    Frame,
    RequestEnd,
    RequestStart,
    SiteActivations,
    SteeringChange,
    encode,
)

SEND_QUEUE_MESSAGES = 1000
"""Messages that may wait for the hub before new frames are dropped."""

MAX_MESSAGE_BYTES = 1 << 16
"""A message with more in it waits for no other frame."""

TELL_EVERY_NS = 100_000_000
"""How long tokens may wait for more to be told with them. Where steps take longer none wait."""

NEWS_WITHIN_NS = 10_000_000
"""The same where requests came or ended: somebody may ask for a report."""

NO_SLOTS: IntArray = np.zeros(0, np.int64)

_log = logging.getLogger(__name__)


class FrameSender:
    """PUSH socket to the hub's fan-in. Nothing here blocks, and ``send`` never raises.

    What waits in the socket while there is no hub goes to the next one, in order. A thread that
    otherwise sleeps notices that a hub went away. Sending wakes ZeroMQ's thread, which costs the
    step more than all else, so frames that follow each other go in one message.
    """

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._has_lost_hub = False
        self._queue: list[bytes] = []
        self._num_queued_bytes = 0
        self._sent_ns = 0
        partings: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        threading.Thread(
            target=self._watch, args=(partings,), name="steerscope-partings", daemon=True
        ).start()
        self._socket.connect(frames_address(endpoint))

    def has_lost_hub(self) -> bool:
        """Whether the hub went away since this was last asked."""
        is_lost = self._has_lost_hub
        if is_lost:
            self._has_lost_hub = False
        return is_lost

    @property
    def is_waiting(self) -> bool:
        """Whether frames wait for more to be sent with them."""
        return bool(self._queue)

    def send(self, payload: bytes, wait_ns: int) -> bool:
        """Whether the frame was taken. Messages may be as far apart as ``wait_ns``."""
        now_ns = time.monotonic_ns()
        self._queue.append(payload)
        self._num_queued_bytes += len(payload)
        is_due = now_ns - self._sent_ns >= wait_ns
        if not is_due and self._num_queued_bytes < MAX_MESSAGE_BYTES:
            return True
        try:
            self._socket.send_multipart(self._queue, zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:
            self._queue.pop()
            self._num_queued_bytes -= len(payload)
            return False
        self._queue, self._num_queued_bytes, self._sent_ns = [], 0, now_ns
        return True

    def _watch(self, partings: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.ContextTerminated):
            while partings.recv_multipart():
                self._has_lost_hub = True


@dataclass(frozen=True, slots=True)
class Source:
    """Who sends: constant for the life of a worker."""

    catalog_digest: str
    model_name: str
    engine: str
    rank: int


@dataclass(slots=True)
class _Told:
    """What the hub must learn of requests; kept until a frame with it was sent."""

    started: dict[str, RequestStart] = field(default_factory=dict)
    resumed: dict[str, RequestStart] = field(default_factory=dict)
    """Of those that ended, which the hub does not know: an earlier one did."""
    leaving: dict[str, tuple[RequestInfo, int]] = field(default_factory=dict)
    """Of those that it does know, and their ends, for the case that it is gone."""
    ended: list[RequestEnd] = field(default_factory=list)
    changed: list[SteeringChange] = field(default_factory=list)

    def clear(self) -> None:
        self.started.clear()
        self.resumed.clear()
        self.leaving.clear()
        self.ended.clear()
        self.changed.clear()


class Readout:
    """Reads each step out of the sites' buffers and tells the hub of it."""

    def __init__(
        self,
        source: Source,
        sites: Sequence[SiteTap],
        sender: FrameSender,
        roster: Roster,
    ) -> None:
        self._source = source
        self._sites = sites
        self._readback = Readback(sites)
        self._sender = sender
        self._roster = roster
        self._kept: SlotCache | None = None
        self._block_size = 1
        self._known: set[str] = set()
        self._all_known: Sequence[str] = ()
        """Requests of the last step, all of which the hub knows."""
        self._known_earlier: set[str] = set()
        """Requests that a hub knew which is gone."""
        self._untold = _Told()
        self._step = 0
        self._dropped = 0
        self._dropped_tokens = 0
        self._told_tokens = 0
        self._overhead_ns = 0
        self._overheads_ns: list[int] = []
        """Of the steps since the last frame."""
        self._held: ReadStep | None = None
        self._run = DecodeRun()
        self._told_ns = 0
        """When a frame was last made."""

    def keep(self, kept: SlotCache | None, block_size: int) -> None:
        """From now on keep activations by KV slot."""
        self._kept, self._block_size = kept, block_size

    def charge(self, nanoseconds: int) -> None:
        """Add host time that Steerscope spent in this step."""
        self._overhead_ns += nanoseconds

    def end(self, ended: Mapping[str, int]) -> None:
        """Requests ended, which the roster still has.

        Only what a hub knows of is kept: none may ever take a frame again.
        """
        if ended:
            self._all_known = ()
        for req_id, end in ended.items():
            self._untold.started.pop(req_id, None)
            if req_id in self._known:
                self._known.remove(req_id)
                self._untold.leaving[req_id] = self._roster.info(req_id), end
            elif req_id in self._known_earlier:
                self._known_earlier.remove(req_id)
                self._untold.resumed[req_id] = self._resumption(
                    req_id, self._roster.info(req_id), end
                )
            else:
                continue
            self._untold.ended.append(RequestEnd(req_id, end))

    def change(self, req_id: str, position: int, stamp: Stamp) -> None:
        """A request's steering changed from ``position`` on."""
        if req_id in self._known or req_id in self._untold.started:
            self._untold.changed.append(
                SteeringChange(
                    req_id,
                    position,
                    stamp.policy,
                    self._applied(stamp),
                    canonical_json(stamp.current),
                    stamp.source,
                    stamp.asked,
                )
            )

    def emit(self, layout: StepLayout, steered_E: IntArray) -> None:
        """Take the step's values: at once, or on a GPU in ``release``. Never raises."""
        step = self._read(layout, steered_E)
        if self._readback.is_deferred:
            self._held = step
        elif step is not None:
            self._take(step)

    def hold(self, layout: StepLayout, steered_E: IntArray) -> None:
        """Like ``emit``, once ``release`` says what was accepted."""
        step = self._read(layout, steered_E)
        is_copy = self._readback.is_deferred
        self._held = step if is_copy or step is None else step.detached()

    def release(self, ends: Mapping[str, int]) -> None:
        """Take the step that was held, if there is one.

        ``ends``: of drafts, what was accepted; see ``StepNote``.
        """
        step, self._held = self._held, None
        if step is None:
            return
        self._readback.wait()
        self._take(step.accepted(ends) if ends else step)

    def settle(self) -> None:
        """Tell of the steps that wait: what is known of their requests is about to change."""
        for step in self._run.take():
            self._tell(step)

    def flush(self) -> None:
        """Tell the hub what there is to tell when no token was computed."""
        self.settle()
        self._account()
        self._tell(ReadStep(EMPTY_LAYOUT, NO_VALUES, time.monotonic_ns()))

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell besides tokens of this step."""
        waits = len(self._run) or self._sender.is_waiting
        return bool(self._untold.ended or self._untold.changed or waits)

    def _read(self, layout: StepLayout, steered_E: IntArray) -> ReadStep | None:
        num_tokens = int(layout.query_start_loc[-1])
        try:
            self._readback.start(num_tokens, bool(steered_E.size))
            values = self._values(num_tokens, steered_E)
        except Exception:
            self._fail(num_tokens)
            return None
        return ReadStep(layout, values, time.monotonic_ns())

    def _take(self, step: ReadStep) -> None:
        """Tell of the step, or put it aside if more like it are to be expected soon."""
        self._account()
        if self._run and not self._run.goes_on_with(step):
            self.settle()
        is_due = step.read_ns - self._told_ns >= self._wait_ns(step.layout)
        if not self._run and (is_due or not step.is_decode):
            self._tell(step)
            return
        self._run.append(step)
        if is_due:
            self.settle()

    def _wait_ns(self, layout: StepLayout) -> int:
        """How long what there is to tell may wait for more."""
        if not layout.req_ids:
            return 0  # nobody computes: it may be long until there is more
        untold = self._untold
        is_news = untold.started or untold.ended or untold.changed
        return NEWS_WITHIN_NS if is_news else TELL_EVERY_NS

    def _account(self) -> None:
        """A step is over."""
        self._overheads_ns.append(self._overhead_ns)
        self._overhead_ns = 0

    def _tell(self, step: ReadStep) -> None:
        self._told_ns = time.monotonic_ns()
        layout = step.layout
        try:
            if self._kept and layout.req_ids:
                self._kept.write(self._roster.slots(layout, self._block_size), step.values)
            if self._sender.has_lost_hub():
                self._begin_anew()
            self._start(layout)
            sent = self._sender.send(encode(self._frame(step)), self._wait_ns(layout))
        except Exception:
            self._fail(step.num_tokens)
            return
        self._overheads_ns.clear()
        self._step += 1
        if sent:
            self._all_known = layout.req_ids
            self._known.update(self._untold.started)
            self._known_earlier.difference_update(self._untold.started)
            self._untold.clear()
            self._told_tokens += step.num_tokens
        else:  # what is to be known of requests is told again with the next frame
            self._lose(step.num_tokens)

    def _begin_anew(self) -> None:
        """The hub is gone, and whatever it knew with it."""
        self._known_earlier |= self._known
        self._known.clear()
        self._all_known = ()
        for req_id, (info, end) in self._untold.leaving.items():
            self._untold.resumed[req_id] = self._resumption(req_id, info, end)
        self._untold.leaving.clear()

    def _fail(self, num_tokens: int) -> None:
        """Telemetry fails open, whatever is wrong: the loss is counted, nothing stale is kept."""
        _log.exception("steerscope: a step could not be read out")
        self._kept = None
        self._step += 1
        self._lose(num_tokens)

    def _lose(self, num_tokens: int) -> None:
        self._dropped += 1
        self._dropped_tokens += num_tokens

    def _frame(self, step: ReadStep) -> Frame:
        return Frame(
            version=FRAME_VERSION,
            catalog_digest=self._source.catalog_digest,
            model_name=self._source.model_name,
            engine=self._source.engine,
            rank=self._source.rank,
            step=self._step,
            monotonic_ns=step.read_ns,
            overhead_ns=tuple(self._overheads_ns),
            dropped=self._dropped,
            dropped_tokens=self._dropped_tokens,
            started=(*self._untold.resumed.values(), *self._untold.started.values()),
            finished=tuple(self._untold.ended),
            changed=tuple(self._untold.changed),
            request_ids=tuple(step.layout.req_ids),
            query_start_loc=tuple(step.layout.query_start_loc.tolist()),
            positions=tuple(step.layout.first_positions.tolist()),
            sites=self._activations(step.values),
            told_tokens=self._told_tokens,
        )

    def _start(self, layout: StepLayout) -> None:
        """Requests the hub has not been told of, each with the first position it ever had."""
        if layout.req_ids == self._all_known:
            return
        for req_id, position in zip(layout.req_ids, layout.first_positions.tolist(), strict=True):
            if req_id in self._known or req_id in self._untold.started:
                continue
            info = self._roster.info(req_id)
            self._untold.started[req_id] = (
                self._resumption(req_id, info, position)
                if req_id in self._known_earlier
                else self._request_start(req_id, info, position)
            )

    def _resumption(self, req_id: str, info: RequestInfo, position: int) -> RequestStart:
        """For a hub that does not know the request; an earlier one knew it up to there."""
        start = self._request_start(req_id, info, 0)
        return msgspec.structs.replace(start, resumed_at=position)

    def _request_start(self, req_id: str, info: RequestInfo, first_position: int) -> RequestStart:
        stamp = info.stamp or Stamp(req_id)
        reused = NO_SLOTS
        if self._kept and first_position:
            reused = self._roster.leading_slots(req_id, first_position, self._block_size)
        return RequestStart(
            request_id=req_id,
            external_id=stamp.external_id,
            num_prompt_tokens=info.num_prompt_tokens,
            first_position=first_position,
            policy=stamp.policy,
            digest=self._applied(stamp) if stamp.policy else "",
            interventions=canonical_json(stamp.current) if stamp.policy else b"",
            cached=self._cached(reused),
            num_external=self._kept.num_foreign(reused) if self._kept and reused.size else 0,
            source=stamp.source,
            rule=stamp.rule,
            asked=stamp.asked,
            traceparent=stamp.traceparent,
        )

    def _applied(self, stamp: Stamp) -> str:
        """The digest of what this worker does, made from that and not copied from the stamp."""
        if not stamp.current:
            return ""
        return steering_digest(self._source.catalog_digest, stamp.current, stamp.max_dose)

    def _cached(self, slots: IntArray) -> CachedActivations | None:
        """What is kept of tokens whose KV the request found in the prefix cache."""
        if self._kept is None or not slots.size:
            return None
        known, values = self._kept.read(slots)
        if not known.any():
            return None
        return CachedActivations(known.tobytes(), self._activations(values))

    def _values(self, num_tokens: int, steered: IntArray) -> Values:
        # Where all tokens or none are steered, no copy is needed to tell them apart.
        at = steered if 0 < len(steered) < num_tokens else slice(len(steered))
        return Values(
            steered,
            [
                SiteValues(host.acts[:num_tokens], host.deltas[at], host.doses[at])
                for host in self._readback.sites
            ],
        )

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
