"""The wire between front ends (API servers, ``LLM``) and the hub, both ways.

ZeroMQ DEALER (front end) to ROUTER (hub) over ``ipc://<endpoint>/control``;
frames travel apart, PUSH (worker) to PULL (hub) over ``ipc://<endpoint>/frames``.
Messages are tagged msgspec structs in MessagePack.

    front end → hub   Hello, Ack, Admitted, Recalled, Rejected, Question, Goodbye
    hub → front end   Policies (whenever they change, and in answer to Hello), Answer, Refused
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from steerscope.steering.interventions import Policy
from steerscope.steering.rules import Rules

PROTOCOL_VERSION = 2


def control_address(endpoint: str) -> str:
    """ZeroMQ address of the control socket in the endpoint folder."""
    return f"ipc://{endpoint}/control"


def frames_address(endpoint: str) -> str:
    """ZeroMQ address of the frames socket in the endpoint folder."""
    return f"ipc://{endpoint}/frames"


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a front end; repeated until answered, and after a reconnect."""

    version: int
    catalog_digest: str
    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]


class Ack(msgspec.Struct, frozen=True, tag=True):
    """The front end now enforces the policies of ``revision``."""

    revision: int


class Admitted(msgspec.Struct, frozen=True, tag=True):
    """A request with steering was admitted under ``policy`` (or ``inline``).

    Where rules decided, ``asked`` is what the request had asked for itself, if anything, and
    ``policy`` and ``digest`` are empty if they decided that it is not steered.
    """

    external_id: str
    policy: str
    digest: str
    asked: str = ""


class Recalled(msgspec.Struct, frozen=True, tag=True):
    """What an earlier hub, which is gone, was told of requests admitted: for each its digest."""

    digests: dict[str, str]


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """A request was refused; ``policy`` only when it names a known one, else ``unknown``."""

    external_id: str
    policy: str
    field: str
    reason: str


class ReportAsked(msgspec.Struct, frozen=True, tag=True):
    """A request's report as JSON, once the request has ended or ``wait_seconds`` are over."""

    external_id: str
    wait_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)]
    activations: bool
    """Whether every token's activations are wanted."""


class MetricsAsked(msgspec.Struct, frozen=True, tag=True):
    """The metrics page, in a format that the HTTP header ``accept`` names."""

    accept: str


class Question(msgspec.Struct, frozen=True, tag=True):
    """Something that the front end puts into an HTTP response; answered with ``number``."""

    number: int
    what: ReportAsked | MetricsAsked


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The front end is shutting down; no Ack is owed any more."""


class Policies(msgspec.Struct, frozen=True, tag=True):
    """Every policy in force, at ``revision``, and the rules.

    ``expire_times`` are microseconds since 1970, of those policies that end by themselves: a
    front end sees to it also while the hub is dead. ``rules`` are None while the hub does not
    know them (its state store is away): a front end then keeps those it has.
    """

    revision: int
    policies: tuple[Policy, ...]
    expire_times: dict[str, int] = {}
    rules: Rules | None = None


class Answer(msgspec.Struct, frozen=True, tag=True):
    """To a ``Question``."""

    number: int
    body: bytes | None
    """None where there is nothing to tell."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The hub will not serve this front end (another version or catalog)."""

    reason: str


FromFrontend = Hello | Ack | Admitted | Recalled | Rejected | Question | Goodbye
FromHub = Policies | Answer | Refused
