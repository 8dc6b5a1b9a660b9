"""From device buffers to frames on the wire, once per step, never blocking the step.

A frame that cannot be sent at once is dropped and counted; the count travels in
every later frame, so that the hub knows what it did not see.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import zmq

from steerscope.engine.plan import IntArray, RequestInfo, StepLayout
from steerscope.engine.taps import SiteTap
from steerscope.hub.protocol import frames_address
from steerscope.steering.interventions import canonical_json
from steerscope.telemetry.frames import (
    FRAME_VERSION,
    Frame,
    RequestStart,
    SiteActivations,
    encode,
)

SEND_QUEUE_FRAMES = 1000
"""Frames that may wait for the hub before new ones are dropped."""

_log = logging.getLogger(__name__)


class FrameSender:
    """PUSH socket to the hub's fan-in. ``send`` never blocks and never raises."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_FRAMES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(frames_address(endpoint))

    def send(self, payload: bytes) -> bool:
        """Whether the frame was taken."""
        try:
            self._socket.send(payload, zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Source:
    """Who sends: constant for the life of a worker."""

    catalog_digest: str
    model_name: str
    engine: str
    rank: int


class Readout:
    """Builds each step's frame from the sites' buffers and hands it to the sender."""

    def __init__(
        self,
        source: Source,
        sites: Sequence[SiteTap],
        sender: FrameSender,
        lookup: Callable[[str], RequestInfo],
    ) -> None:
        self._source = source
        self._sites = sites
        self._sender = sender
        self._lookup = lookup
        self._known: set[str] = set()
        self._untold: dict[str, RequestStart] = {}
        self._ended: list[str] = []
        self._step = 0
        self._dropped = 0
        self._dropped_tokens = 0
        self._overhead_ns = 0

    def charge(self, nanoseconds: int) -> None:
        """Add host time that Steerscope spent in this step."""
        self._overhead_ns += nanoseconds

    def emit(self, layout: StepLayout, rows_T: IntArray, finished: Sequence[str]) -> None:
        """Send the step. ``finished`` are requests that ended before it. Never raises."""
        num_tokens = int(layout.query_start_loc[-1])
        self._end(finished)
        started = self._started(layout)
        try:
            sent = self._sender.send(encode(self._frame(layout, rows_T, started, num_tokens)))
        except Exception:  # telemetry fails open, whatever is wrong: the loss is counted
            _log.exception("steerscope: a step could not be read out")
            sent = False
        self._overhead_ns = 0
        self._step += 1
        if sent:
            self._ended.clear()
            self._known.update(self._untold)
            self._untold.clear()
        else:  # starts and ends are told again with the next frame
            self._dropped += 1
            self._dropped_tokens += num_tokens

    def _frame(
        self,
        layout: StepLayout,
        rows_T: IntArray,
        started: tuple[RequestStart, ...],
        num_tokens: int,
    ) -> Frame:
        steered = np.flatnonzero(rows_T)
        return Frame(
            version=FRAME_VERSION,
            catalog_digest=self._source.catalog_digest,
            model_name=self._source.model_name,
            engine=self._source.engine,
            rank=self._source.rank,
            step=self._step,
            monotonic_ns=time.monotonic_ns(),
            overhead_ns=self._overhead_ns,
            dropped=self._dropped,
            dropped_tokens=self._dropped_tokens,
            started=started,
            finished=tuple(self._ended),
            request_ids=tuple(layout.req_ids),
            query_start_loc=tuple(layout.query_start_loc.tolist()),
            positions=tuple(layout.first_positions.tolist()),
            sites=tuple(_site(tap, num_tokens, steered) for tap in self._sites)
            if num_tokens
            else (),
        )

    def _end(self, finished: Sequence[str]) -> None:
        """Only ends of requests that the hub knows are kept: it may never take a frame again."""
        for req_id in finished:
            if req_id in self._known:
                self._known.remove(req_id)
                self._ended.append(req_id)
            self._untold.pop(req_id, None)

    def _started(self, layout: StepLayout) -> tuple[RequestStart, ...]:
        """Requests the hub has not been told of, each with the first position it ever had."""
        for req_id, position in zip(layout.req_ids, layout.first_positions, strict=True):
            if req_id not in self._known and req_id not in self._untold:
                self._untold[req_id] = _start(req_id, self._lookup(req_id), int(position))
        return tuple(self._untold.values())


def _start(req_id: str, info: RequestInfo, first_position: int) -> RequestStart:
    stamp = info.stamp
    return RequestStart(
        request_id=req_id,
        external_id=stamp.external_id if stamp else req_id,
        num_prompt_tokens=info.num_prompt_tokens,
        first_position=first_position,
        policy=stamp.policy if stamp else "",
        digest=stamp.digest if stamp else "",
        interventions=canonical_json(stamp.interventions) if stamp and stamp.policy else b"",
    )


def _site(tap: SiteTap, num_tokens: int, steered: IntArray) -> SiteActivations:
    acts = tap.acts_TF[:num_tokens].cpu().numpy().tobytes()
    name, num_features = str(tap.key), len(tap.features)
    if not steered.size:
        return SiteActivations(name, num_features, acts)
    doses = tap.doses_T[:num_tokens].cpu().numpy()[steered]
    edited = steered[doses > 0.0]
    return SiteActivations(
        name,
        num_features,
        acts,
        edited.astype(np.int32).tobytes(),
        tap.deltas_TF[:num_tokens].cpu().numpy()[edited].tobytes(),
        doses[doses > 0.0].tobytes(),
    )
