"""The committed model and catalog fit together and keep what the demo promises of them."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from steerscope.demo.making.tokenizer import build_tokenizer, prompt_text
from steerscope.demo.paths import ARTIFACTS_DIR, CATALOG_DIR, MODEL_DIR
from steerscope.demo.study.catalog import Catalog, read_catalog
from steerscope.demo.study.interventions import (
    Activation,
    Feature,
    Intervention,
    When,
    clamp,
    edited,
)

EIGHT_MEGABYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return read_catalog(CATALOG_DIR)


def _feature(width: int = 4) -> Feature:
    return Feature(
        "f", 0, torch.eye(width)[0], 0.0, Activation.JUMPRELU, 1.0, 2.0 * torch.eye(width)[1]
    )


def test_everything_committed_stays_small_and_beside_the_model_lies_nothing_else() -> None:
    """A second safetensors file in the model's folder would make vLLM refuse it."""
    files = [path for path in ARTIFACTS_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= EIGHT_MEGABYTES
    assert [path.name for path in MODEL_DIR.glob("*.safetensors")] == ["model.safetensors"]


def test_the_committed_tokenizer_is_the_one_the_world_builds() -> None:
    """The vocabulary follows from the world, so both tokenizers agree on every question."""
    committed = (MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(committed) == json.loads(build_tokenizer().to_str())


def test_the_catalog_names_the_committed_model() -> None:
    """The fingerprint's tokenizer digest is that of the file beside the model."""
    digest = hashlib.sha256((MODEL_DIR / "tokenizer.json").read_bytes()).hexdigest()
    assert f"tokenizer_sha256: {digest}" in (CATALOG_DIR / "catalog.yaml").read_text("utf-8")


def test_a_chat_completion_sees_exactly_the_training_format() -> None:
    """The chat template renders one user message as the training prompt."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    question = "Which sport does Michael Jordan play?"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == prompt_text(question)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids == build_tokenizer().encode(prompt_text(question)).ids


def test_controls_differ_from_the_edited_feature_in_direction_only(catalog: Catalog) -> None:
    """Every control has the gate and the edit norm of the unknown-entity latent."""
    features = {entry.feature.name: entry.feature for entry in catalog.features}
    edited_feature = features["unknown_entity"]
    controls = [f for name, f in features.items() if name.startswith("control_")]
    assert len(controls) == 12
    assert edited_feature.W_dec is not None
    for control in controls:
        assert control.W_dec is not None
        assert torch.equal(control.W_enc, edited_feature.W_enc)
        assert (control.b_enc, control.threshold, control.layer) == (
            edited_feature.b_enc,
            edited_feature.threshold,
            edited_feature.layer,
        )
        torch.testing.assert_close(control.W_dec.norm(), edited_feature.W_dec.norm())
        assert abs(float(torch.cosine_similarity(control.W_dec, edited_feature.W_dec, 0))) < 0.99


def test_the_control_policy_is_force_known_on_another_direction(catalog: Catalog) -> None:
    """Only the feature differs."""
    real, control = catalog.policy("force-known"), catalog.policy("control")
    assert control.feature.name == "control_00"
    assert replace(control, feature=real.feature) == real


def test_an_edit_moves_the_activation_to_its_clamp_along_the_decoder() -> None:
    """f is 3, clamped to -1, so the stream moves by -4 decoder rows."""
    resid_BLD = torch.tensor([[[3.0, 0.0, 0.0, 0.0]]])
    moved = edited(resid_BLD, 0, [clamp(_feature(), -1.0, only_if_active=True)], "prompt")
    assert moved.tolist() == [[[3.0, -8.0, 0.0, 0.0]]]


def test_gates_phases_and_layers_leave_other_tokens_bit_identical() -> None:
    """Below the threshold, in generation, or at another layer nothing changes."""
    resid_BLD = torch.randn(2, 3, 4).clamp(max=0.9)
    edit = clamp(_feature(), -1.0, only_if_active=True)
    assert torch.equal(edited(resid_BLD, 0, [edit], "prompt"), resid_BLD)
    assert torch.equal(edited(resid_BLD + 9, 0, [edit], "generation"), resid_BLD + 9)
    assert torch.equal(edited(resid_BLD + 9, 1, [edit], "prompt"), resid_BLD + 9)
    shut = replace(edit, only_if_active=False, when=When(_feature(), math.inf))
    assert torch.equal(edited(resid_BLD + 9, 0, [shut], "prompt"), resid_BLD + 9)


def test_edits_at_one_site_all_read_the_unedited_stream() -> None:
    """Two clamps of the same feature add their moves; the second does not see the first."""
    resid_BLD = torch.tensor([[[2.0, 0.0, 0.0, 0.0]]])
    edit = Intervention(_feature(), low=0.0, high=0.0)
    assert edited(resid_BLD, 0, [edit, edit], "prompt").tolist() == [[[2.0, -8.0, 0.0, 0.0]]]
