"""One worker's Steerscope: taps in the model, rows, plan and readout, in step order.

    begin(news)       what the scheduler says, before the runner lays the batch out
    plan(layout)      after the runner laid the batch out, before the forward
    finish()          after the forward: read out, back to neutral

Shapes: T_max the most tokens a step can hold.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerscope.catalog.store import Catalog
from steerscope.engine import loops, ops, tape, wiring
from steerscope.engine.canary import Canary
from steerscope.engine.plan import EMPTY_LAYOUT, BatchPlan, IntArray, StepLayout, positions
from steerscope.engine.readout import Readout, Source
from steerscope.engine.roster import NOTHING, Arrival, MoreBlocks, Roster
from steerscope.engine.rows import RowTable
from steerscope.engine.scheduling import StepNote
from steerscope.engine.sender import FrameSender
from steerscope.engine.slots import KvGeometry, SlotCache
from steerscope.engine.tape import Tape
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.steering import stamp as stamps
from steerscope.steering.segments import Segment
from steerscope.steering.stamp import Stamp


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the buffers are sized for."""

    max_num_tokens: int
    max_num_seqs: int
    max_rows_per_request: int
    max_cache_bytes: int
    """Host memory for activations kept beside the KV cache; 0 keeps none."""


class StepNews(NamedTuple):
    """A step's scheduler output, in our terms."""

    ended: Sequence[str]
    arrivals: Sequence[Arrival]
    more_blocks: Sequence[MoreBlocks]
    foreign_blocks: Sequence[int]
    """Blocks that vLLM fills by other means than a forward pass."""
    note: StepNote

    @property
    def has_changes(self) -> bool:
        """Whether what is known of requests changes, but for blocks that they get as they grow."""
        return bool(
            self.ended
            or self.arrivals
            or self.foreign_blocks
            or self.note.stamps
            or any(more.anew or more.external != NOTHING for more in self.more_blocks)
        )


