"""Random-weight models of several architectures, each with a catalog at all six sites.

Made on the spot: no download, no training. Every one is 4 layers of width 128, its greedy
output varies with its input, and no two of its logits are nearly tied for first place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml
from hf_reference import SITES, at_site
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import D_MODEL, LAYERS, NUM_LAYERS, SHAPE, VOCAB_SIZE, prompts
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SLIDING_WINDOW = 16
"""Of gemma3's sliding layers, and shorter than most prompts."""

LAST_NORMS = ("model.norm.weight", "transformer.ln_f.weight")
GEMMA3_ADDED = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
"""These norms set the size of what each half adds, small beside gemma3's scaled embeddings."""
ACTIVE_SHARE = 0.45
"""On how many tokens a latent is active."""

COMMON = {**SHAPE, "pad_token_id": None}


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**COMMON)


def _llama_bf16() -> PreTrainedConfig:
    # Gentler weights: at 0.3 the rounding of bfloat16 alone changes every seventh token.
    return LlamaConfig(**COMMON | {"initializer_range": 0.1}, dtype="bfloat16")


def _mistral() -> PreTrainedConfig:
    return MistralConfig(**COMMON, head_dim=64, sliding_window=None)


def _qwen3() -> PreTrainedConfig:
    return Qwen3Config(**COMMON, head_dim=32)


def _phi3() -> PreTrainedConfig:
    return Phi3Config(**COMMON, original_max_position_embeddings=512)


def _gemma3() -> PreTrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(
        **COMMON | {"tie_word_embeddings": True},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=SLIDING_WINDOW,
        layer_types=kinds,
    )


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **COMMON,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(**COMMON, num_local_experts=8, num_experts_per_tok=2)


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        n_embd=D_MODEL,
        n_layer=NUM_LAYERS,
        n_head=4,
        n_positions=512,
        vocab_size=VOCAB_SIZE,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama_bf16": _llama_bf16,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}


def write_model(folder: Path, name: str, seed: int = 0) -> Path:
    """Weights and config of the architecture ``name``."""
    torch.manual_seed(100 * seed + list(ARCHITECTURES).index(name))
    config = ARCHITECTURES[name]()
    stored = config.dtype or torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _vary(model)
    model.to(stored).save_pretrained(folder)
    return folder


