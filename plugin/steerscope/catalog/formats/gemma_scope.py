"""Gemma Scope: ``params.npz`` with W_enc [D, K], b_enc, W_dec [K, D], b_dec and threshold [K].

f = relu(pre) where pre = x @ W_enc + b_enc is above the threshold; b_dec is not subtracted from
the input (Lieberum et al. 2024, arXiv 2408.05147, and SAELens' loader). The file does not say
where it belongs; its path in Google's repositories does:

    gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz     resid_post
    gemma-scope-2b-pt-mlp/...                                             mlp_out
    gemma-scope-2b-pt-transcoders/...                                     mlp_in -> mlp_out

The transcoders were made for the norm's output before its weight (``ln2.hook_normalized`` to
SAELens and circuit-tracer), which is divided out where the model is known. ``-att`` reads inside
attention, ``embedding`` the embedding: neither is a site of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steerscope.catalog.formats import hooks
from steerscope.catalog.formats.folded import before_weight
from steerscope.catalog.formats.linear import Linear
from steerscope.catalog.formats.npz import NpzFile
from steerscope.catalog.formats.source import Options, Source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

FILE = "params.npz"

VARIANTS = {
    "res": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "att": "attn.hook_z",
    "transcoders": hooks.NORMALIZED,
}

REPOSITORY = re.compile(r"gemma-scope-.+?-(res|mlp|att|transcoders)(-.+)?$")


@contextmanager
def open_file(path: Path, options: Options) -> Iterator[Source]:
    """The SAE in ``params.npz`` or its folder."""
    file = path / FILE if path.is_dir() else path
    hook = _hook(file.absolute().parts)
    place = _place(file.absolute(), hook, options)
    with NpzFile(file) as tensors:
        weights = Linear(tensors=tensors, latents_last=True, jump="threshold", W_dec="W_dec")
        d_in, d_sae = weights.shape()
        yield Source(
            kind=(
                FeatureKind.TRANSCODER_LATENT
                if hook == hooks.NORMALIZED
                else FeatureKind.SAE_LATENT
            ),
            site=place.site,
            layer=place.layer,
            d_in=d_in,
            d_sae=d_sae,
            activation=Activation.JUMPRELU,
            weights=before_weight(weights, hook or "", place.layer, options),
            provenance=_provenance(file.absolute()),
        )


def _place(file: Path, hook: str | None, options: Options) -> hooks.Place:
    site: Site | None = hooks.site(hook, options) if hook else None
    layer = next((int(m[1]) for p in file.parts if (m := re.fullmatch(r"layer_(\d+)", p))), None)
    try:
        return hooks.Place(
            hooks.agreed("site", site, options.site), hooks.agreed("layer", layer, options.layer)
        )
    except CatalogError as error:
        raise CatalogError(f"{file}: {error}") from None


def _hook(parts: tuple[str, ...]) -> str | None:
    """What the path tells of the hook."""
    if "embedding" in parts:
        return "hook_embed"
    found = [m[1] for part in parts if (m := REPOSITORY.search(part))]
    return VARIANTS[found[-1]] if found else None


def _provenance(file: Path) -> dict[str, str]:
    """The part of the path that names the SAE."""
    told = [p for p in file.parts if re.match(r"(gemma-scope|layer_|width_|average_l0_)", p)]
    return {"architecture": "jumprelu"} | ({"sae": "/".join(told)} if told else {})
