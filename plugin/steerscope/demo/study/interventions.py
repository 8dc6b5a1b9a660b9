"""The steering math for a plain Transformers model: the server's yardstick.

pre = x @ W_enc + b_enc; f = act(pre); f' = clip(scale * f + add, low, high) x += (f' - f) * gate
* W_dec

Every edit at a site reads the same unedited x. Shape letters: B prompts, L tokens, D width, K
latents of a TopK dictionary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["prompt", "generation", "all"]


class Activation(Enum):
    """How a feature's pre-activation becomes its activation."""

    RELU = "relu"
    JUMPRELU = "jumprelu"
    IDENTITY = "identity"
    TOPK = "topk"


@dataclass(frozen=True, slots=True, eq=False)
class Rivals:
    """A TopK dictionary: a latent is active where it is among the k largest of all K."""

    name: str
    W_enc_KD: Tensor
    b_enc_K: Tensor
    k: int

    def acts(self, resid_BLD: Tensor, latent: int) -> Tensor:
        """Return one latent's activations [B, L]."""
        pre_BLK = resid_BLD.float() @ self.W_enc_KD.T + self.b_enc_K
        least_BL = pre_BLK.topk(self.k, -1, sorted=False).values.amin(-1)
        pre_BL = pre_BLK[..., latent]
        return torch.where(pre_BL >= least_BL, pre_BL.clamp(min=0.0), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """One resid_post feature; W_enc and W_dec are float32 [D], W_dec None when read-only.

    A topk feature is a latent of a dictionary of rivals; any other has none.
    """

    name: str
    layer: int
    W_enc: Tensor
    b_enc: float
    activation: Activation
    threshold: float = 0.0
    W_dec: Tensor | None = None
    rivals: Rivals | None = None
    latent: int = 0

    def acts(self, resid_BLD: Tensor) -> Tensor:
        """Return the activations [B, L] of a residual stream."""
        if self.rivals is not None:
            return self.rivals.acts(resid_BLD, self.latent)
        pre_BL = resid_BLD.float() @ self.W_enc + self.b_enc
        if self.activation is Activation.IDENTITY:
            return pre_BL
        if self.activation is Activation.RELU:
            return pre_BL.clamp(min=0.0)
        return torch.where(pre_BL > self.threshold, pre_BL, torch.zeros_like(pre_BL))


@dataclass(frozen=True, slots=True)
class When:
    """A gate on another feature of the same site, at the same token."""

    feature: Feature
    above: float

    def gate(self, resid_BLD: Tensor) -> Tensor:
        """Return True [B, L] where the gate holds."""
        return self.feature.acts(resid_BLD) > self.above


@dataclass(frozen=True, slots=True)
class Intervention:
    """One edit: f' = clip(scale * f + add, low, high), where the gates hold, in one phase."""

    feature: Feature
    scale: float = 1.0
    add: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    only_if_active: bool = False
    when: When | None = None
    phase: Phase = "all"

    def delta(self, resid_BLD: Tensor) -> Tensor:
        """Return what this edit adds to an unedited residual stream."""
        acts_BL = self.feature.acts(resid_BLD)
        wanted_BL = (self.scale * acts_BL + self.add).clamp(self.low, self.high)
        gate_BL = torch.ones_like(acts_BL, dtype=torch.bool)
        if self.only_if_active:
            gate_BL &= acts_BL > 0
        if self.when is not None:
            gate_BL &= self.when.gate(resid_BLD)
        assert self.feature.W_dec is not None, f"{self.feature.name} is read-only"
        return ((wanted_BL - acts_BL) * gate_BL)[..., None] * self.feature.W_dec


def clamp(
    feature: Feature, value: float, *, only_if_active: bool = False, when: When | None = None
) -> Intervention:
    """Set a feature to a value on the prompt's tokens where the gate holds."""
    return Intervention(
        feature, low=value, high=value, only_if_active=only_if_active, when=when, phase="prompt"
    )


def edited(
    resid_BLD: Tensor, layer: int, interventions: Sequence[Intervention], phase: Phase
) -> Tensor:
    """Apply every intervention of this layer and phase to the same unedited residual stream."""
    applied = [i for i in interventions if i.feature.layer == layer and i.phase in (phase, "all")]
    if not applied:
        return resid_BLD
    return resid_BLD + torch.stack([i.delta(resid_BLD) for i in applied]).sum(0)