@torch.no_grad()
def _vary(model: nn.Module) -> None:
    """Give every norm and bias values of its own, so that taking one for another shows."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        if name in LAST_NORMS and model.config.tie_word_embeddings:
            # Else the embedding, used again to make the logits, would echo the last token.
            parameter -= 1.0 - torch.randn_like(parameter)
        if name.endswith(GEMMA3_ADDED) and model.config.model_type == "gemma3_text":
            parameter += 2.0


def write_catalog(folder: Path, model: Path, seed: int = 1) -> Path:
    """At every site of the layers in ``LAYERS``: a direction, a jumprelu latent.

    At ``mlp_in`` also a relu transcoder latent, which writes at ``mlp_out``, and at
    ``resid_post`` a read-only probe: ``<stem>_<site>_<layer>``. Latents are active on some
    tokens and silent on others; each feature's ``evidence`` holds what was measured, on
    random prompts, to see to that.
    """
    rng = np.random.default_rng(seed)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    streams = _streams(loaded, prompts(40, seed=1000 + seed, low=8, high=100))
    features, tensors = [], {}
    for (layer, site), x_TD in streams.items():
        written = streams[layer, "mlp_out"] if site == "mlp_in" else x_TD
        for plan in PLANS:
            if site in plan.sites:
                name = f"{plan.stem}_{site}_{layer}"
                vectors, evidence = _vectors(plan, x_TD, rng)
                size = written if plan.kind == "transcoder_latent" else x_TD
                evidence["written_norm"] = float(np.median(np.linalg.norm(size, axis=1)))
                tensors |= {f"{name}.{key}": value for key, value in vectors.items()}
                features.append(
                    {
                        "name": name,
                        "kind": plan.kind,
                        "site": site,
                        "layer": layer,
                        "activation": plan.activation,
                        "evidence": evidence,
                    }
                )
    document = {
        "schema": "steerscope.catalog/v1",
        "name": "miniature",
        "version": "1",
        "model": _fingerprint(loaded, model),
        "features": features,
        "signals": [
            {
                "name": "latent_seen",
                "terms": [
                    {"feature": "latent_resid_mid_1", "reduce": "last_prompt_token", "weight": 1.0}
                ],
                "bias": 0.0,
                "labels": [{"label": "low", "below": 0.6}, {"label": "high"}],
            }
        ],
        "policies": [
            {
                "name": "push",
                "interventions": [{"feature": "direction_resid_post_1", "add": 8.0}],
            }
        ],
    }
    folder.mkdir(parents=True)
    (folder / "catalog.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    save_file(tensors, folder / "features.safetensors")
    return folder


D_SAE, K = 512, 16
NUM_TOPK = 3
"""How many latents of a dictionary are features."""
TOPK = ((1, "resid_post", "sae_latent"), (2, "mlp_in", "transcoder_latent"))


def add_topk(folder: Path, model: Path, seed: int = 2) -> None:
    """Add a TopK dictionary at each place of ``TOPK``, ``wide_<site>_<layer>``, and features in it.

    Those are ``topk<i>_<site>_<layer>``, active on some tokens, and on others above zero without
    being among the k largest.
    """
    rng = np.random.default_rng(seed)
    document = yaml.safe_load((folder / "catalog.yaml").read_text())
    tensors = load_file(folder / "features.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    streams = _streams(loaded, prompts(40, seed=1000 + seed, low=8, high=100))
    document["dictionaries"] = []
    for layer, site, kind in TOPK:
        owner, at = f"wide_{site}_{layer}", {"site": site, "layer": layer}
        document["dictionaries"].append({"name": owner, **at, "d_sae": D_SAE, "k": K})
        W_enc, b_enc, acts = _dictionary(streams[layer, site], rng)
        tensors |= {f"{owner}.W_enc": W_enc, f"{owner}.b_enc": b_enc}
        written = streams[layer, "mlp_out" if site == "mlp_in" else site]
        for i in range(NUM_TOPK):
            feature = {"name": f"topk{i}_{site}_{layer}", "kind": kind, **at}
            feature |= {"activation": "topk", "dictionary": owner, "latent": _latent(i)}
            feature["evidence"] = {
                "spread": float(acts[:, i].std()),
                "active_share": float((acts[:, i] > 0).mean()),
                "written_norm": float(np.median(np.linalg.norm(written, axis=1))),
            }
            document["features"].append(feature)
            tensors[f"{feature['name']}.W_dec"] = unit(rng)
    (folder / "catalog.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    save_file(tensors, folder / "features.safetensors")


def _latent(i: int) -> int:
    return 100 * i + 7


def _dictionary(x_TD: npt.NDArray[np.float32], rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Encoder, bias, and what its features are on ``x_TD``, which their bias is chosen by."""
    W_enc = np.stack([unit(rng) for _ in range(D_SAE)])
    pre = x_TD @ W_enc.T
    b_enc = rng.normal(0, 0.1 * pre.std(), D_SAE).astype(np.float32)
    kth = np.sort(pre + b_enc, axis=1)[:, -K]
    latents = [_latent(i) for i in range(NUM_TOPK)]
    for latent in latents:
        b_enc[latent] = np.quantile(kth - pre[:, latent], ACTIVE_SHARE)
    pre += b_enc
    is_kept = pre >= np.sort(pre, axis=1)[:, -K, None]
    return W_enc, b_enc, np.where(is_kept, pre.clip(0), 0)[:, latents]


class Plan(NamedTuple):
    """One feature to make at each of ``sites``."""

    stem: str
    kind: str
    activation: str
    sites: tuple[str, ...]


PLANS = (
    Plan("direction", "direction", "identity", SITES),
    Plan("latent", "sae_latent", "jumprelu", SITES),
    Plan("transcoder", "transcoder_latent", "relu", ("mlp_in",)),
    Plan("probe", "probe", "identity", ("resid_post",)),
)


@torch.no_grad()
def _streams(
    model: nn.Module, sequences: list[list[int]]
) -> dict[tuple[int, str], npt.NDArray[np.float32]]:
    """What each site of ``LAYERS`` holds at every token, [T, D], in forward order."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles = []
    for layer in LAYERS:
        for site in SITES:
            kept = seen.setdefault((layer, site), [])

            def keep(x_TD: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
                kept.append(x_TD.clone())

            handles.append(at_site(model, layer, site, keep))
    for sequence in sequences:
        model(torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(kept).numpy() for key, kept in seen.items()}


def _vectors(
    plan: Plan, x_TD: npt.NDArray[np.float32], rng: np.random.Generator
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, float]]:
    """The feature's tensors, and how it behaves on ``x_TD``."""
    W_enc = unit(rng)
    read = x_TD @ W_enc
    spread = float(read.std())
    threshold = 0.3 * spread if plan.activation == "jumprelu" else 0.0
    if plan.activation == "identity":
        bias = float(rng.normal(0, 0.1 * spread))
    else:
        bias = threshold - float(np.quantile(read, 1 - ACTIVE_SHARE))
    vectors = {"W_enc": W_enc, "b_enc": np.array([bias], np.float32)}
    if plan.activation == "jumprelu":
        vectors["threshold"] = np.array([threshold], np.float32)
    if plan.kind != "probe":
        vectors["W_dec"] = unit(rng)
    return vectors, {"spread": spread, "active_share": float((read + bias > threshold).mean())}


