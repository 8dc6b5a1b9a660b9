"""The committed model and catalog fit together and keep what the demo promises of them."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steerscope.catalog import store
from steerscope.catalog.model import Reduction
from steerscope.catalog.store import load
from steerscope.demo.making.tokenizer import build_tokenizer, prompt_text
from steerscope.demo.paths import ARTIFACTS_DIR, CATALOG_DIR, MODEL_DIR
from steerscope.demo.study.catalog import Catalog, read_catalog, write_catalog
from steerscope.demo.study.interventions import (
    Activation,
    Feature,
    Intervention,
    When,
    clamp,
    edited,
)
from steerscope.engine.reference import TopK, encode_topk

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


def test_the_catalog_is_one_that_the_server_accepts() -> None:
    """Every signal says what it predicts, and the policies name features that can be written."""
    catalog = load(CATALOG_DIR)
    predicts = {s.name: s.predicts for s in catalog.signals}
    assert {name: (p.label, p.among) for name, p in predicts.items() if p is not None} == {
        "known_entity_confidence": ("known", None),
        "hallucination_risk": ("wrong", "answered"),
        "answered_vs_declined": ("answered", None),
    }
    assert [policy.name for policy in catalog.policies] == [
        "force-known",
        "force-unknown",
        "control",
    ]


def test_the_catalog_written_again_is_the_same(catalog: Catalog, tmp_path: Path) -> None:
    """What is read is all that was written."""
    write_catalog(catalog, tmp_path / "once", MODEL_DIR)
    write_catalog(read_catalog(tmp_path / "once"), tmp_path / "twice", MODEL_DIR)
    for name in ("catalog.yaml", "features.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_the_shipped_catalog_is_the_written_one_with_what_the_lab_added(
    catalog: Catalog, tmp_path: Path
) -> None:
    """Calibration, bands and baselines come from the lab; nothing else differs."""
    write_catalog(catalog, tmp_path / "written", MODEL_DIR)
    written, shipped = store.load(tmp_path / "written"), store.load(CATALOG_DIR)
    assert shipped.document.features == written.document.features
    assert shipped.document.policies == written.document.policies
    for ours, before in zip(shipped.signals, written.signals, strict=True):
        assert ours.calibration is not None
        assert (ours.terms, ours.bias) == (before.terms, before.bias)
    assert shipped.document.baselines
    for name, vectors in shipped.vectors.items():
        assert np.array_equal(vectors.W_enc, written.vectors[name].W_enc)


def test_every_probe_is_read_only_and_every_latent_can_be_steered(catalog: Catalog) -> None:
    """A read-out must not be mistaken for a knob."""
    writable = {e.feature.name for e in catalog.features if e.feature.W_dec is not None}
    assert writable == {e.feature.name for e in catalog.features if e.kind != "probe"}


def test_the_risk_is_known_after_eight_generated_tokens() -> None:
    """It needs the prompt's last token and the first generated ones, whatever follows."""
    risk = next(s for s in load(CATALOG_DIR).signals if s.name == "hallucination_risk")
    looked_at = {(term.reduce, term.first) for term in risk.terms}
    assert looked_at == {
        (Reduction.LAST_PROMPT_TOKEN, 8),
        (Reduction.MIN_FIRST_GENERATED, 8),
    }


def test_the_bars_read_alike_in_the_server(catalog: Catalog) -> None:
    """The study's arithmetic for topk features is that of the engine's reference."""
    bars = [e.feature for e in catalog.features if e.feature.rivals is not None]
    x_TD = 8.0 * torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    assert len(bars) == 16
    for bar in bars:
        assert bar.rivals is not None
        dictionary = TopK(
            bar.rivals.W_enc_KD,
            bar.rivals.b_enc_K,
            bar.rivals.k,
            torch.tensor([bar.latent]),
            torch.tensor([0]),
        )
        assert torch.equal(encode_topk(x_TD, dictionary)[:, 0] > 0, bar.acts(x_TD) > 0)


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
