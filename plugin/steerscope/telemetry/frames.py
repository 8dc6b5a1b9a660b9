"""The wire between the engine's workers and the hub: a frame for each step, or for several.

Steps that follow each other may come as one frame, in which each request's tokens stand in one
piece; a request that ended in between has its end in the same frame. Encoded with msgspec
(MessagePack), typed and versioned; arrays travel as raw little-endian bytes. Shapes: R requests in
the frame, T their tokens, F features of a site, E edits made. Tokens of request r are
``query_start_loc[r]`` to ``query_start_loc[r + 1]``; its first token here has position
``positions[r]``.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from steerscope.steering import traceparent
from steerscope.steering.rules import SteeringSource

FRAME_VERSION = 4
MAX_FRAME_BYTES = 256 * 1024 * 1024
"""The hub's socket refuses a larger one before it is read."""

MAX_STEPS = 1 << 12
"""No frame tells of more."""

MAX_POSITION = 1 << 24
"""Positions from here on are taken for damage; no served context is that long."""


class SiteActivations(msgspec.Struct, frozen=True, array_like=True):
    """What one site saw: the features as they were before any edit.

    ``acts`` is float32 [T, F]; the edits are listed sparsely: ``edit_tokens`` int32 [E]
    rows of this frame, ``edit_deltas`` float32 [E, F] the change f' - f after gating,
    ``edit_doses`` float32 [E] the norm of the change over the norm of what it changed.
    """

    site: str
    num_features: int
    acts: bytes
    edit_tokens: bytes = b""
    edit_deltas: bytes = b""
    edit_doses: bytes = b""


class CachedActivations(msgspec.Struct, frozen=True, array_like=True):
    """What was kept of P tokens whose KV came from the prefix cache, positions 0 to P."""

    known: bytes
    """Bool [P]; the values of the others mean nothing."""
    sites: tuple[SiteActivations, ...]


class RequestStart(msgspec.Struct, frozen=True, array_like=True):
    """Told once per request and hub, in or before the first frame that holds a token of it.

    ``first_position`` > 0 means the tokens before it came from the prefix cache.
    """

    request_id: str
    """vLLM's internal id; unique in the engine."""
    external_id: str
    """The id the client knows."""
    num_prompt_tokens: int
    first_position: int
    policy: str
    """Policy name, ``inline``, or empty for an unsteered request."""
    digest: str
    """Digest of the steering that the worker applies, or empty."""
    interventions: bytes
    """Canonical JSON of the interventions, or empty."""
    cached: CachedActivations | None = None
    num_external: int = 0
    """How many of the tokens before ``first_position`` have KV from another engine or store."""
    source: SteeringSource = SteeringSource.NOTHING
    """What decided the steering."""
    rule: str = ""
    """The binding's name, if one decided."""
    asked: str = ""
    """What the request asked for itself, if something else decided."""
    resumed_at: int | None = None
    """Told anew, since an earlier hub, which was told of it and of the positions below this, is
    gone. ``first_position`` is then 0: where the request began is not told again."""
    traceparent: str = ""
    """The client's span, as ``steering.traceparent`` writes it, or empty."""


class RequestEnd(msgspec.Struct, frozen=True, array_like=True):
    """A request ended. ``end``: every position below it was computed; 0 where not known."""

    request_id: str
    end: int