def unit(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A random direction."""
    vector = rng.normal(size=D_MODEL)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _fingerprint(loaded: nn.Module, model: Path) -> dict[str, Any]:
    embedding = next(n for n, p in loaded.named_parameters() if p.shape == (VOCAB_SIZE, D_MODEL))
    return {
        "architecture": loaded.config.architectures[0],
        "hidden_size": D_MODEL,
        "num_hidden_layers": NUM_LAYERS,
        "vocab_size": VOCAB_SIZE,
        "weights": {embedding: stored_digest(model, embedding)},
    }


def stored_digest(model: Path, name: str) -> str:
    """SHA-256 of the tensor's bytes as stored, bfloat16 too (which numpy cannot hold)."""
    with safe_open(model / "model.safetensors", framework="torch") as tensors:
        raw = tensors.get_tensor(name).contiguous().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def interventions(catalog: Path) -> dict[str, list[dict[str, Any]]]:
    """Named interventions for a catalog of ``write_catalog``, strong enough to change the output.

    Strengths are multiples of the median norm of what is written, so they suit every
    architecture and site.
    """
    document = yaml.safe_load((catalog / "catalog.yaml").read_text())
    size = {f["name"]: f["evidence"]["written_norm"] for f in document["features"]}

    def edit(name: str, op: str, times: float, **narrowed: Any) -> dict[str, Any]:
        return {"feature": name, op: round(times * size[name], 3), **narrowed}

    named = {
        "clamp": [edit("latent_resid_post_1", "clamp", 1.0)],
        "ablate": [
            {"feature": name, "ablate": True}
            for name in size
            if name.startswith("latent_") and name.endswith("_1")
        ],
        "ablate_direction": [{"feature": "direction_resid_mid_2", "ablate": True}],
        "scale": [{"feature": "direction_resid_post_2", "scale": -6.0}],
        "scale_active": [{"feature": "latent_resid_pre_2", "scale": 8.0, "only_if_active": True}],
        "add": [edit("direction_resid_mid_1", "add", 0.8)],
        "at_least": [edit("latent_mlp_out_1", "at_least", 2.0)],
        "at_most": [edit("direction_resid_pre_1", "at_most", -0.8)],
        "two_at_one_site": [
            edit("direction_resid_mid_2", "add", 0.6),
            edit("latent_resid_mid_2", "clamp", 0.6),
        ],
        "two_layers": [
            edit("direction_resid_post_1", "add", 0.5),
            edit("latent_resid_mid_2", "clamp", 0.5),
        ],
        "when": [
            edit(
                "direction_resid_post_2",
                "clamp",
                1.0,
                when={"feature": "probe_resid_post_2", "above": 0.0},
            )
        ],
        "span": [edit("direction_resid_post_1", "add", 2.0, span=[1, 9])],
        "prompt_only": [edit("direction_resid_post_1", "add", 1.0, phase="prompt")],
        "generation_only": [edit("direction_resid_post_1", "add", 1.0, phase="generation")],
        "transcoder": [edit("transcoder_mlp_in_1", "clamp", 2.0)],
        "transcoder_beside_its_sites": [
            edit("transcoder_mlp_in_2", "add", 1.0),
            edit("direction_mlp_in_2", "add", 0.5),
            edit("direction_mlp_out_2", "clamp", 0.5),
        ],
        "every_site": [edit(f"direction_{site}_1", "add", 0.5) for site in SITES],
    }
    for site in SITES:
        named[f"at_{site}"] = [edit(f"direction_{site}_2", "clamp", 2.0)]
    if "topk0_resid_post_1" in size:
        named |= _topk_interventions(edit)
    return named


def _topk_interventions(edit: Callable[..., dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    active = {"only_if_active": True}
    gate = {"when": {"feature": "topk1_resid_post_1", "above": 0.0}}
    return {
        "topk_clamp": [edit("topk0_resid_post_1", "clamp", 1.0)],
        "topk_ablate": [
            {"feature": f"topk{i}_{site}_{layer}", "ablate": True}
            for layer, site, _ in TOPK
            for i in range(NUM_TOPK)
        ],
        "topk_scale_active": [{"feature": "topk1_resid_post_1", "scale": 8.0, **active}],
        "topk_gates": [edit("direction_resid_post_1", "add", 1.0, **gate)],
        "topk_transcoder": [edit("topk0_mlp_in_2", "clamp", 2.0)],
        "topk_transcoder_active": [{"feature": "topk1_mlp_in_2", "scale": -9.0, **active}],
        "topk_beside_others": [
            edit("topk2_resid_post_1", "at_least", 0.5),
            edit("latent_resid_post_1", "clamp", 0.5),
            edit("topk2_mlp_in_2", "add", 1.0, phase="generation"),
            edit("transcoder_mlp_in_2", "add", 1.0),
        ],
    }
