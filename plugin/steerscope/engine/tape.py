"""What the sites read and changed, on the host, step after step until it is told and rewound.

On a CPU the tape is the sites' own buffers: each step is written behind those that wait, and
nothing is copied until they are told. Elsewhere each step's values are fetched behind its forward
pass.

Shapes: N rows of the tape, T tokens, R requests, F features of a site, E tokens that are steered.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerscope.engine import loops
from steerscope.engine.plan import IntArray, StepLayout
from steerscope.engine.roster import Steps
from steerscope.engine.slots import SiteValues, Values
from steerscope.engine.taps import NO_TOKENS, SiteTap, StepRows

MAX_WAITING_VALUES = 1 << 17
"""Activations that may wait: more at once would be felt in the one step that tells of them."""
MAX_WAITING_ROWS = 1 << 12


def max_waiting(num_features: int) -> int:
    """Rows of a tape whose sites have so many features in all that may wait to be told."""
    return min(MAX_WAITING_ROWS, MAX_WAITING_VALUES // max(num_features, 1))


def max_frame_bytes(num_features: int, num_sites: int, max_num_tokens: int) -> int:
    """What activations, changes and doses of all that may wait, and a step more, can take."""
    num_tokens = max_waiting(num_features) + max_num_tokens
    return num_tokens * (8 * num_features + 4 * num_sites)


@dataclass(slots=True)
class ReadStep:
    """A step whose values are on the tape; or several, in which the same requests decode."""

    layout: StepLayout
    """Of the first of them."""
    num_each: int
    """Tokens of one step."""
    steered: IntArray
    """Those of them that are steered."""
    row: int
    rows_R: IntArray
    """Of its requests in the roster."""
    read_ns: int
    """On the monotonic clock; of several, the first one's."""
    num_steps: int = 1
    """Each has one token of every request, at the position after the one before."""

    @property
    def num_tokens(self) -> int:
        """Of all steps."""
        return self.num_steps * self.num_each

    @property
    def steered_T(self) -> IntArray:
        """The steered tokens of all steps."""
        if self.num_steps == 1 or not self.steered.size:
            return self.steered
        starts = np.arange(self.num_steps) * self.num_each
        tokens: IntArray = (starts[:, None] + self.steered).ravel()
        return tokens


class Reading(NamedTuple):
    """What there is to tell of a step; of several as one, each request's tokens in one piece."""

    layout: StepLayout
    values: Values
    read_ns: int

    @property
    def num_tokens(self) -> int:
        """Of all requests."""
        return int(self.layout.query_start_loc[-1])

    def accepted(self, ends: Mapping[str, int]) -> Reading:
        """Without the drafts that were rejected; ``ends`` as in ``StepNote``."""
        layout = self.layout
        lengths = np.diff(layout.query_start_loc)
        ends_R = np.array([ends.get(r, np.iinfo(np.int64).max) for r in layout.req_ids])
        kept_R = np.clip(ends_R - layout.first_positions, 0, lengths)
        if (kept_R == lengths).all():
            return self
        offsets_T = np.arange(lengths.sum()) - np.repeat(layout.query_start_loc[:-1], lengths)
        kept_T = offsets_T < np.repeat(kept_R, lengths)
        return self._replace(
            layout=layout._replace(query_start_loc=np.concatenate([[0], np.cumsum(kept_R)])),
            values=self.values.take(kept_T),
        )


class _SiteTape:
    """One site's values, as numpy arrays that live as long as the engine.

    Attributes:
        acts: float32 [N, F].
        deltas: float32 [N, F].
        doses: float32 [N].
    """

    def __init__(self, tap: SiteTap, num_rows: int) -> None:
        device = tap.acts_TF, tap.deltas_TF, tap.doses_T
        host = tuple(each if each.is_cpu else _pinned(each, num_rows) for each in device)
        self._pairs = [(h, d) for h, d in zip(host, device, strict=True) if h is not d]
        self.acts, self.deltas, self.doses = (each.numpy() for each in host)
        self._no_edits = self.deltas[:0], self.doses[:0]

    def fetch(self, row: int, num_tokens: int, with_edits: bool) -> None:
        """Queue the copies behind the forward pass; nothing waits for them here."""
        for host, device in self._pairs if with_edits else self._pairs[:1]:
            host[row : row + num_tokens].copy_(device[:num_tokens], non_blocking=True)

    def read(self, rows: slice | IntArray, steered: IntArray) -> SiteValues:
        """Of those rows, ``steered`` of which are steered. Views of the tape where they can be."""
        acts = self.acts[rows]
        if not steered.size:
            return SiteValues(acts, *self._no_edits)
        deltas, doses = self.deltas[rows], self.doses[rows]
        if len(steered) < len(acts):
            deltas, doses = deltas[steered], doses[steered]
        return SiteValues(acts, deltas, doses)


