"""SAELens folders: ``cfg.json`` + ``sae_weights.safetensors``, of version 6 and before.

Read against SAELens 6.54 (``saes/*.py``, ``loading/pretrained_sae_loaders.py``). W_enc [D, K],
W_dec [K, D]. Of its architectures

- ``standard`` is relu, ``jumprelu`` is ours with a relu inside the jump; BatchTopK and Matryoshka
  SAEs are saved as the latter, with their threshold.
- ``topk`` picks the k largest pre-activations, then relu. With ``rescale_acts_by_decoder_norm``
  the norms of W_dec go into the encoder and out of the decoder.
- ``gated``: f = 1[s + b_gate > 0] relu(e^r s + b_mag) with s = x @ W_enc. As e^r > 0, the gate is
  pre > b_mag - e^r b_gate for pre = e^r s + b_mag: a jumprelu, exactly.
- transcoders read one hook and write another. A skip connection (``W_skip``) adds ``W_skip @ x``
  to the prediction whatever the latents are, so it changes neither a reading nor an edit.

What depends on the token (layer_norm, constant_norm_rescale) or is not in the file (the factor of
expected_average_only_in, a whitening) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from steerscope.catalog.formats import foreign, hooks
from steerscope.catalog.formats.linear import Linear
from steerscope.catalog.formats.source import Options, Source, Weights
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.catalog.tensors import FloatArray, TensorFile
from steerscope.errors import CatalogError

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

SAES = {
    "standard": Activation.RELU,
    "jumprelu": Activation.JUMPRELU,
    "gated": Activation.JUMPRELU,
    "topk": Activation.TOPK,
}
TRANSCODERS = {
    "transcoder": Activation.RELU,
    "skip_transcoder": Activation.RELU,
    "jumprelu_transcoder": Activation.JUMPRELU,
    "jumprelu_skip_transcoder": Activation.JUMPRELU,
}

AFTER_THE_NORM = "pre_feedforward_layernorm.output"
"""Hugging Face's name of what the MLP of Gemma reads."""

REFUSED_NORMS = {
    "layer_norm": "scales each token by its own spread, which no fixed encoder does",
    "constant_norm_rescale": "scales each token by its own norm, which no fixed encoder does",
    "expected_average_only_in": "needs a factor that is not in the file; "
    "call fold_activation_norm_scaling_factor and save the SAE again",
    "covariance_whitening": "needs a matrix that is not in the file; "
    "call fold_activation_whitening and save the SAE again",
}


class Metadata(msgspec.Struct, frozen=True):
    """What version 6 says of the model; before, the same keys were in the config itself."""

    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    hook_head_index: int | None = None
    hf_hook_name: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    sae_lens_version: str | None = None
    neuronpedia_id: str | None = None
    training_architecture: str | None = None


class Config(Metadata, frozen=True, kw_only=True):
    """``cfg.json``, as far as it changes the numbers or says where they belong."""

    d_in: int
    d_sae: int
    architecture: str = "standard"
    activation_fn: str | None = None
    activation_fn_str: str | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str | bool | None = None
    reshape_activations: str | None = None
    rescale_acts_by_decoder_norm: bool = False
    k: int | None = None
    hook_point: str | None = None
    hook_layer: int | None = None
    hook_point_head_index: int | None = None
    metadata: Metadata = Metadata()

    def said(self, key: str) -> Any:
        """A key of the metadata, wherever this version keeps it."""
        value = getattr(self.metadata, key)
        return getattr(self, key) if value is None else value


@dataclass(frozen=True, slots=True)
class Gated:
    """``weights`` are those of the gate's own path, its bias b_mag."""

    weights: Linear

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """The magnitude path: W_enc e^r, and b_mag with b_dec folded in after the scaling."""
        chosen = list(indices)
        W_enc_nD, b_n = self.weights.encoder(chosen)
        b_mag_n = self.weights.tensors.read(self.weights.b_enc)[chosen]
        grown_n = self._grown(chosen)
        return W_enc_nD * grown_n[:, None], b_mag_n + grown_n * (b_n - b_mag_n)

    def threshold(self, indices: Sequence[int]) -> FloatArray:
        """Where the gate opens: the b_dec term is in both paths, so it drops out."""
        chosen = list(indices)
        b_mag_n = self.weights.tensors.read("b_mag")[chosen]
        b_gate_n = self.weights.tensors.read("b_gate")[chosen]
        return np.maximum(b_mag_n - self._grown(chosen) * b_gate_n, np.float32(0))

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """As stored."""
        return self.weights.decoder(indices)

    def _grown(self, chosen: list[int]) -> FloatArray:
        grown_n: FloatArray = np.exp(self.weights.tensors.read("r_mag")[chosen])
        return grown_n


