"""circuit-tracer's folders, read as circuit-tracer itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparing import check_parity
from steerscope.catalog.formats import Options, open_source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

LAYER = 1

CASES = {
    "relu": Activation.RELU,
    "relu_skip": Activation.RELU,
    "relu_bfloat16": Activation.RELU,
    "jumprelu": Activation.JUMPRELU,
}
READ_ONLY = {
    "resid_mid": Activation.RELU,
    "cross_layer": Activation.RELU,
    "cross_layer_jumprelu": Activation.JUMPRELU,
}


@pytest.mark.parametrize("case", CASES)
def test_a_transcoder_reads_and_writes_as_in_circuit_tracer(
    case: str, circuit_tracer_files: Path
) -> None:
    folder, expected = _of(circuit_tracer_files, case)
    with open_source("circuit-tracer", folder, Options(layer=LAYER)) as source:
        assert (source.kind, source.site) == (FeatureKind.TRANSCODER_LATENT, Site.MLP_IN)
        assert source.activation is CASES[case]
        check_parity(source, expected)


@pytest.mark.parametrize("case", READ_ONLY)
def test_one_that_writes_where_we_do_not_can_only_be_read(
    case: str, circuit_tracer_files: Path
) -> None:
    folder, expected = _of(circuit_tracer_files, case)
    with open_source("circuit-tracer", folder, Options(layer=LAYER)) as source:
        assert (source.site, source.activation) == (Site.RESID_MID, READ_ONLY[case])
        assert "read-only" in source.notes[0]
        check_parity(source, expected, steers=False)


def test_one_that_reads_before_the_norms_weight_is_refused(circuit_tracer_files: Path) -> None:
    folder, _ = _of(circuit_tracer_files, "normalized")
    with (
        pytest.raises(CatalogError, match="the norm before its weight"),
        open_source("circuit-tracer", folder, Options(layer=LAYER)),
    ):
        pass


def _of(files: Path, case: str) -> tuple[Path, Path]:
    return files / case, files / f"{case}.expected.safetensors"
