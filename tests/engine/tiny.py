"""A random-weight Llama and a catalog for it, made on the spot: no download, no training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file
from steerscope.catalog.fingerprint import tensor_digest
from steerscope.demo.live.server import free_ports
from transformers import LlamaConfig, LlamaForCausalLM

D_MODEL = 128
NUM_LAYERS = 4
VOCAB_SIZE = 512
LAYERS = (1, 2)


SHAPE = {
    "hidden_size": D_MODEL,
    "intermediate_size": 160,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Of every tiny model: wide weights, so that greedy output varies with its input."""


def write_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of 4 layers and width 128 whose greedy output varies with its input."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(folder)
    return folder


def write_catalog(folder: Path, model: Path, seed: int = 1) -> Path:
    """Per layer in ``LAYERS``: a jumprelu latent, a relu latent, a direction, a read-only probe."""
    rng = np.random.default_rng(seed)
    features, tensors = [], {}
    kinds = (
        ("latent", "sae_latent", "jumprelu"),
        ("unit", "transcoder_latent", "relu"),
        ("direction", "direction", "identity"),
        ("probe", "probe", "identity"),
    )
    for layer in LAYERS:
        for stem, kind, activation in kinds:
            name = f"{stem}_{layer}"
            features.append(
                {
                    "name": name,
                    "kind": kind,
                    "site": "resid_post",
                    "layer": layer,
                    "activation": activation,
                }
            )
            tensors[f"{name}.W_enc"] = _unit(rng)
            tensors[f"{name}.b_enc"] = rng.normal(0, 0.1, 1).astype(np.float32)
            if activation == "jumprelu":
                tensors[f"{name}.threshold"] = np.array([0.2], np.float32)
            if kind != "probe":
                tensors[f"{name}.W_dec"] = _unit(rng)
    document = {
        "schema": "steerscope.catalog/v1",
        "name": "tiny",
        "version": "1",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": D_MODEL,
            "num_hidden_layers": NUM_LAYERS,
            "vocab_size": VOCAB_SIZE,
            "weights": {"lm_head.weight": tensor_digest(model, "lm_head.weight")},
        },
        "features": features,
        "signals": [
            {
                "name": "latent_seen",
                "terms": [{"feature": "latent_1", "reduce": "last_prompt_token", "weight": 1.0}],
                "bias": 0.0,
                "labels": [{"label": "low", "below": 0.6}, {"label": "high"}],
            }
        ],
        "policies": [
            {"name": "push", "interventions": [{"feature": "direction_1", "add": 8.0}]},
        ],
    }
    folder.mkdir(parents=True)
    (folder / "catalog.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    save_file(tensors, folder / "features.safetensors")
    return folder


def write_config(path: Path, catalog: Path) -> Path:
    """A config with free ports."""
    grpc_port, http_port = free_ports(2)
    tree = {
        "catalog": str(catalog),
        "hub": {
            "grpc_address": f"127.0.0.1:{grpc_port}",
            "http_address": f"127.0.0.1:{http_port}",
        },
    }
    path.write_text(json.dumps(tree))
    return path


def prompts(count: int, seed: int = 0, low: int = 3, high: int = 40) -> list[list[int]]:
    """Random token ids of random lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB_SIZE, rng.integers(low, high)).tolist() for _ in range(count)]


def _unit(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=D_MODEL)
    return (vector / np.linalg.norm(vector)).astype(np.float32)
