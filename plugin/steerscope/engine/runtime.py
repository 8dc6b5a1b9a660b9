"""One worker's Steerscope: taps in the model, rows, plan and readout, in step order.

    plan(layout)      after the runner laid the batch out, before the forward
    finish(finished)  after the forward: read out, back to neutral

Shapes: T_max the most tokens a step can hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from steerscope.catalog.store import Catalog
from steerscope.engine import ops
from steerscope.engine.plan import BatchPlan, IntArray, RequestInfo, StepLayout
from steerscope.engine.readout import FrameSender, Readout, Source
from steerscope.engine.rows import RowTable
from steerscope.engine.taps import SiteTap, StepRows, TapHook
from steerscope.steering.stamp import Stamp

_EMPTY = StepLayout((), np.zeros(1, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the buffers are sized for."""

    max_num_tokens: int
    max_num_seqs: int
    max_rows_per_request: int


class EngineRuntime:
    """Built once per worker, right after the model is loaded and before it first runs.

    Args:
        layers: the decoder layers this worker holds, by layer index.
        lookup: internal request id to what the runner knows of the request.
        sender: None on a rank that edits but does not report: all tensor-parallel ranks see
            the same residual stream, the first of them tells of it.
        instance: tells engines in one process apart in the op's names.
    """

    def __init__(
        self,
        catalog: Catalog,
        layers: dict[int, nn.Module],
        capacity: Capacity,
        device: torch.device,
        lookup: Callable[[str], RequestInfo],
        source: Source,
        sender: FrameSender | None,
        instance: int = 0,
    ) -> None:
        num_rows = capacity.max_num_seqs * capacity.max_rows_per_request
        step_rows = StepRows(capacity.max_num_tokens, device)
        self._step_rows = step_rows
        self._sites = [
            SiteTap(catalog, key, step_rows, num_rows + 1, device)
            for key in catalog.sites
            if key.layer in layers
        ]
        for tap in self._sites:
            name = f"{tap.key}@{instance}"
            ops.register(name, tap)
            layers[tap.key.layer].register_forward_hook(TapHook(name))
        self._plan = BatchPlan(RowTable(num_rows), lookup, self._write_row)
        # A pipeline stage without a site has nothing to tell either.
        self._readout = (
            Readout(source, self._sites, sender, lookup) if sender and self._sites else None
        )
        self._layout = _EMPTY
        self._rows_T: IntArray = np.zeros(0, np.int64)

    def announce(self) -> None:
        """Tell the hub that this worker is there, so that its series exist from the start."""
        if self._readout is not None:
            self._readout.emit(_EMPTY, self._rows_T, ())

    def plan(self, layout: StepLayout) -> None:
        """Lay steering over the step's tokens; the forward may start."""
        began = time.perf_counter_ns()
        self._layout = layout
        self._rows_T = self._plan.rows(layout)
        self._step_rows.stage(self._rows_T)
        if self._readout is not None:
            self._readout.charge(time.perf_counter_ns() - began)

    def finish(self, finished: Sequence[str]) -> None:
        """Read the step out. ``finished`` are requests that ended before this step."""
        began = time.perf_counter_ns()
        layout, self._layout = self._layout, _EMPTY
        self._step_rows.clear()
        if self._readout is not None:
            if layout.req_ids or finished:
                self._readout.emit(layout, self._rows_T, finished)
            self._readout.charge(time.perf_counter_ns() - began)
        self._rows_T = self._rows_T[:0]

    def forget(self, finished: Sequence[str]) -> None:
        """Requests that ended give their rows back; called before the batch is planned."""
        if finished:
            self._plan.forget(finished)

    def abandon(self) -> None:
        """The step failed: nothing to read out, back to neutral."""
        self._layout = _EMPTY
        self._step_rows.clear()

    def _write_row(self, row: int, stamp: Stamp, active: tuple[int, ...]) -> None:
        edits = [stamp.interventions[i] for i in active]
        for site in self._sites:
            site.write_row(row, edits)
