"""The custom ops.

``steerscope::tap`` reads a site's features and edits them in place; ``steerscope::write``
adds, at another place, what a tap does not write where it reads.

They are traced into vLLM's compiled graph by name and look their buffers up at
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
    """What the ops call: one site's buffers and arithmetic."""

    def __call__(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None: ...

    def write(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None: ...


_TAPS: dict[str, Tap] = {}


def register(name: str, tap: Tap) -> None:
    """Make ``tap`` the one that the op finds under ``name``."""
    _TAPS[name] = tap


def _tap(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    _TAPS[site](hidden, residual)


def _write(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    _TAPS[site].write(hidden, residual)


def _fake(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    return None


for _name, _implementation in (("tap", _tap), ("write", _write)):
    LIBRARY.define(f"{_name}(Tensor(a!) hidden, Tensor? residual, str site) -> ()")
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"steerscope::{_name}", _fake, lib=LIBRARY)

tap = torch.ops.steerscope.tap
write = torch.ops.steerscope.write
