"""Which of our sites a hook of TransformerLens is, where it is one exactly."""

from __future__ import annotations

import re
from typing import NamedTuple, TypeVar

from steerscope.catalog.formats.source import Options
from steerscope.catalog.model import Site
from steerscope.errors import CatalogError

SITES = {
    "hook_resid_pre": Site.RESID_PRE,
    "hook_attn_out": Site.ATTN_OUT,
    "hook_resid_mid": Site.RESID_MID,
    "mlp.hook_in": Site.MLP_IN,
    "mlp.hook_out": Site.MLP_OUT,
    "hook_mlp_out": Site.MLP_OUT,
    "hook_resid_post": Site.RESID_POST,
}

AMBIGUOUS = "hook_mlp_in"
"""Before the norm in TransformerLens, after it in SAELens' names for Gemma Scope 2."""

NORMALIZED = "ln2.hook_normalized"
"""What the norm before the MLP makes, before its weight; ``mlp_in`` once that is divided out."""

NO_SITES = {
    "ln1.hook_normalized": "is the norm before its weight, which is no site of ours",
    NORMALIZED: "is the norm before its weight, which must be known to divide it out",
    "attn.hook_z": "is inside attention, which is no site of ours",
    "hook_embed": "is the embedding, which is no site of ours",
}

NORM_AFTER_MLP = ("Gemma2", "Gemma3")
"""Where ``mlp.hook_out`` is before a norm and our ``mlp_out`` after it."""


_T = TypeVar("_T", Site, int)


class Place(NamedTuple):
    """A site of a layer."""

    site: Site
    layer: int


def place(hook: str | None, options: Options) -> Place:
    """Where ``blocks.<layer>.<hook>`` is; the options say it where the file does not."""
    told_layer, name = split(hook or "")
    told_site = site(name, options) if name else None
    if told_site is None and options.site is None:
        raise CatalogError(f"which site? {_why(name)}; say --site")
    return Place(
        agreed("site", told_site, options.site), agreed("layer", told_layer, options.layer)
    )


def site(name: str, options: Options) -> Site | None:
    """The site of a hook without its block; None if only the caller can know."""
    if name == NORMALIZED and options.mlp_norm is not None:
        return Site.MLP_IN
    if name in NO_SITES:
        raise CatalogError(f"hook {name!r} {NO_SITES[name]}")
    if name == AMBIGUOUS:
        return None
    if name not in SITES:
        raise CatalogError(f"hook {name!r} is no site of ours ({', '.join(SITES)})")
    if name == "mlp.hook_out" and options.architecture.startswith(NORM_AFTER_MLP):
        raise CatalogError(
            f"hook {name!r} of {options.architecture} is before the norm on the MLP's output, "
            "our mlp_out after it"
        )
    return SITES[name]


def split(hook: str) -> tuple[int | None, str]:
    """The layer and the rest of ``blocks.<layer>.<rest>``."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return (int(found[1]), found[2]) if found else (None, hook)


def _why(name: str) -> str:
    if name == AMBIGUOUS:
        return f"{name!r} is used for the stream before the norm and for the norm's output"
    return "the file does not say"


def agreed(what: str, told: _T | None, asked: _T | None) -> _T:
    """What the file or the caller says; ``CatalogError`` if neither does, or not the same."""
    if told is not None and asked is not None and told != asked:
        raise CatalogError(f"{what} is {told} by the file, {asked} was asked for")
    for said in (told, asked):
        if said is not None:
            return said
    raise CatalogError(f"which {what}? the file does not say; say --{what}")
