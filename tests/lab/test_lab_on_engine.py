"""What the lab finds on the embedded model, and what it writes."""

import json
import re

import pytest
import torch
from commands import ENGINE, on_engine, ran, steerscope
from steerscope.catalog import authoring, store
from steerscope.catalog.model import LabelSource, Site
from steerscope.catalog.store import SiteKey
from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR
from steerscope.errors import LabError
from steerscope.lab import cases as case_files_of
from steerscope.lab.bench import Bench

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

SITES = [SiteKey(1, Site.RESID_POST), SiteKey(4, Site.RESID_POST)]


def read(path):
    return json.loads(path.read_bytes())


def test_discover_finds_the_known_entity_feature_on_its_own(discovered):
    found = read(discovered / "discovery.json")
    assert found["split_counts"]["none"] == 0
    chosen = found["test"][0]
    assert chosen["tokens"] == "last_entity_token"
    auroc = chosen["score"]["auroc"]
    assert auroc["value"] >= 0.97
    assert auroc["low"] >= 0.92
    for way, share in (("toward_positive", "answered"), ("toward_negative", "declined")):
        turned = found["confirmed"][way]
        assert turned["share"] == share
        assert turned["edited"] >= 0.85
        assert turned["control_mean"] <= 0.15
        assert turned["unsteered"] <= 0.1
    assert max(found["side_changed"]) <= 0.25


def test_what_was_found_is_a_catalog_with_its_provenance(discovered):
    catalog = store.load(discovered / "catalog")
    names = {feature.name for feature in catalog.document.features}
    assert {"known_entity_probe", "known_entity_gate"} < names
    assert names & {"known_entity", "unknown_entity"}
    for feature in catalog.document.features:
        assert feature.label_source is LabelSource.AUTOMATIC
        assert feature.source
    assert {p.name for p in catalog.policies} == {"force-known-entity", "suppress-known-entity"}
    assert ran("catalog", "verify", discovered / "catalog", "--model", MODEL_DIR)


def test_its_dictionaries_are_kept_in_a_format_that_can_be_imported(discovered, tmp_path):
    (sae, *_) = sorted((discovered / "saes").iterdir())
    layer = sae.name.split("-")[0].removeprefix("resid_post.")
    ran(
        *("catalog", "import", "saelens", sae, "--feature", "latent=3"),
        *("--model", MODEL_DIR, "--out", tmp_path / "imported"),
    )
    feature = store.load(tmp_path / "imported").feature("latent")
    assert (feature.site, feature.layer) == (Site.RESID_POST, int(layer))


def test_evaluate_judges_the_signal_it_made_and_gates_a_deployment(
    discovered, case_files, tmp_path
):
    asked = ("lab", "evaluate", discovered / "catalog", "--cases", case_files / "evaluation.jsonl")
    done = steerscope(
        *asked,
        *("--policy", "force-known-entity", "--side-group", "side", "--dose", 0.5),
        *("--num-controls", 2, "--max-cases-per-group", 12),
        *("--require", "known_entity_confidence.auroc>=0.97"),
        *("--require", "known_entity_confidence.auroc<0.5"),
        *("--out", tmp_path / "out", *on_engine(case_files)),
    )
    assert done.code == 3, done.err[-3000:]
    assert "not met: known_entity_confidence.auroc<0.5" in done.err
    assert "auroc>=0.97" not in done.err
    report = read(tmp_path / "out" / "evaluation.json")
    signal = report["signals"]["known_entity_confidence"]
    assert {"mean_logprob", "min_logprob", "first_token_certainty"} <= signal["baselines"].keys()
    curve = report["steering"]["force-known-entity"]["groups"]["unknown"]
    half, whole = curve["points"]
    assert curve["unsteered"]["answered"] <= 0.1
    assert whole["effect"]["answered"] >= 0.8
    assert whole["controls"]["answered"]["max"] <= 0.5
    assert half["effect"]["dose"] == pytest.approx(whole["effect"]["dose"] / 2, rel=0.02)
    assert report["steering"]["force-known-entity"]["collateral"]["side"]["changed"] <= 0.2
    page = (tmp_path / "out" / "README.md").read_text()
    for picture in (tmp_path / "out").glob("*.png"):
        assert f"({picture.name})" in page


