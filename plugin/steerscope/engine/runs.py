"""Decoding, told in runs: steps of the same requests, one token each, become one.

After a forward pass the caches hold nothing of ours, so it is calls that cost, and what is told
every tenth of a second is told soon enough. Shapes: K steps of R requests, F features, E of
the requests are steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from steerscope.engine.plan import IntArray, StepLayout
from steerscope.engine.slots import FloatArray, SiteValues, Values

MAX_RUN_STEPS = 1024
MAX_RUN_VALUES = 1 << 17
"""More at once would be felt in the one step that tells of them."""
MAX_STEP_VALUES = 1 << 14
"""A step that read more activations is told by itself: to put it aside would cost more."""


class ReadStep(NamedTuple):
    """A step as it was computed, before anything is told of it; or several of them as one."""

    layout: StepLayout
    values: Values
    read_ns: int
    """On the monotonic clock; of several, the first one's."""

    @property
    def num_tokens(self) -> int:
        """Of all requests."""
        return int(self.layout.query_start_loc[-1])

    @property
    def num_values(self) -> int:
        """Activations, of all sites."""
        return sum(site.acts.size for site in self.values.sites)

    @property
    def is_decode(self) -> bool:
        """Whether it is one token a request, and little was read."""
        is_decode = 0 < self.num_tokens == len(self.layout.req_ids)
        return is_decode and self.num_values <= MAX_STEP_VALUES

    def detached(self) -> ReadStep:
        """The step with values of its own: the buffers will be written again."""
        return self._replace(values=self.values.copied())

    def accepted(self, ends: Mapping[str, int]) -> ReadStep:
        """The step without the drafts that were rejected; ``ends`` as in ``StepNote``."""
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


class DecodeRun:
    """Steps that wait to be told as one."""

    def __init__(self) -> None:
        self._steps: list[ReadStep] = []
        self._max_steps = 0

    def __len__(self) -> int:
        return len(self._steps)

    def goes_on_with(self, step: ReadStep) -> bool:
        """Whether the step is of the same requests, in the same order and steered alike."""
        last = self._steps[-1]
        return (
            step.layout.req_ids == last.layout.req_ids
            and step.values.steered is last.values.steered
            and step.num_tokens == len(step.layout.req_ids)
            and len(self._steps) < self._max_steps
        )

    def append(self, step: ReadStep) -> None:
        """Keep a copy; it is the first, or goes on with those before."""
        if not self._steps:
            self._max_steps = min(MAX_RUN_STEPS, MAX_RUN_VALUES // max(step.num_values, 1))
        self._steps.append(step.detached())

    def take(self) -> list[ReadStep]:
        """What waited, as one step if tokens follow each other as they should."""
        steps, self._steps = self._steps, []
        if len(steps) < 2:
            return steps
        positions_KR = np.stack([step.layout.first_positions for step in steps])
        if (np.diff(positions_KR, axis=0) != 1).any():
            return steps
        return [_merged(steps)]


def _merged(steps: Sequence[ReadStep]) -> ReadStep:
    """Request by request, as if each had come in one piece of K tokens."""
    num_steps, (layout, values) = len(steps), (steps[0].layout, steps[0].values)
    starts = np.arange(len(layout.req_ids) + 1) * num_steps
    sites = [
        SiteValues(
            _by_request([each.acts for each in site]),
            _by_request([each.deltas for each in site]),
            _by_request([each.doses for each in site]),
        )
        for site in zip(*(step.values.sites for step in steps), strict=True)
    ]
    steered: IntArray = (values.steered[:, None] * num_steps + np.arange(num_steps)).ravel()
    merged = layout._replace(query_start_loc=starts)
    return ReadStep(merged, Values(steered, sites), steps[0].read_ns)


def _by_request(arrays: Sequence[FloatArray]) -> FloatArray:
    """[K][N, ...] to [N * K, ...]."""
    stacked = np.stack(arrays, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
