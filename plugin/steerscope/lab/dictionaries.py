"""A small sparse autoencoder: trained with BatchTopK, exported as JumpReLU, kept as SAELens does.

BatchTopK (arXiv 2412.06410) keeps the k * N largest activations of a batch of N tokens; the mean
of the smallest kept activation becomes the JumpReLU threshold. Shape letters: N tokens, D width,
K latents.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor

from steerscope import __version__
from steerscope.catalog.model import Site
from steerscope.catalog.tensors import TensorFile
from steerscope.errors import LabError

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.0"
"""Whose layout is written; SAELens reads a folder that names none as one from before 6.0."""

MAX_BLOCK_ELEMENTS = 1 << 28
"""Activations held at a time while a dictionary is measured: 1 GiB."""


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


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a dictionary does on streams."""

    unexplained: float
    """Fraction of their variance left unexplained."""
    l0: float
    """Active latents of a token, on average."""
    num_dead: int
    """Latents that no token activates."""
    num_tokens: int


class _Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What we tell of a dictionary."""

    unexplained_in_training: float
    settings: DictionarySettings | None = None
    quality: Quality | None = None
    version: str = __version__


class _Processing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Streams are the model's own: TransformerLens must not process its weights."""

    fold_ln: bool = False
    center_writing_weights: bool = False