def test_calibrate_writes_probabilities_thresholds_and_what_is_normal(case_files, tmp_path):
    ran(
        *("lab", "calibrate", CATALOG_DIR, "--cases", case_files / "evaluation.jsonl"),
        *("--relabel", "answered_vs_declined", "--max-fpr", 0.1),
        *("--out", tmp_path / "out", "--report", tmp_path / "report", *on_engine(case_files)),
    )
    before, after = store.load(CATALOG_DIR), store.load(tmp_path / "out")
    assert after.digest != before.digest
    for signal in after.signals:
        assert signal.calibration is not None
        assert signal.calibration.num_cases > 50
    (relabelled,) = (s for s in after.signals if s.name == "answered_vs_declined")
    assert [label.label for label in relabelled.labels] == ["low", "high"]
    phases = {(b.feature, b.phase) for b in after.document.baselines}
    assert phases == {
        (f.name, p) for f in after.document.features for p in ("prompt", "generation")
    }
    told = read(tmp_path / "report" / "calibration.json")
    assert told["signals"]["known_entity_confidence"]["after"]["ece"]["value"] <= 0.1


def test_explain_writes_a_card_that_shows_where_a_feature_fires(discovered, case_files):
    catalog = discovered / "catalog"
    before = store.load(catalog).digest
    ran(
        *("lab", "explain", catalog, "--cases", case_files / "evaluation.jsonl"),
        *("--model", MODEL_DIR, "--max-tokens", 8, "--vllm", json.dumps(ENGINE)),
    )
    assert store.load(catalog).digest == before
    card = (catalog / "cards" / "known_entity_gate.md").read_text()
    assert "given by a program, not reviewed" in card
    entities = {c.entity for c in case_files_of.load(case_files / "evaluation.jsonl")}
    lasts = {entity.split()[-1] for entity in entities if entity}
    highest = [re.sub(r"\W", "", peak) for peak in re.findall(r"<b>(.+?)</b>", card)]
    assert len(highest) == 10
    assert sum(any(last.endswith(word) for last in lasts) for word in highest) >= 8


def test_a_captured_stream_is_what_transformers_computes(case_files, tmp_path):
    """In a process of its own, since vLLM and Transformers share no state then."""
    asked = case_files_of.load(case_files / "positive.jsonl")[:12]
    (tmp_path / "asked.jsonl").write_bytes(case_files_of.dump(asked))
    out = tmp_path / "streams.safetensors"
    done = steerscope_child(tmp_path / "asked.jsonl", out)
    assert done.returncode == 0, done.stderr[-3000:]
    worst = compare(out)
    assert worst <= 2e-5


def steerscope_child(asked, out):
    import os
    import subprocess
    import sys
    from pathlib import Path

    from steerscope.demo.live.server import SETTINGS

    script = Path(__file__).with_name("capture_child.py")
    return subprocess.run(
        [sys.executable, str(script), str(MODEL_DIR), str(asked), str(out)],
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
        timeout=300,
    )


def compare(streams):
    """The largest difference relative to the stream's norm, over every token and site."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(streams)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    worst = 0.0
    for i in range(12):
        ids = tensors[f"{i}.ids"]
        with torch.no_grad():
            states = model(ids[None], output_hidden_states=True).hidden_states
        for key in SITES:
            expected = states[key.layer + 1][0]
            seen = tensors[f"{i}.{key}"]
            assert len(seen) == len(ids)
            error = (seen - expected).norm(dim=1) / expected.norm(dim=1)
            worst = max(worst, float(error.max()))
    return worst


def test_a_catalog_of_another_model_is_refused_before_anything_is_asked(tmp_path, case_files):
    catalog = store.load(CATALOG_DIR)
    import msgspec

    other = msgspec.structs.replace(catalog.document.model, num_hidden_layers=9)
    document = msgspec.structs.replace(catalog.document, model=other)
    dictionaries = {d.name: [catalog.dictionary_vectors(d.name)] for d in document.dictionaries}
    authoring.write_catalog(tmp_path / "other", document, catalog.vectors, dictionaries)
    done = steerscope(
        *("lab", "evaluate", tmp_path / "other", "--cases", case_files / "evaluation.jsonl"),
        *("--out", tmp_path / "out", *on_engine(case_files)),
    )
    assert done.code == 2
    assert "num_hidden_layers is 6, the catalog was made for 9" in done.err
    assert not (tmp_path / "out").exists()


def test_a_core_in_the_lab_s_own_process_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(LabError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0: the lab needs"):
        Bench(tmp_path, tmp_path)
