"""circuit-tracer: a folder of transcoders, one file a layer, and ``config.yaml``.

Read against circuit-tracer 0.5 (``transcoder/*.py``). All weights are [K, D]; b_dec is not
subtracted from the input; the activation is relu, or x * (x > threshold) if there is one.

``layer_<i>.safetensors``
    A per-layer transcoder: W_enc, W_dec, b_enc, b_dec, ``activation_function.threshold``. W_skip
    adds ``x @ W_skip.T`` to the prediction whatever the latents are, so it changes neither a
    reading nor an edit. From ``mlp.hook_in`` (or ``ln2.hook_normalized``, where the norm's weight
    is divided out) to the MLP's output it is ours exactly; from ``hook_resid_mid`` it can be read,
    not written: an edit there would go through the MLP.
``W_enc_<i>.safetensors`` (and ``W_dec_<i>``)
    A cross-layer transcoder. It is read at one layer and writes to that and all later ones, which
    no edit at one site does: read-only.

The library does not look at the first position of a prompt (``zero_positions``); we do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from steerscope.catalog.formats import foreign, hooks
from steerscope.catalog.formats.folded import before_weight
from steerscope.catalog.formats.linear import Linear
from steerscope.catalog.formats.source import Options, Source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.catalog.tensors import TensorFile
from steerscope.errors import CatalogError

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"

CROSS_LAYER = "read-only: a cross-layer feature writes to its own and every later layer"
OTHER_HOOKS = "read-only: only a transcoder from mlp_in to mlp_out can be written here"
NO_CONFIG = f"read-only: without {CONFIG} it is not known where its decoder writes"


class Config(msgspec.Struct, frozen=True):
    """``config.yaml``, as far as it is about the files beside it."""

    model_kind: Literal["transcoder_set", "cross_layer_transcoder"]
    feature_input_hook: str
    feature_output_hook: str
    model_name: str | None = None
    scan: str | list[str] | None = None
    transcoders: list[str] | None = None


@contextmanager
def open_layer(path: Path, options: Options) -> Iterator[Source]:
    """The transcoder of ``options.layer`` in the folder."""
    if options.layer is None:
        raise CatalogError(f"{path}: which layer? name features as LAYER/INDEX, or say --layer")
    layer = options.layer
    config = _config(path)
    site = _site(config, options)
    across = (path / f"W_enc_{layer}.safetensors").exists()
    steerable = not across and _writes_mlp_out(config, site, options)
    with TensorFile(_file(path, layer, config, across)) as tensors:
        weights = _weights(tensors, f"_{layer}" if across else "", across, steerable)
        d_in, d_sae = weights.shape()
        yield Source(
            kind=FeatureKind.TRANSCODER_LATENT,
            site=site,
            layer=layer,
            d_in=d_in,
            d_sae=d_sae,
            activation=Activation.JUMPRELU if weights.jump else Activation.RELU,
            weights=before_weight(
                weights, config.feature_input_hook if config else "", layer, options
            ),
            provenance=_provenance(config, across),
            notes=() if steerable else (_why(config, across),),
        )


def _config(path: Path) -> Config | None:
    if not (path / CONFIG).exists():
        return None
    config = foreign.read(path / CONFIG, Config)
    if config.transcoders:
        raise CatalogError(
            f"{path / CONFIG}: transcoders: names files elsewhere ({config.transcoders[0]}); "
            "fetch them and open each in its own format"
        )
    return config


def _site(config: Config | None, options: Options) -> Site:
    told = hooks.site(config.feature_input_hook, options) if config else None
    return hooks.agreed("site", told, options.site)


def _writes_mlp_out(config: Config | None, site: Site, options: Options) -> bool:
    if config is None or site is not Site.MLP_IN:
        return False
    return hooks.site(config.feature_output_hook, options) is Site.MLP_OUT


def _file(path: Path, layer: int, config: Config | None, across: bool) -> Path:
    if config and across != (config.model_kind == "cross_layer_transcoder"):
        raise CatalogError(
            f"{path / CONFIG}: model_kind is {config.model_kind!r}, but there is "
            f"{'a' if across else 'no'} W_enc_{layer}.safetensors"
        )
    return path / (f"W_enc_{layer}.safetensors" if across else f"layer_{layer}.safetensors")


def _weights(tensors: TensorFile, suffix: str, across: bool, steerable: bool) -> Linear:
    for name in ("log_thresholds", "log_threshold"):
        if name in tensors.entries:
            raise CatalogError(f"{tensors.path}: {name!r} is not known; circuit-tracer refuses it")
    jump = f"threshold{suffix}" if across else THRESHOLD
    return Linear(
        tensors=tensors,
        W_enc=f"W_enc{suffix}",
        latents_last=False,
        b_enc=f"b_enc{suffix}",
        jump=jump if jump in tensors.entries else None,
        W_dec="W_dec" if steerable else None,
        positive=False,
    )


def _provenance(config: Config | None, across: bool) -> dict[str, str]:
    told = {"architecture": "cross_layer_transcoder" if across else "transcoder"}
    if config is not None:
        scan = config.scan
        told["model_name"] = config.model_name or ""
        told["scan"] = scan if isinstance(scan, str) else ", ".join(scan or ())
        told["hooks"] = f"{config.feature_input_hook} -> {config.feature_output_hook}"
    return {key: value for key, value in told.items() if value}


def _why(config: Config | None, across: bool) -> str:
    if across:
        return CROSS_LAYER
    return OTHER_HOOKS if config else NO_CONFIG
