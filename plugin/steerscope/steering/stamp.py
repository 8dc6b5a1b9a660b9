"""What admission writes on a request, and scheduler and workers read from it.

The stamp travels as bytes in ``SamplingParams.extra_args["steerscope"]``, the one
per-request field of vLLM that reaches every rank.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from steerscope.steering.interventions import Intervention
from steerscope.steering.segments import Segment

STAMP_KEY = "steerscope"


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """One request's identity and steering, decided once at admission."""

    external_id: str
    policy: str = ""
    digest: str = ""
    """Digest of the effective steering as asked; empty when unsteered."""
    interventions: tuple[Intervention, ...] = ()
    segments: tuple[Segment, ...] = ()


def encode(stamp: Stamp) -> bytes:
    """The stamp as MessagePack."""
    return msgspec.msgpack.encode(stamp)


@lru_cache(maxsize=4096)
def decode(payload: bytes) -> Stamp:
    """The stamp back; cached, since the scheduler asks once per KV block."""
    return msgspec.msgpack.decode(payload, type=Stamp)