class _Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """SAELens' metadata; it takes keys it does not know."""

    model_name: str
    hook_name: str
    steerscope: _Told
    sae_lens_version: str = SAELENS_VERSION
    training_architecture: Literal["batchtopk"] = "batchtopk"
    model_from_pretrained_kwargs: _Processing = _Processing()


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``cfg.json`` of a ``JumpReLUSAEConfig``."""

    d_in: int
    d_sae: int
    metadata: _Metadata
    architecture: Literal["jumprelu"] = "jumprelu"
    dtype: Literal["float32"] = "float32"
    device: Literal["cpu"] = "cpu"
    apply_b_dec_to_input: bool = True
    normalize_activations: Literal["none"] = "none"
    reshape_activations: Literal["none"] = "none"


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


def train(resid_ND: Tensor, settings: DictionarySettings) -> Dictionary:
    """Train a dictionary on streams; deterministic by seed. ``LabError`` if it cannot be."""
    _check(resid_ND, settings)
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


def _check(resid_ND: Tensor, settings: DictionarySettings) -> None:
    if resid_ND.dim() != 2 or resid_ND.dtype != torch.float32:
        raise LabError(f"streams are {resid_ND.dtype} {list(resid_ND.shape)}, not float32 [N, D]")
    if not 1 <= settings.k <= settings.d_sae:
        raise LabError(f"k is {settings.k}, expected 1 to d_sae ({settings.d_sae})")
    if min(settings.num_steps, settings.batch_size) < 1:
        raise LabError("num_steps and batch_size must be at least 1")
    if not bool(torch.isfinite(resid_ND).all()):
        raise LabError("the streams hold NaN or infinite values")
    if len(resid_ND) < 2 or bool((resid_ND == resid_ND[0]).all()):
        raise LabError("all streams are the same: there is nothing to learn")


@torch.no_grad()
def _exported(
    sae: _Parameters, x_ND: Tensor, mean_D: Tensor, scale: float, threshold: float
) -> Dictionary:
    """Undo the input scaling; decoder rows stay unit vectors."""
    error = torch.zeros(())
    for block_ND in _blocks(x_ND, sae.b_enc_K.numel()):
        pre_NK = sae.pre(block_ND)
        acts_NK = pre_NK * (pre_NK > threshold)
        error += (acts_NK @ sae.W_dec_KD + sae.b_dec_D - block_ND).square().sum()
    return Dictionary(
        sae.W_enc_DK.detach().clone(),
        sae.b_enc_K.detach() * scale,
        sae.W_dec_KD.detach().clone(),
        sae.b_dec_D.detach() * scale + mean_D,
        threshold * scale,
        float(error / (x_ND - x_ND.mean(0)).square().sum()),
    )


def _blocks(x_ND: Tensor, d_sae: int) -> tuple[Tensor, ...]:
    return torch.split(x_ND, max(MAX_BLOCK_ELEMENTS // d_sae, 1))


@torch.no_grad()
def measure(dictionary: Dictionary, resid_ND: Tensor) -> Quality:
    """Reconstruct streams, best ones that it was not trained on."""
    variance = float((resid_ND - resid_ND.mean(0)).square().sum())
    if variance == 0:
        raise LabError("the streams to measure on are all the same")
    error, num_active = 0.0, 0
    alive_K = torch.zeros(len(dictionary.b_enc_K), dtype=torch.bool)
    for block_ND in _blocks(resid_ND, len(alive_K)):
        acts_NK = dictionary.acts(block_ND)
        rebuilt_ND = acts_NK @ dictionary.W_dec_KD + dictionary.b_dec_D
        error += float((rebuilt_ND - block_ND).square().sum())
        num_active += int((acts_NK > 0).sum())
        alive_K |= (acts_NK > 0).any(0)
    num_dead = len(alive_K) - int(alive_K.sum())
    return Quality(error / variance, num_active / len(resid_ND), num_dead, len(resid_ND))


def save_saelens(
    dictionary: Dictionary,
    folder: Path,
    site: Site,
    layer: int,
    model_name: str,
    settings: DictionarySettings | None = None,
    quality: Quality | None = None,
) -> None:
    """Write a new folder as SAELens does; what is already there is left alone.

    ``settings`` and ``quality`` go into the metadata, which SAELens keeps and hands on.
    """
    if folder.exists():
        raise LabError(f"{folder}: exists already")
    d_in, d_sae = dictionary.W_enc_DK.shape
    tensors = {
        "W_enc": dictionary.W_enc_DK,
        "b_enc": dictionary.b_enc_K,
        "W_dec": dictionary.W_dec_KD,
        "b_dec": dictionary.b_dec_D,
        "threshold": torch.full((d_sae,), dictionary.threshold),
    }
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise LabError("the dictionary holds NaN or infinite values: nothing was written")
    told = _Told(dictionary.unexplained, settings, quality)
    metadata = _Metadata(model_name=model_name, hook_name=_hook(site, layer), steerscope=told)
    config = _Config(d_in=d_in, d_sae=d_sae, metadata=metadata)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        (part / WEIGHTS).write_bytes(stored)
        (part / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        part.chmod(0o755)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part)
        raise


def load(folder: Path) -> Dictionary:
    """Read what ``save_saelens`` wrote; other folders of SAELens are ``catalog.formats``'s."""
    try:
        config = msgspec.json.decode((folder / CONFIG).read_bytes(), type=_Config)
    except (OSError, msgspec.MsgspecError) as error:
        raise LabError(f"{folder / CONFIG}: {error}") from None
    K, D = config.d_sae, config.d_in
    if not config.apply_b_dec_to_input:
        raise LabError(f"{folder / CONFIG}: apply_b_dec_to_input: not a dictionary of train-sae's")
    shapes = {"W_enc": (D, K), "b_enc": (K,), "W_dec": (K, D), "b_dec": (D,), "threshold": (K,)}
    with TensorFile(folder / WEIGHTS) as file:
        for name, shape in shapes.items():
            if file.entry(name).shape != shape:
                raise LabError(f"{file.path}: {name!r} is {list(file.entry(name).shape)}, "
                               f"expected {list(shape)}")  # fmt: skip
        W_enc, b_enc, W_dec, b_dec, threshold = (torch.from_numpy(file.read(n)) for n in shapes)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (W_enc, b_enc, W_dec, b_dec)):
        raise LabError(f"{folder / WEIGHTS}: holds NaN or infinite values")
    if not bool((threshold == threshold[0]).all()):
        raise LabError(f"{folder / WEIGHTS}: thresholds differ: not a dictionary of train-sae's")
    unexplained = config.metadata.steerscope.unexplained_in_training
    return Dictionary(W_enc, b_enc, W_dec, b_dec, float(threshold[0]), unexplained)


def _hook(site: Site, layer: int) -> str:
    name = "mlp.hook_in" if site is Site.MLP_IN else f"hook_{site.value}"
    return f"blocks.{layer}.{name}"
