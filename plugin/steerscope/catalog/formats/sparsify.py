"""EleutherAI's sparsify: ``cfg.json`` + ``sae.safetensors`` in a folder named after the module.

Read against eai-sparsify 1.3.3 (``sparse_coder.py``, ``fused_encoder.py``, ``trainer.py``). All
are TopK over relu(x @ encoder.weight.T + encoder.bias), encoder.weight and W_dec [K, D]; an SAE
subtracts b_dec from its input, a transcoder does not. ``normalize_decoder`` and ``multi_topk`` are
about training. ``skip_connection`` adds ``x @ W_skip.T`` to the prediction whatever the latents
are, so it changes neither a reading nor an edit. ``groupmax`` is one latent of each group, which is
not the k largest, and ``signed`` (before 1.0) ranks by size: both are refused.

A folder is named after what was hooked, with its inputs and outputs:

    layers.12        an SAE: resid_post; a transcoder reads resid_pre and cannot be written
    layers.12.mlp    an SAE: mlp_out; a transcoder reads mlp_in and writes mlp_out
    layers.12.self_attn (attn, attention)   an SAE: attn_out
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from steerscope.catalog.formats import foreign, hooks
from steerscope.catalog.formats.linear import Linear
from steerscope.catalog.formats.source import Options, Source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.catalog.tensors import TensorFile
from steerscope.errors import CatalogError

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

HOOKPOINT = re.compile(r"(?:layers|h|blocks)\.(\d+)(?:\.(mlp|self_attn|attn|attention))?")


class Config(msgspec.Struct, frozen=True):
    """``cfg.json``, as far as it changes the numbers."""

    d_in: int
    k: int
    activation: str = "topk"
    num_latents: int = 0
    transcode: bool = False
    skip_connection: bool = False
    signed: bool = False


class Reach(NamedTuple):
    """Where it reads, and whether our write there is its write."""

    site: Site
    steerable: bool


@contextmanager
def open_folder(path: Path, options: Options) -> Iterator[Source]:
    """The SAE or transcoder in the folder."""
    config = foreign.read(path / CONFIG, Config)
    _check(config, path / CONFIG)
    place, steerable = _place(path, config, options)
    with TensorFile(path / WEIGHTS) as tensors:
        weights = Linear(
            tensors=tensors,
            latents_last=False,
            W_enc="encoder.weight",
            b_enc="encoder.bias",
            b_dec=None if config.transcode else "b_dec",
            W_dec="W_dec" if steerable else None,
        )
        d_in, d_sae = weights.shape()
        if d_in != config.d_in or config.num_latents not in (0, d_sae) or config.k > d_sae:
            raise CatalogError(
                f"{path}: encoder.weight is {[d_sae, d_in]}, {CONFIG} says otherwise"
            )
        yield Source(
            kind=FeatureKind.TRANSCODER_LATENT if config.transcode else FeatureKind.SAE_LATENT,
            site=place.site,
            layer=place.layer,
            d_in=d_in,
            d_sae=d_sae,
            activation=Activation.TOPK,
            k=config.k,
            weights=weights,
            provenance={
                "architecture": f"topk {'transcoder' if config.transcode else 'sae'}",
                "hookpoint": path.absolute().name,
            },
            notes=() if steerable else (_READ_ONLY,),
        )


_READ_ONLY = "read-only: only a transcoder from mlp_in to mlp_out can be written here"


def _check(config: Config, path: Path) -> None:
    if config.activation != "topk":
        raise CatalogError(f"{path}: activation {config.activation!r} is not exact here; topk is")
    if config.signed:
        raise CatalogError(f"{path}: signed: ranks latents by size, which is not exact here")
    if config.k < 1:
        raise CatalogError(f"{path}: k is {config.k}, expected at least 1")


def _place(path: Path, config: Config, options: Options) -> tuple[hooks.Place, bool]:
    """Where it reads, and whether it can be written."""
    found = HOOKPOINT.fullmatch(path.absolute().name)
    reach = _reach(found[2], config, options) if found else None
    site = hooks.agreed("site", reach.site if reach else None, options.site)
    layer = hooks.agreed("layer", int(found[1]) if found else None, options.layer)
    steerable = reach.steerable if reach else not config.transcode
    return hooks.Place(site, layer), steerable


def _reach(module: str | None, config: Config, options: Options) -> Reach:
    sandwich = options.architecture.startswith(hooks.NORM_AFTER_MLP)
    if module is None:
        return Reach(Site.RESID_PRE if config.transcode else Site.RESID_POST, not config.transcode)
    if module == "mlp" and config.transcode:
        return Reach(Site.MLP_IN, not sandwich)
    if sandwich:
        raise CatalogError(
            f"{module!r} of {options.architecture} is before the norm on its output, our "
            "sites are after it"
        )
    if module == "mlp":
        return Reach(Site.MLP_OUT, True)
    if config.transcode:
        raise CatalogError(f"a transcoder of {module!r} reads what is no site of ours")
    return Reach(Site.ATTN_OUT, True)
