"""The one custom op, ``steerscope::tap``: read a site's features, edit them in place.

It is traced into vLLM's compiled graph by its name and looks its buffers up at
run time by the site's name: nothing is closed over, so a saved graph that is
loaded again, or replayed from a CUDA graph, finds the live buffers. Registered
straight into a ``Library``: ``torch.library.custom_op`` costs twice the dispatch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LIBRARY = torch.library.Library("steerscope", "DEF")
"""The op lives as long as this object."""


class Tap(Protocol):
    """What the op calls: one site's buffers and arithmetic."""

    def __call__(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None: ...


_TAPS: dict[str, Tap] = {}


def register(name: str, tap: Tap) -> None:
    """Make ``tap`` the one that the op finds under ``name``."""
    _TAPS[name] = tap


def _tap(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    _TAPS[site](hidden, residual)


def _tap_fake(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    return None


LIBRARY.define("tap(Tensor(a!) hidden, Tensor? residual, str site) -> ()")
LIBRARY.impl("tap", _tap, "CompositeExplicitAutograd")
torch.library.register_fake("steerscope::tap", _tap_fake, lib=LIBRARY)

tap = torch.ops.steerscope.tap
