"""What the sites wrote, on the host: the very buffers on a CPU, copies in flight elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerscope.engine.taps import SiteTap


class SiteBuffers:
    """One site's values on the host, as numpy arrays that live as long as the engine.

    Attributes:
        acts: float32 [T_max, F].
        deltas: float32 [T_max, F].
        doses: float32 [T_max].
    """

    def __init__(self, tap: SiteTap) -> None:
        device = tap.acts_TF, tap.deltas_TF, tap.doses_T
        host = tuple(each if each.is_cpu else _pinned(each) for each in device)
        self._pairs = [(h, d) for h, d in zip(host, device, strict=True) if h is not d]
        self.acts, self.deltas, self.doses = (each.numpy() for each in host)

    def start(self, num_tokens: int, with_edits: bool) -> None:
        """Queue the copies behind the forward pass; nothing waits for them here."""
        for host, device in self._pairs if with_edits else self._pairs[:1]:
            host[:num_tokens].copy_(device[:num_tokens], non_blocking=True)


class Readback:
    """All sites' values. One step is in flight at a time: ``start``, ``wait``, read."""

    def __init__(self, taps: Sequence[SiteTap]) -> None:
        self.sites = [SiteBuffers(tap) for tap in taps]
        on_gpu = any(tap.acts_TF.is_cuda for tap in taps)
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def is_deferred(self) -> bool:
        """Whether the values are there only after ``wait``."""
        return self._event is not None

    def start(self, num_tokens: int, with_edits: bool) -> None:
        """The forward pass was launched: bring its values over."""
        for site in self.sites:
            site.start(num_tokens, with_edits)
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until they are there."""
        if self._event is not None:
            self._event.synchronize()


def _pinned(device: Tensor) -> Tensor:
    pinned = device.is_cuda
    return torch.zeros(device.shape, dtype=device.dtype, pin_memory=pinned)
