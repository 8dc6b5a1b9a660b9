"""What admission writes on a request, and scheduler and workers read from it.

The stamp travels as bytes in ``SamplingParams.extra_args["steerscope"]``, the one
per-request field of vLLM that reaches every rank.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from steerscope.steering import segments
from steerscope.steering.interventions import Intervention, SteeringSpec, steering_digest
from steerscope.steering.rules import SteeringSource
from steerscope.steering.segments import Segment

STAMP_KEY = "steerscope"

ASKED = (SteeringSource.INLINE, SteeringSource.NAMED)


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """One request's identity and steering, decided once at admission."""

    external_id: str
    policy: str = ""
    digest: str = ""
    """Digest of the effective steering as asked; empty when unsteered."""
    interventions: tuple[Intervention, ...] = ()
    segments: tuple[Segment, ...] = ()
    max_dose: float | None = None
    changed_at: int = 0
    """The position from which the current steering holds; above 0 it was changed in flight."""
    num_past: int = 0
    """How many of ``interventions`` are past steering, which only earlier segments use."""
    source: SteeringSource = SteeringSource.NOTHING
    """What decided the current steering."""
    rule: str = ""
    """The binding's name, if one decided."""
    asked: str = ""
    """What the request itself asked for, a policy's name or ``inline``, if that was beaten."""
    traceparent: str = ""
    """The client's span, as ``steering.traceparent`` writes it, or empty."""
    is_awaited: bool = False
    """Whether a response waits for the request's report."""

    @property
    def current(self) -> tuple[Intervention, ...]:
        """The interventions in force, past steering left out."""
        return self.interventions[self.num_past :]

    def changed(
        self,
        position: int,
        policy: str,
        spec: SteeringSpec,
        catalog_digest: str,
        num_prompt_tokens: int,
        source: SteeringSource = SteeringSource.ORDERED,
    ) -> Stamp:
        """The stamp once ``spec`` holds from ``position`` on; no edits release the request."""
        edits, max_dose = spec.interventions, spec.max_dose
        after = segments.build(catalog_digest, edits, num_prompt_tokens, max_dose)
        return Stamp(
            self.external_id,
            policy,
            steering_digest(catalog_digest, edits, max_dose) if edits else "",
            (*self.interventions, *edits),
            segments.changed_from(self.segments, after, position, len(self.interventions)),
            max_dose,
            position,
            len(self.interventions),
            source,
            asked=self.policy if self.source in ASKED else self.asked,
            traceparent=self.traceparent,
            is_awaited=self.is_awaited,
        )


def encode(stamp: Stamp) -> bytes:
    """The stamp as MessagePack."""
    return msgspec.msgpack.encode(stamp)


@lru_cache(maxsize=4096)
def decode(payload: bytes) -> Stamp:
    """The stamp back; cached, since the scheduler asks once per KV block."""
    return msgspec.msgpack.decode(payload, type=Stamp)