class EngineRuntime:
    """Built once per worker, right after the model is loaded and before it first runs.

    Args:
        layers: the decoder layers this worker holds, by layer index.
        sender: None on a rank that edits but does not report: all tensor-parallel ranks see
            the same residual stream, the first of them tells of it.
        kv_geometry: asked once, at the first step; None where no group of KV blocks holds
            every token.
        speculative: whether steps hold drafts.
        instance: tells engines in one process apart in the op's names.
    """

    def __init__(
        self,
        catalog: Catalog,
        layers: dict[int, nn.Module],
        capacity: Capacity,
        device: torch.device,
        source: Source,
        sender: FrameSender | None,
        kv_geometry: Callable[[], KvGeometry | None],
        speculative: bool = False,
        instance: int = 0,
    ) -> None:
        loops.start()
        num_rows = capacity.max_num_seqs * capacity.max_rows_per_request
        self._capacity = capacity
        self._ask_kv_geometry = kv_geometry
        self._speculative = speculative
        keys = [key for key in catalog.sites if key.layer in layers]
        max_waiting = tape.max_waiting(sum(len(catalog.sites[key]) for key in keys))
        self._step_rows = StepRows(capacity.max_num_tokens, device, max_waiting=max_waiting)
        self._sites = [SiteTap(catalog, key, self._step_rows, num_rows + 1, device) for key in keys]
        for tap in self._sites:
            _attach(layers[tap.key.layer], tap, f"{tap.key}@{instance}")
        self.roster = Roster()
        self._plan = BatchPlan(RowTable(num_rows), self.roster.info, self._write_row)
        # A pipeline stage without a site has nothing to tell either.
        self._readout = (
            Readout(
                source,
                self._sites,
                Tape(self._sites, self._step_rows, capacity.max_num_tokens),
                sender,
                self.roster,
            )
            if sender and self._sites
            else None
        )
        self._canary = Canary(self._sites)
        self._kept: SlotCache | None = None
        self.is_in_step = False
        """Between ``begin`` and ``finish``; what runs outside is no step of the scheduler's."""
        self._served_T: Tensor | None = None
        self._layout = EMPTY_LAYOUT
        self._goes_on = False
        """Whether the step is the next token of each of the last one's requests."""

    def announce(self) -> None:
        """Tell the hub that this worker is there, so that its series exist from the start."""
        if self._readout is not None:
            self._readout.flush()

    @functools.cached_property
    def kv_geometry(self) -> KvGeometry | None:
        """The KV cache as it is laid out; asked for by the first step, when it is there."""
        geometry = self._ask_kv_geometry()
        if geometry is not None and self._readout is not None:
            widths = tuple(len(tap.features) for tap in self._sites)
            num_slots = geometry.num_blocks * geometry.block_size
            self._kept = SlotCache(widths, num_slots, self._capacity.max_cache_bytes)
            self._readout.keep(self._kept, geometry.block_size)
        return geometry

    def begin(self, news: StepNews) -> None:
        """Follow the scheduler: who ended, who came, what changed. Before the batch is laid out."""
        began = time.perf_counter_ns()
        self.is_in_step = True
        note = news.note
        if self._readout is not None:
            self._readout.release(note.computed | note.ended if self._speculative else {})
        if not news.has_changes:
            self.roster.extend(news.more_blocks)
        else:
            self._follow(news)
        if self._readout is not None:
            self._readout.charge(time.perf_counter_ns() - began)

    def plan(self, layout: StepLayout, served_T: Tensor | None) -> None:
        """Lay steering over the step's tokens; the forward may start.

        ``served_T``: the positions that the runner itself computed, at least [T], or None.
        """
        began = time.perf_counter_ns()
        self._goes_on = not self._speculative and self._plan.goes_on(layout)
        if self._goes_on:
            self._step_rows.stage(self._plan.last_rows)
        else:
            self._layout = layout.settled()
            self._step_rows.stage(self._plan.rows(self._layout))
            if self._readout is not None:
                self._readout.meet(self._layout)
        if self._canary:
            self._served_T = served_T
            self._canary.before(int(self._layout_now.query_start_loc[-1]))
        if self._readout is not None:
            self._readout.charge(time.perf_counter_ns() - began)

    def finish(self) -> None:
        """Read the step out."""
        began = time.perf_counter_ns()
        self.is_in_step = False
        if self._canary and self._layout_now.req_ids:
            self._canary.after(positions(self._layout_now), self._served_T)
        steered_E = self._step_rows.steered_E
        self._step_rows.clear()
        if self._readout is not None:
            if self._goes_on:
                self._readout.extend(self._plan, steered_E)
            else:
                self._read_out(self._readout, self._layout, steered_E)
            self._readout.charge(time.perf_counter_ns() - began)
        self._goes_on, self._layout = False, EMPTY_LAYOUT

    def abandon(self) -> None:
        """The step failed: nothing to read out, back to neutral."""
        self.is_in_step = self._goes_on = False
        self._layout = EMPTY_LAYOUT
        self._plan.break_off()
        self._step_rows.clear()

    @property
    def _layout_now(self) -> StepLayout:
        return self._plan.last if self._goes_on else self._layout

    def _follow(self, news: StepNews) -> None:
        """Requests ended or came, or are not what they were."""
        note = news.note
        if self._readout is not None:
            if self._moves_blocks(news):
                self._readout.settle()
            self._readout.end({req_id: note.ended.get(req_id, 0) for req_id in news.ended})
        self._plan.forget(news.ended)
        self.roster.leave(news.ended)
        if self._readout is None:
            self.roster.recycle()
        self.roster.arrive(news.arrivals)
        self.roster.extend(news.more_blocks)
        for req_id, payload in note.stamps.items():
            self._restamp(req_id, stamps.decode(payload))
        if self._kept is not None and self.kv_geometry is not None:
            self._void(self._kept, news, self.kv_geometry.block_size)

    def _moves_blocks(self, news: StepNews) -> bool:
        """Whether a known request's tokens are elsewhere now, or KV is filled by other means."""
        others = any(more.anew or more.external != NOTHING for more in news.more_blocks)
        return bool(news.foreign_blocks or others) or any(
            arrival.req_id in self.roster or arrival.external != NOTHING
            for arrival in news.arrivals
        )

    def _read_out(self, readout: Readout, layout: StepLayout, steered_E: IntArray) -> None:
        if layout.req_ids and self._speculative:
            readout.hold(layout, steered_E)
        elif layout.req_ids:
            readout.emit(layout, steered_E)
        elif readout.has_news:
            readout.flush()

    def _void(self, kept: SlotCache, news: StepNews, block_size: int) -> None:
        """Forget what is kept of KV that no step of ours wrote."""
        kept.forget_blocks(news.foreign_blocks, block_size)
        for req_id, external in (
            *((a.req_id, a.external) for a in news.arrivals),
            *((m.req_id, m.external) for m in news.more_blocks),
        ):
            if external != NOTHING:
                slots = self.roster.leading_slots(req_id, external[1], block_size)
                kept.mark_foreign(slots[external[0] :])

    def _restamp(self, req_id: str, stamp: Stamp) -> None:
        self.roster.restamp(req_id, stamp)
        self._plan.restamp(req_id)
        if self._readout is not None:
            self._readout.change(req_id, stamp.changed_at, stamp)

    def _write_row(self, row: int, stamp: Stamp, segment: Segment) -> None:
        edits = [stamp.interventions[i] for i in segment.active]
        for site in self._sites:
            site.write_row(row, edits, segment.max_dose)


def _attach(layer: nn.Module, tap: SiteTap, name: str) -> None:
    """Put the tap's ops into the layer's forward pass. Its write comes before other taps there."""
    call = ops.register(name, tap)
    wiring.attach(layer, tap.key.site, functools.partial(call.tap, site=name))
    if tap.writes is not None:
        wiring.attach(layer, tap.writes, functools.partial(call.write, site=name))