class Tape:
    """All sites' values. It tells the sites where the next step's are to be written."""

    def __init__(self, taps: Sequence[SiteTap], step: StepRows, max_num_tokens: int) -> None:
        self._row = 0
        self._native = step.native
        self._max_waiting = step.max_waiting
        num_rows = max_num_tokens + step.max_waiting
        self._stack: tuple[slice, Steps] | None = None
        """Rows of the tape, and the steps that are there."""
        self._sites = [_SiteTape(tap, num_rows) for tap in taps]
        on_gpu = any(tap.acts_TF.is_cuda for tap in taps)
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def is_deferred(self) -> bool:
        """Whether values are there only after ``wait``."""
        return self._event is not None

    @property
    def is_full(self) -> bool:
        """Whether what waits must be told before the next step."""
        return self._row > self._max_waiting

    def add(self, layout: StepLayout, rows_R: IntArray, steered: IntArray) -> ReadStep:
        """The forward pass was launched: the step, whose values are on the tape, or will be.

        ``rows_R``: its requests' in the roster.
        """
        num_tokens = int(layout.query_start_loc[-1])
        row = self._advance(num_tokens, steered)
        return ReadStep(layout, num_tokens, steered, row, rows_R, time.monotonic_ns())

    def add_to(self, step: ReadStep, steered: IntArray) -> None:
        """The same as ``add`` of a step that goes on from the newest one, steered alike."""
        self._advance(step.num_each, steered)
        step.num_steps += 1

    def rewind(self) -> None:
        """All was told: the next step goes where the first one went."""
        self._row = self._native.first_row = 0
        self._stack = None

    def wait(self) -> None:
        """Until all values are there."""
        if self._event is not None:
            self._event.synchronize()

    def requests(self, steps: Sequence[ReadStep]) -> Steps:
        """Who has which tokens in steps that follow each other."""
        rows = _rows(steps)
        if self._stack is None or self._stack[0] != rows:
            self._stack = rows, _stacked(steps)
        return self._stack[1]

    def values(self, steps: Sequence[ReadStep]) -> Values:
        """Of steps that follow each other, in the order of the tape.

        They hold until it is rewound and written again.
        """
        rows = _rows(steps)
        steered = [s.steered_T + (s.row - rows.start) for s in steps if s.steered.size]
        return self._values(rows, np.concatenate(steered) if steered else NO_TOKENS)

    def read(self, step: ReadStep) -> Reading:
        """One step alone."""
        return Reading(step.layout, self.values([step]), step.read_ns)

    def readings(self, steps: Sequence[ReadStep]) -> list[Reading]:
        """What there is to tell of steps that follow each other on the tape.

        Of all as one, but where a request's tokens do not follow each other.
        """
        if len(steps) == 1 and steps[0].num_steps == 1:
            return [self.read(steps[0])]
        merged = self._merged(steps) if steps else None
        if merged is not None:
            return [merged]
        return [reading for step in steps for reading in self.readings([step])]

    def _merged(self, steps: Sequence[ReadStep]) -> Reading | None:
        requests, num_tokens = self.requests(steps), sum(step.num_tokens for step in steps)
        order_T, first_P = np.empty(num_tokens, np.int64), np.empty_like(requests.rows_P)
        starts_P = np.empty(len(first_P) + 1, np.int64)
        num_requests = loops.compiled().merge(*requests, first_P, starts_P, order_T)
        if num_requests < 0:
            return None
        ids = [req_id for step in steps for req_id in step.layout.req_ids]
        first_R = first_P[:num_requests]
        layout = StepLayout(
            tuple(ids[p] for p in first_R.tolist()),
            starts_P[: num_requests + 1],
            requests.positions_P[first_R],
        )
        first_row, at_E = steps[0].row, NO_TOKENS
        if any(step.steered.size for step in steps):
            is_steered_T = np.zeros(num_tokens, np.bool_)
            for step in steps:
                is_steered_T[step.steered_T + (step.row - first_row)] = True
            at_E = np.flatnonzero(is_steered_T[order_T])
        return Reading(layout, self._values(first_row + order_T, at_E), steps[0].read_ns)

    def _advance(self, num_tokens: int, steered: IntArray) -> int:
        row = self._row
        self._row = self._native.first_row = row + num_tokens
        if self._event is not None:
            for site in self._sites:
                site.fetch(row, num_tokens, bool(steered.size))
            self._event.record()
        return row

    def _values(self, rows: slice | IntArray, steered: IntArray) -> Values:
        return Values(steered, [site.read(rows, steered) for site in self._sites])


def _rows(steps: Sequence[ReadStep]) -> slice:
    """Where steps that follow each other are on the tape."""
    return slice(steps[0].row, steps[-1].row + steps[-1].num_tokens)


def _stacked(steps: Sequence[ReadStep]) -> Steps:
    """One after the other: done once for all that wait, since each call of numpy's costs."""
    starts = [step.layout.query_start_loc for step in steps]
    return Steps(
        np.array([len(step.rows_R) for step in steps]),
        np.array([step.num_steps for step in steps]),
        np.concatenate([step.rows_R for step in steps]),
        np.concatenate([each[1:] - each[:-1] for each in starts]),
        np.concatenate([step.layout.first_positions for step in steps]),
    )


def _pinned(device: Tensor, num_rows: int) -> Tensor:
    shape = (num_rows, *device.shape[1:])
    return torch.zeros(shape, dtype=device.dtype, pin_memory=device.is_cuda)
