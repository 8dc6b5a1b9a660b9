"""The custom ops.

``steerscope::tap`` reads a site's features and edits them in place; ``steerscope::write``
adds, at another place, what a tap does not write where it reads.

They are traced into vLLM's compiled graph by name and look their buffers up at
run time by the site's name: nothing is closed over, so a saved graph that is
loaded again, or replayed from a CUDA graph, finds the live buffers. Registered
straight into a ``Library``: ``torch.library.custom_op`` costs twice the dispatch.

``tap_cpu`` and ``write_cpu`` are the same without any Python: ``native.cpp`` implements them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

LIBRARY = torch.library.Library("steerscope", "DEF")
"""The op lives as long as this object."""


class Tap(Protocol):
    """What the ops call: one site's buffers and arithmetic."""

    def __call__(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None: ...

    def write(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None: ...

    def is_native_as(self, name: str) -> bool: ...


class Ops(NamedTuple):
    """Called as (hidden, residual or None, site's name)."""

    tap: Any
    write: Any


_TAPS: dict[str, Tap] = {}


def register(name: str, tap: Tap) -> Ops:
    """Make ``tap`` the one that the ops find under ``name``; those to call for it."""
    _TAPS[name] = tap
    return NATIVE if tap.is_native_as(name) else PYTHON


def _tap(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    _TAPS[site](hidden, residual)


def _write(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    _TAPS[site].write(hidden, residual)


def _fake(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    return None


for _name in ("tap", "write", "tap_cpu", "write_cpu"):
    LIBRARY.define(f"{_name}(Tensor(a!) hidden, Tensor? residual, str site) -> ()")
    torch.library.register_fake(f"steerscope::{_name}", _fake, lib=LIBRARY)
LIBRARY.impl("tap", _tap, "CompositeExplicitAutograd")
LIBRARY.impl("write", _write, "CompositeExplicitAutograd")

PYTHON = Ops(torch.ops.steerscope.tap, torch.ops.steerscope.write)
NATIVE = Ops(torch.ops.steerscope.tap_cpu, torch.ops.steerscope.write_cpu)