class SteeringChange(msgspec.Struct, frozen=True, array_like=True):
    """A request's steering changed in flight; from ``position`` on this holds."""

    request_id: str
    position: int
    policy: str
    digest: str
    interventions: bytes
    source: SteeringSource = SteeringSource.NOTHING
    asked: str = ""


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One or several steps of one worker."""

    version: int
    catalog_digest: str
    model_name: str
    engine: str
    rank: int
    step: int
    monotonic_ns: int
    """``time.monotonic_ns`` when the first of the steps was read out (same host as the hub)."""
    overhead_ns: tuple[int, ...]
    """What Steerscope itself spent on the host in each step that ended since the last frame."""
    dropped: int
    """Frames this worker could not send since it started."""
    dropped_tokens: int
    """Tokens in those frames."""
    started: tuple[RequestStart, ...]
    finished: tuple[RequestEnd, ...]
    """Requests that ended since the last frame."""
    changed: tuple[SteeringChange, ...]
    request_ids: tuple[str, ...]
    query_start_loc: tuple[int, ...]
    positions: tuple[int, ...]
    sites: tuple[SiteActivations, ...]
    told_tokens: int = 0
    """Tokens in the frames that this worker could send before this one."""


def without_activations(frame: Frame) -> Frame:
    """What the frame tells of requests and of how many tokens they had, and no activation."""
    started = tuple(map(without_cached, frame.started))
    return msgspec.structs.replace(frame, sites=(), started=started)


def without_cached(start: RequestStart) -> RequestStart:
    """What it tells of the request, without what was kept of its first tokens."""
    return start if start.cached is None else msgspec.structs.replace(start, cached=None)


def encode(frame: Frame) -> bytes:
    """The frame as MessagePack."""
    return msgspec.msgpack.encode(frame)


def decode(payload: bytes) -> Frame:
    """Decode and check the shapes; raise ``msgspec.ValidationError`` on anything amiss."""
    frame = msgspec.msgpack.decode(payload, type=Frame)
    if frame.version != FRAME_VERSION:
        raise msgspec.ValidationError(f"frame version {frame.version}, expected {FRAME_VERSION}")
    if len(frame.query_start_loc) != len(frame.request_ids) + 1 or len(frame.positions) != len(
        frame.request_ids
    ):
        raise msgspec.ValidationError("request_ids, query_start_loc and positions disagree")
    starts = list(frame.query_start_loc)
    if starts[0] != 0 or starts != sorted(starts):
        raise msgspec.ValidationError("query_start_loc does not ascend from 0")
    if frame.query_start_loc[-1] >= MAX_POSITION:
        raise msgspec.ValidationError("query_start_loc is out of range")
    if frame.positions and not 0 <= min(frame.positions) <= max(frame.positions) < MAX_POSITION:
        raise msgspec.ValidationError("positions are out of range")
    if len(frame.overhead_ns) > MAX_STEPS:
        raise msgspec.ValidationError("overhead_ns tells of too many steps")
    if min((*frame.overhead_ns, frame.dropped, frame.dropped_tokens)) < 0:
        raise msgspec.ValidationError("a count is negative")
    for start in frame.started:
        _check_start(start)
    if any(not 0 <= change.position < MAX_POSITION for change in frame.changed):
        raise msgspec.ValidationError("changed: position is out of range")
    if any(not 0 <= end.end < MAX_POSITION for end in frame.finished):
        raise msgspec.ValidationError("finished: end is out of range")
    for site in frame.sites:
        _check_site(site, frame.query_start_loc[-1])
    return frame


def _check_start(start: RequestStart) -> None:
    if not 0 <= start.first_position < MAX_POSITION:
        raise msgspec.ValidationError("started: first_position is out of range")
    if not 0 <= start.num_prompt_tokens < MAX_POSITION:
        raise msgspec.ValidationError("started: num_prompt_tokens is out of range")
    if not 0 <= (start.resumed_at or 0) < MAX_POSITION:
        raise msgspec.ValidationError("started: resumed_at is out of range")
    if start.traceparent and traceparent.parse(start.traceparent) is None:
        raise msgspec.ValidationError("started: traceparent is malformed")
    if not 0 <= start.num_external <= start.first_position:
        raise msgspec.ValidationError("started: num_external is out of range")
    if start.cached is not None:
        if len(start.cached.known) != start.first_position:
            raise msgspec.ValidationError("started: cached is not [P]")
        for site in start.cached.sites:
            _check_site(site, start.first_position)


def _check_site(site: SiteActivations, num_tokens: int) -> None:
    if site.num_features < 1:
        raise msgspec.ValidationError(f"{site.site}: num_features is not positive")
    if len(site.acts) != 4 * num_tokens * site.num_features:
        raise msgspec.ValidationError(f"{site.site}: acts is not [T, F]")
    num_edits, rest = divmod(len(site.edit_tokens), 4)
    if (
        rest
        or len(site.edit_deltas) != 4 * num_edits * site.num_features
        or len(site.edit_doses) != 4 * num_edits
    ):
        raise msgspec.ValidationError(f"{site.site}: edits are not [E, F]")
    rows = np.frombuffer(site.edit_tokens, np.int32)
    if num_edits and not 0 <= rows.min() <= rows.max() < num_tokens:
        raise msgspec.ValidationError(f"{site.site}: edit_tokens are not rows of the frame")


def acts_TF(site: SiteActivations) -> npt.NDArray[np.float32]:
    """The site's activations as a read-only [T, F] view."""
    return np.frombuffer(site.acts, np.float32).reshape(-1, site.num_features)


def edits(
    site: SiteActivations,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The site's edits as read-only (tokens [E], deltas [E, F], doses [E])."""
    return (
        np.frombuffer(site.edit_tokens, np.int32),
        np.frombuffer(site.edit_deltas, np.float32).reshape(-1, site.num_features),
        np.frombuffer(site.edit_doses, np.float32),
    )
