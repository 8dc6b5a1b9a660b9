"""Every architecture inside vLLM against plain Transformers, at all six sites: see ``parity``."""

from __future__ import annotations

import engine_process
import miniatures
import parity
import pytest

pytestmark = pytest.mark.engine

INDUCTOR = ("llama", "gemma3")
"""Compiled as vLLM does by default, half a minute each; see ``HOW`` for the others."""
EAGER = ("phi3",)
HOW = {
    name: {}
    if name in INDUCTOR
    else {"compiled": False}
    if name in EAGER
    else {"environment": parity.TRACED}
    for name in miniatures.ARCHITECTURES
}

V2_MAX_TOKENS = 16
"""The V2 runner's kernels are interpreted on a CPU."""


@pytest.mark.parametrize("architecture", list(miniatures.ARCHITECTURES))
def test_tokens_activations_and_receipts_equal_plain_transformers(architecture, tmp_path):
    result = parity.check(architecture, tmp_path, **HOW[architecture])
    assert result["passed"], result
    assert result["runner"] == "v1"
    assert result["requests"] == 30
    assert result["activations"] > 35_000


@pytest.mark.usefixtures("triton")
def test_tokens_activations_and_receipts_equal_plain_transformers_under_the_v2_runner(tmp_path):
    result = parity.check(
        "llama",
        tmp_path,
        compiled=False,
        max_tokens=V2_MAX_TOKENS,
        environment=engine_process.V2,
    )
    assert result["passed"], result
    assert result["runner"] == "v2"
