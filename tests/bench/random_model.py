"""Models of random weights and catalogs for them, as large as a measurement needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file
from steerscope.demo.live.server import free_ports

SHAPES: dict[str, dict[str, int]] = {
    "demo": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1536,
    },
    "medium": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 16_384,
    },
}
"""``demo`` has the embedded model's geometry: the worst case for host costs."""


def write_model(folder: Path, name: str) -> Path:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SHAPES[name]
    config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=True)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def write_config(
    folder: Path,
    shape: dict[str, int],
    num_features: int,
    num_layers: int,
    policies: Sequence[dict[str, Any]] = (),
    signals: Sequence[dict[str, Any]] = (),
) -> Path:
    """A catalog of relu latents spread over layers, and a config that names it."""
    catalog = write_catalog(folder / "catalog", shape, num_features, num_layers, signals)
    grpc_port, http_port = free_ports(2)
    hub = {
        "grpc_address": f"127.0.0.1:{grpc_port}",
        "http_address": f"127.0.0.1:{http_port}",
        "max_policies": max(1000, len(policies)),
    }
    tree = {"catalog": str(catalog), "hub": hub, "policies": list(policies)}
    config = folder / "steerscope.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def write_catalog(
    folder: Path,
    shape: dict[str, int],
    num_features: int,
    num_layers: int,
    signals: Sequence[dict[str, Any]],
) -> Path:
    """``feature_0`` and so on, in turn over the layers."""
    rng = np.random.default_rng(1)
    width, depth = shape["hidden_size"], shape["num_hidden_layers"]
    layers = [(i + 1) * depth // (num_layers + 1) for i in range(num_layers)]
    features, tensors = [], {}
    for i in range(num_features):
        name = f"feature_{i}"
        features.append(
            {
                "name": name,
                "kind": "sae_latent",
                "site": "resid_post",
                "layer": layers[i % num_layers],
                "activation": "relu",
            }
        )
        for part in ("W_enc", "W_dec"):
            vector = rng.normal(size=width)
            tensors[f"{name}.{part}"] = (vector / np.linalg.norm(vector)).astype(np.float32)
        tensors[f"{name}.b_enc"] = np.zeros(1, np.float32)
    document = {
        "schema": "steerscope.catalog/v1",
        "name": "bench",
        "version": "1",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": width,
            "num_hidden_layers": depth,
            "vocab_size": shape["vocab_size"],
        },
        "features": features,
        "signals": list(signals),
    }
    folder.mkdir(parents=True)
    (folder / "catalog.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    save_file(tensors, folder / "features.safetensors")
    return folder
