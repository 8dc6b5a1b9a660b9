"""TopK features in compiled vLLM against Transformers with ``torch.topk``: see ``parity``."""

from __future__ import annotations

import parity
import pytest

pytestmark = pytest.mark.engine

NAMES = (
    "topk_clamp",
    "topk_ablate",
    "topk_scale_active",
    "topk_gates",
    "topk_transcoder",
    "topk_transcoder_active",
    "topk_beside_others",
)


def test_topk_features_are_read_and_steer_as_in_plain_transformers(tmp_path):
    result = parity.check("llama", tmp_path, names=NAMES, max_tokens=32, with_topk=True)
    assert result["passed"], result
    assert result["compiled"]
    assert result["requests"] == 15
    assert result["max_relative_error"] < 1e-4
    assert result["activations"] > 30_000