@dataclass(frozen=True, slots=True)
class Rescaled:
    """Activations measured in units of the decoder's norm: out of W_dec, into the encoder."""

    weights: Linear

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """Times the norms."""
        W_enc_nD, b_enc_n = self.weights.encoder(indices)
        norms_n = self._norms(indices)
        return W_enc_nD * norms_n[:, None], b_enc_n * norms_n

    def threshold(self, indices: Sequence[int]) -> None:
        """Only TopK SAEs have this."""

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """Of unit norm."""
        return self.weights.tensors.rows("W_dec", indices) / self._norms(indices)[:, None]

    def _norms(self, indices: Sequence[int]) -> FloatArray:
        W_dec_nD = self.weights.tensors.rows("W_dec", indices)
        norms_n: FloatArray = np.linalg.norm(W_dec_nD, axis=1).astype(np.float32)
        return np.maximum(norms_n, np.float32(1e-8))


@contextmanager
def open_folder(path: Path, options: Options) -> Iterator[Source]:
    """The SAE or transcoder in the folder."""
    config = foreign.read(path / CONFIG, Config)
    activation, transcodes = _check(config, path / CONFIG)
    place = _place(config, options)
    steerable = not transcodes or _writes_mlp_out(config, place, options)
    with TensorFile(path / WEIGHTS) as tensors:
        weights, (d_in, d_sae) = _weights(tensors, config, activation, transcodes, steerable)
        if (d_in, d_sae) != (config.d_in, config.d_sae):
            raise CatalogError(f"{path}: W_enc is {[d_in, d_sae]}, {CONFIG} says otherwise")
        yield Source(
            kind=FeatureKind.TRANSCODER_LATENT if transcodes else FeatureKind.SAE_LATENT,
            site=place.site,
            layer=place.layer,
            d_in=d_in,
            d_sae=d_sae,
            activation=activation,
            weights=weights,
            k=_k(config, path) if activation is Activation.TOPK else None,
            provenance=_provenance(config),
            notes=_notes(config, steerable),
        )


def _check(config: Config, path: Path) -> tuple[Activation, bool]:
    """The activation, and whether it is a transcoder; refuse what would not be exact."""
    architecture = config.architecture
    if architecture == "standard" and _activation_fn(config) == "topk":
        architecture = "topk"  # as it was written before version 6
    known = SAES | TRANSCODERS
    if architecture not in known:
        raise CatalogError(
            f"{path}: architecture {architecture!r} has no exact equivalent here; "
            f"{', '.join(known)} have"
        )
    if (told := _activation_fn(config)) != "relu" and architecture != "topk":
        raise CatalogError(f"{path}: activation_fn {told!r} is not exact with {architecture!r}")
    transcodes = architecture in TRANSCODERS
    if transcodes and config.apply_b_dec_to_input:
        raise CatalogError(f"{path}: apply_b_dec_to_input: a transcoder's b_dec is at its output")
    norm = config.normalize_activations
    norm = "expected_average_only_in" if norm is True else norm or "none"
    if norm != "none":
        reason = REFUSED_NORMS.get(norm, "is not known here")
        raise CatalogError(f"{path}: normalize_activations {norm!r} {reason}")
    if config.reshape_activations not in (None, "none"):
        raise CatalogError(
            f"{path}: reshape_activations {config.reshape_activations!r}: heads inside attention "
            "are no site of ours"
        )
    _check_whole_stream(config, path)
    return known[architecture], transcodes


