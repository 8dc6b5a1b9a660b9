"""The wire between the hub and engine cores: steering changed while a request runs.

ZeroMQ ROUTER (hub) to DEALER (engine core) over ``ipc://<endpoint>/engines``; tagged msgspec
structs in MessagePack.

    engine core → hub   Present (every second), Applied, Declined, Holding
    hub → engine core   Order, Withdraw, Standing, Unwelcome
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from steerscope.steering.interventions import Intervention
from steerscope.steering.rules import OverrideMode

ORDERS_VERSION = 4


def engines_address(endpoint: str) -> str:
    """ZeroMQ address of the engines' socket in the endpoint folder."""
    return f"ipc://{endpoint}/engines"


class Present(msgspec.Struct, frozen=True, tag=True):
    """An engine core is there; repeated, also after a reconnect."""

    version: int
    catalog_digest: str
    engine: str
    pid: int


class Applied(msgspec.Struct, frozen=True, tag=True):
    """The order holds from ``position`` on; one message for each sequence of the request."""

    order_id: int
    request_id: str
    position: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    """The first token, counted from the prompt's first, that is steered so."""
    external_id: str


class Declined(msgspec.Struct, frozen=True, tag=True):
    """The order cannot be carried out for a sequence that is here."""

    order_id: int
    request_id: str
    reason: str


class Holding(msgspec.Struct, frozen=True, tag=True):
    """An order is here, and known before the next step is scheduled."""

    order_id: int
    num_running: int = 0
    """Sequences of its request that run here, and will answer; 0 for a standing order."""


class Order(msgspec.Struct, frozen=True, tag=True):
    """Steer a request anew from its next step on; without edits it is released.

    It waits ``ttl_seconds`` for a request that has not arrived.
    """

    order_id: int
    external_id: str
    policy: str
    interventions: tuple[Intervention, ...]
    max_dose: float | None
    ttl_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    over_bound: bool = False
    """Whether it may beat a binding."""


class Standing(msgspec.Struct, frozen=True, tag=True):
    """The override: it holds for every request from its next step on, until the next comes."""

    order_id: int
    mode: OverrideMode | None
    """None lifts it: requests stay as it left them."""
    policy: str = ""
    interventions: tuple[Intervention, ...] = ()
    max_dose: float | None = None


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """An order that still waits is void."""

    order_id: int


class Unwelcome(msgspec.Struct, frozen=True, tag=True):
    """The hub will not order anything of this engine (another version or catalog)."""

    reason: str


FromEngine = Present | Applied | Declined | Holding
ToEngine = Order | Withdraw | Standing | Unwelcome
