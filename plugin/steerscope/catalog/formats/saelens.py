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

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from steerscope.catalog.formats import foreign, hooks
from steerscope.catalog.formats.folded import Gated, Rescaled, before_weight
from steerscope.catalog.formats.linear import Linear
from steerscope.catalog.formats.source import Options, Source, Weights
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.catalog.tensors import TensorFile
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

FOR_TRAINING = frozenset({"batchtopk", "matryoshka_batchtopk"})
"""What looks at a whole batch, until its threshold is written down."""

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


@contextmanager
def open_folder(path: Path, options: Options) -> Iterator[Source]:
    """The SAE or transcoder in the folder."""
    config = foreign.read(path / CONFIG, Config)
    activation, transcodes = _check(config, path / CONFIG)
    place = hooks.place(_hook(config), options)
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
            weights=before_weight(weights, hooks.split(_hook(config))[1], place.layer, options),
            k=_k(config, path) if activation is Activation.TOPK else None,
            provenance=_provenance(config),
            notes=_notes(config, steerable),
        )


def _check(config: Config, path: Path) -> tuple[Activation, bool]:
    """The activation, and whether it is a transcoder; refuse what would not be exact."""
    architecture = config.architecture
    if architecture == "standard" and _activation_fn(config) == "topk":
        architecture = "topk"  # as it was written before version 6
    if architecture in FOR_TRAINING:
        raise CatalogError(
            f"{path}: architecture {architecture!r} is saved for training; save_inference_model "
            "saves it as a jumprelu"
        )
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
    if kwargs.get("fold_ln") and _hook(config).endswith("_in"):
        raise CatalogError(f"{path}: fold_ln: the norm's output lacks its weight, ours has it")


def _activation_fn(config: Config) -> str:
    return config.activation_fn or config.activation_fn_str or "relu"


def _k(config: Config, path: Path) -> int:
    k = config.k if config.k is not None else (config.activation_fn_kwargs or {}).get("k")
    if not isinstance(k, int) or not 1 <= k <= config.d_sae:
        raise CatalogError(f"{path / CONFIG}: k is {k!r}, expected 1 to {config.d_sae}")
    return k


def _hook(config: Config) -> str:
    """The hook it reads, in today's names; empty if the file does not say."""
    hook: str = config.said("hook_name") or config.hook_point or ""
    if config.hook_layer is not None:
        hook = hook.replace("{layer}", str(config.hook_layer))
    if (config.said("hf_hook_name") or "").endswith(AFTER_THE_NORM):
        hook = hook.replace(hooks.AMBIGUOUS, "mlp.hook_in")
    return hook


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
        "hook_name": _hook(config),
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
