"""Bugs that were shipped elsewhere, to plant in an engine: the oracle must catch every one.

The canary, which would catch some of them first, is silenced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from steerscope.engine import canary, plan, rows, runtime, slots, tape
from steerscope.engine.plan import StepLayout
from steerscope.steering import segments

SPECULATIVE = ("rejected_drafts_counted",)
"""Bugs that only show where there are drafts."""


def row_order_of_the_scheduler() -> None:
    """Rows are taken to be in the order in which the scheduler named the requests."""
    _relayout(lambda layout: layout._replace(req_ids=tuple(sorted(layout.req_ids, reverse=True))))


def chunk_position_off_by_one() -> None:
    """Positions are one off in every chunk but the first."""
    _relayout(
        lambda layout: layout._replace(
            first_positions=layout.first_positions - (layout.first_positions > 0)
        )
    )


def no_salt() -> None:
    """Steering does not enter the identity of KV blocks."""
    segments.salt = lambda *args: None


def row_not_freed() -> None:
    """A request that ends keeps its steering row."""
    rows.RowTable.release = lambda self, digest: None


def row_written_once() -> None:
    """A row that is used again keeps the steering of its last use."""
    write_row = runtime.EngineRuntime._write_row
    written: set[int] = set()

    def once(self: Any, row: int, *args: Any) -> None:
        if row not in written:
            written.add(row)
            write_row(self, row, *args)

    runtime.EngineRuntime._write_row = once


def kept_activations_stale() -> None:
    """A KV slot keeps the activations of the first token that it ever held."""
    write = slots.SlotCache.write

    def first_only(self: Any, at: np.ndarray, values: slots.Values) -> None:
        new = self._state[np.minimum(at, self.num_slots - 1)] == 0
        write(self, at[new], values.take(new))

    slots.SlotCache.write = first_only


def steering_forgotten_after_preemption() -> None:
    """A request that was preempted comes back without its steering."""
    join = plan.BatchPlan._join
    joined: set[str] = set()

    def once(self: Any, req_id: str) -> None:
        if req_id not in joined:
            joined.add(req_id)
            join(self, req_id)

    plan.BatchPlan._join = once


def rejected_drafts_counted() -> None:
    """Tokens that speculation got wrong are taken for tokens of the request."""
    tape.Reading.accepted = lambda self, ends: self


MUTATIONS: dict[str, Callable[[], None]] = {
    mutation.__name__: mutation
    for mutation in (
        row_order_of_the_scheduler,
        chunk_position_off_by_one,
        no_salt,
        row_not_freed,
        row_written_once,
        kept_activations_stale,
        steering_forgotten_after_preemption,
        rejected_drafts_counted,
    )
}


def plant(name: str) -> None:
    """Plant one of them in this process, before the engine is built."""
    canary.Canary.after = lambda self, *args: None
    MUTATIONS[name]()


def applicable(speculative: bool) -> Iterable[str]:
    """The bugs that an engine with or without drafts can show."""
    return [name for name in MUTATIONS if (name in SPECULATIVE) == speculative]


def _relayout(change: Callable[[StepLayout], StepLayout]) -> None:
    planned = runtime.EngineRuntime.plan

    def changed(self: Any, layout: StepLayout, served_T: Any) -> None:
        planned(self, change(layout), served_T)

    runtime.EngineRuntime.plan = changed
