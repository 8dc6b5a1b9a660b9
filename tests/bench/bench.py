"""What Steerscope costs: decode steps and prefills against plain compiled vLLM, in one run.

    python tests/bench/bench.py [--model demo|medium] [--out bench.json] [--columns ...] [--quick]

Columns: ``inert`` (installed, not configured), ``observe-F[xL]`` (F features over L layers),
``steer-P`` (64 features, P distinct policies in rotation). Each column runs beside plain vLLM,
step by step; see ``engine_pair.py``. Prints a Markdown table; ``--out`` keeps everything.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import engine_pair
import numpy as np
import yaml
from engine_pair import Child, in_turn, ratio
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file
from steerscope.demo.live.server import free_ports

COLUMNS = ("inert", "observe-16", "observe-64", "observe-256", "observe-1024", "observe-64x4")
STEERED = ("steer-1", "steer-16", "steer-64", "steer-256", "steer-1000")
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
"""Random weights. ``demo`` has the embedded model's geometry: the worst case for host costs."""
STEPS = {"demo": 40, "medium": 8}
"""How many steps of one engine go by before the other's turn."""
ROUNDS = {"demo": 40, "medium": 16}
CONCURRENCY = (1, 8, 64)
PROMPT_TOKENS = 32
PREFILL_TOKENS = 1024