def _check_whole_stream(config: Config, path: Path) -> None:
    head = config.said("hook_head_index")
    if head is not None or config.hook_point_head_index is not None:
        raise CatalogError(f"{path}: hook_head_index: one attention head is no site of ours")
    kwargs = config.said("model_from_pretrained_kwargs") or {}
    hook = config.said("hook_name") or config.hook_point or ""
    if kwargs.get("fold_ln") and "mlp" in hook and hook.endswith("_in"):
        raise CatalogError(f"{path}: fold_ln: the norm's output lacks its weight, ours has it")


def _activation_fn(config: Config) -> str:
    return config.activation_fn or config.activation_fn_str or "relu"


def _k(config: Config, path: Path) -> int:
    k = config.k if config.k is not None else (config.activation_fn_kwargs or {}).get("k")
    if not isinstance(k, int) or not 1 <= k <= config.d_sae:
        raise CatalogError(f"{path / CONFIG}: k is {k!r}, expected 1 to {config.d_sae}")
    return k


def _place(config: Config, options: Options) -> hooks.Place:
    hook = config.said("hook_name") or config.hook_point
    if hook and config.hook_layer is not None:
        hook = hook.replace("{layer}", str(config.hook_layer))
    after_the_norm = (config.said("hf_hook_name") or "").endswith(AFTER_THE_NORM)
    if hook and hook.endswith(hooks.AMBIGUOUS) and after_the_norm:
        hook = hook.replace(hooks.AMBIGUOUS, "mlp.hook_in")
    return hooks.place(hook, options)


def _writes_mlp_out(config: Config, place: hooks.Place, options: Options) -> bool:
    """Whether an edit of ``mlp_out`` is what the transcoder's decoder means."""
    layer, hook = hooks.split(config.said("hook_name_out") or "")
    if not hook or place.site is not Site.MLP_IN or layer not in (None, place.layer):
        return False
    return hooks.site(hook, options) is Site.MLP_OUT


def _weights(
    tensors: TensorFile,
    config: Config,
    activation: Activation,
    transcodes: bool,
    steerable: bool,
) -> tuple[Weights, tuple[int, int]]:
    architecture = config.architecture
    _check_scaling(tensors)
    linear = Linear(
        tensors=tensors,
        latents_last=True,
        b_enc="b_mag" if architecture == "gated" else "b_enc",
        b_dec="b_dec" if config.apply_b_dec_to_input and not transcodes else None,
        jump="threshold" if "jumprelu" in architecture else None,
        W_dec="W_dec" if steerable else None,
    )
    shape = linear.shape()
    if architecture == "gated":
        for name in ("r_mag", "b_gate"):
            if tensors.entry(name).shape != shape[1:]:
                raise CatalogError(f"{tensors.path}: {name!r} is not [{shape[1]}]")
        return Gated(linear), shape
    rescaled = config.rescale_acts_by_decoder_norm and activation is Activation.TOPK
    return Rescaled(linear) if rescaled else linear, shape


def _check_scaling(tensors: TensorFile) -> None:
    """Before version 6 a factor on each latent could be in the file; mostly it is all ones."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors.entries and not np.allclose(tensors.read(name), 1):
            raise CatalogError(
                f"{tensors.path}: {name!r} scales the decoder only; fold it into W_dec"
            )


def _provenance(config: Config) -> dict[str, str]:
    told = {
        "architecture": config.said("training_architecture") or config.architecture,
        "model_name": config.said("model_name"),
        "hook_name": config.said("hook_name") or config.hook_point,
        "sae_lens_version": config.said("sae_lens_version"),
        "neuronpedia_id": config.said("neuronpedia_id"),
    }
    return {key: value for key, value in told.items() if value}


def _notes(config: Config, steerable: bool) -> tuple[str, ...]:
    notes = []
    kwargs = config.said("model_from_pretrained_kwargs") or {}
    if kwargs.get("center_writing_weights") is not False:
        notes.append(
            "made with TransformerLens' defaults: in a model with LayerNorm (GPT-2, Pythia) those "
            "centre the stream, and readings here differ by the mean of each token's stream"
        )
    if not steerable:
        notes.append("read-only: only a transcoder from mlp_in to mlp_out can be written here")
    return tuple(notes)
