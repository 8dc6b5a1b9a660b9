"""A small sparse autoencoder: trained with BatchTopK, exported as JumpReLU.

BatchTopK (arXiv 2412.06410) keeps the k * N largest activations of a batch of N tokens; the mean
of the smallest kept activation becomes the JumpReLU threshold. Shape letters: N tokens, D width,
K latents.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DictionarySettings:
    """How a dictionary is trained."""

    d_sae: int = 192
    k: int = 8
    num_steps: int = 1500
    batch_size: int = 1024
    learning_rate: float = 3e-3
    seed: int = 0


class Dictionary(NamedTuple):
    """A JumpReLU dictionary in the scale of the raw residual stream."""

    W_enc_DK: Tensor
    b_enc_K: Tensor
    W_dec_KD: Tensor
    b_dec_D: Tensor
    threshold: float
    unexplained: float
    """Fraction of the variance the dictionary leaves unexplained."""

    def folded_bias(self) -> Tensor:
        """Return the encoder bias [K] with the decoder bias folded in."""
        return self.b_enc_K - self.b_dec_D @ self.W_enc_DK

    def acts(self, resid_ND: Tensor) -> Tensor:
        """Return the latents' activations [N, K]."""
        pre_NK = resid_ND @ self.W_enc_DK + self.folded_bias()
        return torch.where(pre_NK > self.threshold, pre_NK, torch.zeros_like(pre_NK))


class _Parameters(torch.nn.Module):
    def __init__(self, width: int, d_sae: int) -> None:
        super().__init__()
        W_dec_KD = torch.nn.functional.normalize(torch.randn(d_sae, width), dim=1)
        self.W_dec_KD = torch.nn.Parameter(W_dec_KD)
        self.W_enc_DK = torch.nn.Parameter(W_dec_KD.t().clone())
        self.b_enc_K = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec_D = torch.nn.Parameter(torch.zeros(width))

    def pre(self, x_ND: Tensor) -> Tensor:
        return ((x_ND - self.b_dec_D) @ self.W_enc_DK + self.b_enc_K).relu()

    @torch.no_grad()
    def normalise(self) -> None:
        self.W_dec_KD.div_(self.W_dec_KD.norm(dim=1, keepdim=True))


def _batch_topk(pre_NK: Tensor, k: int) -> tuple[Tensor, float]:
    cut = torch.topk(pre_NK.flatten(), k * pre_NK.shape[0], sorted=False).values.min()
    return pre_NK * (pre_NK >= cut), float(cut.detach())


def train_dictionary(resid_ND: Tensor, settings: DictionarySettings) -> Dictionary:
    """Train a dictionary on residual streams; deterministic by seed."""
    torch.manual_seed(settings.seed)
    mean_D = resid_ND.mean(0)
    scale = float((resid_ND - mean_D).norm(dim=1).mean()) / resid_ND.shape[1] ** 0.5
    x_ND = (resid_ND - mean_D) / scale
    sae = _Parameters(resid_ND.shape[1], settings.d_sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
    cuts: list[float] = []
    for step in range(settings.num_steps):
        decay = min(1.0, 2.0 * (1 - step / settings.num_steps))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * decay
        batch_ND = x_ND[torch.randint(len(x_ND), (settings.batch_size,))]
        acts_NK, cut = _batch_topk(sae.pre(batch_ND), settings.k)
        loss = (acts_NK @ sae.W_dec_KD + sae.b_dec_D - batch_ND).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        sae.normalise()
        cuts.append(cut)
    threshold = sum(cuts[-200:]) / len(cuts[-200:])
    return _exported(sae, x_ND, mean_D, scale, threshold)


@torch.no_grad()
def _exported(
    sae: _Parameters, x_ND: Tensor, mean_D: Tensor, scale: float, threshold: float
) -> Dictionary:
    """Undo the input scaling; decoder rows stay unit vectors."""
    pre_NK = sae.pre(x_ND)
    acts_NK = pre_NK * (pre_NK > threshold)
    error_ND = acts_NK @ sae.W_dec_KD + sae.b_dec_D - x_ND
    unexplained = float(error_ND.square().sum() / (x_ND - x_ND.mean(0)).square().sum())
    return Dictionary(
        sae.W_enc_DK.detach().clone(),
        sae.b_enc_K.detach() * scale,
        sae.W_dec_KD.detach().clone(),
        sae.b_dec_D.detach() * scale + mean_D,
        threshold * scale,
        unexplained,
    )
