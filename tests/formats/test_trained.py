"""A dictionary that we trained on a real model's streams, in SAELens' hands and back in ours.

Shapes: N tokens, D width, K latents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import read_ours
from safetensors.torch import load_file, save_file
from steerscope.catalog.formats import open_source
from steerscope.catalog.model import Site
from steerscope.demo import paths
from steerscope.demo.study.runner import run
from steerscope.demo.world import questions
from steerscope.lab.dictionaries import DictionarySettings, save_saelens
from steerscope.lab.train_sae import Trained, train_on
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

LAYER = 3
NUM_QUESTIONS = 200
SETTINGS = DictionarySettings(d_sae=192, k=8, num_steps=400)


@pytest.fixture(scope="module")
def streams_ND() -> Tensor:
    model = LlamaForCausalLM.from_pretrained(paths.MODEL_DIR).eval()
    tokenizer = Tokenizer.from_file(str(paths.MODEL_DIR / "tokenizer.json"))
    asked = questions("known", "en", NUM_QUESTIONS, seed=0)
    transcripts = run(model, tokenizer, [q.question for q in asked], capture=[LAYER])
    return torch.cat([t.prompt_resid[LAYER] for t in transcripts])


@pytest.fixture(scope="module")
def trained(streams_ND: Tensor) -> Trained:
    return train_on(streams_ND.numpy(), SETTINGS)


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "sae"
    save_saelens(
        trained.dictionary, folder, Site.RESID_POST, LAYER, "demo", SETTINGS, trained.quality
    )
    return folder


def test_saelens_reads_what_we_trained_as_we_do(
    trained: Trained,
    folder: Path,
    streams_ND: Tensor,
    run_saelens: Callable[..., None],
    tmp_path: Path,
) -> None:
    save_file({"x": streams_ND.contiguous()}, tmp_path / "inputs.safetensors")
    run_saelens("read_saelens.py", folder, tmp_path / "inputs.safetensors", tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs")
    with open_source("saelens", folder) as source:
        assert (source.site, source.layer) == (Site.RESID_POST, LAYER)
        ours = read_ours(source, streams_ND)
    assert not ours.undecided_NK.any()
    worst = float((ours.acts_NK - theirs["acts"]).abs().max())
    print(f"streams of {float(streams_ND.std()):.2f} standard deviation: away by {worst:.1e}")
    assert worst <= 1e-5 * max(float(streams_ND.std()), 1.0)
    held_out = len(streams_ND) // 10
    x_ND, rebuilt_ND = streams_ND[-held_out:], theirs["rebuilt"][-held_out:]
    unexplained = (rebuilt_ND - x_ND).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert float(unexplained) == pytest.approx(trained.quality.unexplained, rel=1e-3)


def test_a_dictionary_of_a_real_model_explains_tokens_it_was_not_trained_on(
    trained: Trained, streams_ND: Tensor
) -> None:
    quality = trained.quality
    assert quality.num_tokens == len(streams_ND) // 10
    assert quality.unexplained < 0.2
    assert 0.5 * SETTINGS.k < quality.l0 < 2 * SETTINGS.k


@pytest.mark.engine
def test_the_command_captures_through_vllm_trains_and_leaves_a_folder_to_import(
    tmp_path: Path,
) -> None:
    asked = questions("known", "en", 80, seed=0)
    lines = [json.dumps({"question": q.question, "entity": q.entity}) for q in asked]
    (tmp_path / "cases.jsonl").write_text("\n".join(lines))
    command = [
        str(Path(sys.executable).with_name("steerscope")), "lab", "train-sae", str(paths.MODEL_DIR),
        "--cases", str(tmp_path / "cases.jsonl"), "--site", f"resid_post.{LAYER}",
        "--out", str(tmp_path / "sae"), "--d-sae", "64", "--k", "6", "--steps", "300",
        "--max-tokens", "8", "--vllm", '{"enforce_eager": true, "max_model_len": 128}',
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "latents active" in done.stdout
    with open_source("saelens", tmp_path / "sae") as source:
        assert (source.site, source.layer, source.d_sae) == (Site.RESID_POST, LAYER, 64)
    config = json.loads((tmp_path / "sae/cfg.json").read_bytes())
    assert config["metadata"]["steerscope"]["quality"]["unexplained"] < 0.3


def test_streams_of_a_real_model_are_not_of_unit_variance(streams_ND: Tensor) -> None:
    """Or the comparison above would prove less than it seems to."""
    assert np.isfinite(streams_ND.numpy()).all()
    assert float(streams_ND.std()) > 1
