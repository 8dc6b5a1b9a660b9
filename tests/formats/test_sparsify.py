"""Sparsify's folders, read as Sparsify itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparing import check_parity
from steerscope.catalog.formats import open_source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

RESID, MLP = "layers.3", "layers.2.mlp"
CASES = {
    "sae": (RESID, FeatureKind.SAE_LATENT, Site.RESID_POST),
    "sae_expansion": (RESID, FeatureKind.SAE_LATENT, Site.RESID_POST),
    "sae_bfloat16": (RESID, FeatureKind.SAE_LATENT, Site.RESID_POST),
    "sae_mlp": (MLP, FeatureKind.SAE_LATENT, Site.MLP_OUT),
    "transcoder": (MLP, FeatureKind.TRANSCODER_LATENT, Site.MLP_IN),
    "skip_transcoder": (MLP, FeatureKind.TRANSCODER_LATENT, Site.MLP_IN),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sparse_coder_reads_and_writes_as_in_sparsify(case: str, sparsify_files: Path) -> None:
    hookpoint, kind, site = CASES[case]
    with open_source("sparsify", sparsify_files / case / hookpoint) as source:
        assert (source.activation, source.k) == (Activation.TOPK, 8)
        assert (source.kind, source.site) == (kind, site)
        assert source.layer == int(hookpoint.split(".")[1])
        check_parity(source, sparsify_files / f"{case}.expected.safetensors")


def test_one_latent_of_each_group_is_refused(sparsify_files: Path) -> None:
    with (
        pytest.raises(CatalogError, match="'groupmax' is not exact"),
        open_source("sparsify", sparsify_files / "groupmax" / RESID),
    ):
        pass