def write_model(folder: Path, name: str) -> Path:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SHAPES[name]
    config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=True)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def write_config(folder: Path, shape: dict[str, int], num_features: int, num_layers: int) -> Path:
    """A catalog of relu latents spread over layers, and a config that names it."""
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
    }
    catalog = folder / "catalog"
    catalog.mkdir(parents=True)
    (catalog / "catalog.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    save_file(tensors, catalog / "features.safetensors")
    grpc_port, http_port = free_ports(2)
    hub = {"grpc_address": f"127.0.0.1:{grpc_port}", "http_address": f"127.0.0.1:{http_port}"}
    config = folder / "steerscope.yaml"
    config.write_text(yaml.safe_dump({"catalog": str(catalog), "hub": hub}))
    return config


def policies(count: int) -> list[str]:
    """Inline edits, no two alike."""
    edits = ({"feature": f"feature_{i % 64}", "add": 0.5 + i / 1000} for i in range(count))
    return [json.dumps({"interventions": [edit]}) for edit in edits]


class Column:
    """One way to run Steerscope, beside plain vLLM."""

    def __init__(self, name: str, shape: dict[str, int], folder: Path) -> None:
        self.name = name
        self.config: Path | None = None
        self.steering: list[str] = []
        found = re.fullmatch(r"(inert)|observe-(\d+)(?:x(\d+))?|steer-(\d+)", name)
        if found is None:
            raise SystemExit(f"no column {name!r}")
        if found[2]:
            self.config = write_config(folder / name, shape, int(found[2]), int(found[3] or 1))
        if found[4]:
            self.config = write_config(folder / name, shape, 64, 1)
            self.steering = policies(int(found[4]))


@contextmanager
def started(
    column: Column, model: Path, folder: Path, engine_args: dict[str, Any]
) -> Iterator[tuple[Child, Child]]:
    """Plain vLLM and the column's engine, both warm."""
    with ExitStack() as stack:
        pair = []
        for name, config in (("plain", None), (column.name, column.config)):
            log = folder / f"{column.name}-{name}.log"
            child = Child(name, model, config, log, engine_args)
            stack.callback(child.close)
            pair.append(child)
        yield pair[0], pair[1]


def measure(column: Column, pair: Sequence[Child], model: str, scale: float) -> dict[str, Any]:
    """Decode at each concurrency, and long prefills."""
    rng = np.random.default_rng(7)
    vocab_size = SHAPES[model]["vocab_size"]
    rounds = max(4, round(ROUNDS[model] * scale))
    found: dict[str, Any] = {"decode": {}}
    plain, ours = pair
    for concurrency in CONCURRENCY:
        prompts = rng.integers(2, vocab_size, (concurrency, PROMPT_TOKENS)).tolist()
        max_tokens = 3000
        plain.ask("fill", prompts=prompts, steering=[], max_tokens=max_tokens)
        ours.ask("fill", prompts=prompts, steering=column.steering, max_tokens=max_tokens)
        in_turn(pair, "steps", 2, count=STEPS[model])
        before = _overhead(column)
        taken = in_turn(pair, "steps", rounds, count=STEPS[model])
        after = _overhead(column)
        for child in pair:
            child.ask("drain")
        sums = {name: [sum(one) for one in each] for name, each in taken.items()}
        steps = {name: np.concatenate(each) / 1e3 for name, each in taken.items()}
        found["decode"][concurrency] = {
            "throughput": asdict(ratio(sums["plain"], sums[column.name])),
            "step_us": {n: round(float(np.median(s)), 1) for n, s in steps.items()},
            "itl_p99_us": {n: round(float(np.quantile(s, 0.99)), 1) for n, s in steps.items()},
            "own_us": _mean(before, after),
        }
    prompts = rng.integers(2, vocab_size, (rounds, PREFILL_TOKENS)).tolist()
    times: dict[str, list[int]] = {child.name: [] for child in pair}
    for i, prompt in enumerate(prompts):
        for child in pair if i % 2 else (ours, plain):
            steering = column.steering[i % len(column.steering)] if column.steering else ""
            asked = steering if child is ours else ""
            times[child.name].append(child.ask("prefill", prompt=prompt, steering=asked))
    found["prefill"] = {
        "throughput": asdict(ratio(times["plain"][2:], times[column.name][2:])),
        "ms": {n: round(statistics.median(t) / 1e6, 2) for n, t in times.items()},
    }
    found["resident"] = {child.name: child.ask("resident") for child in pair}
    found["started_seconds"] = {c.name: round(c.info["started_seconds"], 2) for c in pair}
    return found


def _overhead(column: Column) -> tuple[float, float]:
    """Steerscope's own account: seconds spent in steps, and how many steps."""
    if column.config is None:
        return 0.0, 0.0
    address = yaml.safe_load(column.config.read_text())["hub"]["http_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
        samples = {s.name: s.value for family in families for s in family.samples}
    name = "steerscope_step_overhead_seconds"
    return samples.get(f"{name}_sum", 0.0), samples.get(f"{name}_count", 0.0)


def _mean(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    steps = after[1] - before[1]
    return round(1e6 * (after[0] - before[0]) / steps, 1) if steps else None


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each column."""
    head = "| | " + " | ".join(f"decode × {c}" for c in CONCURRENCY)
    lines = [f"{head} | own µs a step | prefill {PREFILL_TOKENS} |", "| --- " * 6 + "|"]
    for name, found in results.items():
        cells = [_cell(found["decode"][c]["throughput"]) for c in CONCURRENCY]
        own = " / ".join(str(found["decode"][c]["own_us"] or "-") for c in CONCURRENCY)
        lines.append(
            f"| {name} | {' | '.join(cells)} | {own} | {_cell(found['prefill']['throughput'])} |"
        )
    return "\n".join(lines)


def _cell(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--columns", nargs="*", default=[*COLUMNS, *STEERED])
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    results: dict[str, dict[str, Any]] = {}
    engine_args = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 64}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = write_model(folder / "model", arguments.model)
        for asked in arguments.columns:
            column = Column(asked, SHAPES[arguments.model], folder)
            with started(column, model, folder, engine_args) as pair:
                scale = 0.25 if arguments.quick else 1.0
                results[asked] = measure(column, pair, arguments.model, scale)
            print(json.dumps({asked: results[asked]}), file=sys.stderr, flush=True)
            if arguments.out:
                kept = {"commit": commit, "model": arguments.model, "columns": results}
                arguments.out.write_text(json.dumps(kept, indent=1))
    print(
        f"{arguments.model}, commit {commit}, {engine_pair.ENVIRONMENT['OMP_NUM_THREADS']} thread"
    )
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
