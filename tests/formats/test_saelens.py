"""SAELens' folders, read as SAELens itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparing import check_parity
from steerscope.catalog.formats import Options, open_source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

SAES = {
    "standard": Activation.RELU,
    "standard_no_b_dec": Activation.RELU,
    "jumprelu": Activation.JUMPRELU,
    "jumprelu_no_b_dec": Activation.JUMPRELU,
    "jumprelu_bfloat16": Activation.JUMPRELU,
    "gated": Activation.JUMPRELU,
    "gated_no_b_dec": Activation.JUMPRELU,
    "topk": Activation.TOPK,
    "topk_no_b_dec": Activation.TOPK,
    "topk_rescaled": Activation.TOPK,
    "batchtopk": Activation.JUMPRELU,
    "batchtopk_rescaled": Activation.JUMPRELU,
    "matryoshka": Activation.JUMPRELU,
}
TRANSCODERS = {
    "transcoder": Activation.RELU,
    "skip_transcoder": Activation.RELU,
    "jumprelu_transcoder": Activation.JUMPRELU,
    "jumprelu_skip_transcoder": Activation.JUMPRELU,
}
REFUSED = {
    "layer_norm": "scales each token by its own spread",
    "constant_norm_rescale": "scales each token by its own norm",
    "expected_average_only_in": "needs a factor that is not in the file",
    "covariance_whitening": "needs a matrix that is not in the file",
    "abstopk": "architecture 'abstopk' has no exact equivalent",
    "matching_pursuit": "architecture 'matching_pursuit' has no exact equivalent",
    "hook_z": "inside attention",
    "ln2_normalized": "the norm before its weight",
}


@pytest.mark.parametrize("case", SAES)
def test_a_sae_reads_and_writes_as_in_saelens(case: str, saelens_files: Path) -> None:
    with open_source("saelens", saelens_files / case) as source:
        assert (source.kind, source.activation) == (FeatureKind.SAE_LATENT, SAES[case])
        assert (source.site, source.layer) == (Site.RESID_POST, 3)
        check_parity(source, saelens_files / f"{case}.expected.safetensors")


@pytest.mark.parametrize("case", TRANSCODERS)
def test_a_transcoder_reads_and_writes_as_in_saelens(case: str, saelens_files: Path) -> None:
    with open_source("saelens", saelens_files / case) as source:
        assert (source.kind, source.activation) == (
            FeatureKind.TRANSCODER_LATENT,
            TRANSCODERS[case],
        )
        assert (source.site, source.layer) == (Site.MLP_IN, 2)
        check_parity(source, saelens_files / f"{case}.expected.safetensors")


def test_a_transcoder_of_the_stream_before_the_norm_can_only_be_read(saelens_files: Path) -> None:
    case = "transcoder_resid_mid"
    with open_source("saelens", saelens_files / case) as source:
        assert source.site is Site.RESID_MID
        assert "read-only" in source.notes[-1]
        expected = saelens_files / f"{case}.expected.safetensors"
        check_parity(source, expected, steers=False)


@pytest.mark.parametrize(
    ("case", "activation"), [("old_standard", Activation.RELU), ("old_topk", Activation.TOPK)]
)
def test_a_folder_from_before_saelens_6_reads_as_saelens_still_reads_it(
    case: str, activation: Activation, saelens_files: Path
) -> None:
    with open_source("saelens", saelens_files / case) as source:
        assert source.activation is activation
        assert (source.site, source.layer) == (Site.RESID_PRE, 3)
        check_parity(source, saelens_files / f"{case}.expected.safetensors")


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_equivalent_is_refused_with_its_reason(
    case: str, saelens_files: Path
) -> None:
    with (
        pytest.raises(CatalogError, match=REFUSED[case]),
        open_source("saelens", saelens_files / case),
    ):
        pass


def test_a_gemma_scope_file_reads_and_writes_as_in_saelens(saelens_files: Path) -> None:
    (file,) = (saelens_files / "gemma-scope-2b-pt-res").rglob("params.npz")
    with open_source("gemma-scope", file) as source:
        assert (source.site, source.layer) == (Site.RESID_POST, 12)
        check_parity(source, saelens_files / "gemma_scope.expected.safetensors")


def test_a_gemma_scope_transcoder_is_refused_for_it_reads_before_the_norms_weight(
    saelens_files: Path,
) -> None:
    (file,) = (saelens_files / "gemma-scope-2b-pt-transcoders").rglob("params.npz")
    with (
        pytest.raises(CatalogError, match="the norm before its weight"),
        open_source("gemma-scope", file, Options(layer=5)),
    ):
        pass
