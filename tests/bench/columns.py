"""The engines that are compared, by the names of their columns.

``null`` (plain once more: what the others' figures are worth; ``null-2`` and so on tell how far
processes that do the same differ), ``eager`` (plain with ``enforce_eager``, which plugins that hook
layers force; for scale), ``inert`` (installed, not configured), ``idle`` (one feature, nothing
asked), ``observe-F[xL]`` (F features over L layers, or ``all``), ``steer-P`` (64 features, P
policies in rotation).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engine_pair import EngineSpec
from random_model import write_config

COLUMN = re.compile(r"(null(?:-\d)?|eager|inert|idle)|observe-(\d+)(?:x(\d+|all))?|steer-(\d+)")
CONCURRENCY = (1, 8, 64)
ENGINE_ARGS = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 64}


def spec(name: str, model: Path, shape: dict[str, int], folder: Path) -> EngineSpec:
    """The engine of a column; writes what it is configured by."""
    found = COLUMN.fullmatch(name)
    if found is None:
        raise SystemExit(f"no column {name!r}")
    engine_args = {**ENGINE_ARGS, "enforce_eager": name == "eager"}
    if found[1] and name != "idle":
        return EngineSpec(name, model, engine_args=engine_args)
    num_features = 1 if name == "idle" else int(found[2] or 64)
    num_layers = shape["num_hidden_layers"] if found[3] == "all" else int(found[3] or 1)
    steering = {p: policies(p, int(found[4] or 0)) for p in ("all", "generation")}
    config = write_config(
        folder / name, shape, num_features, num_layers, [*steering["all"], *steering["generation"]]
    )
    names = {phase: [each["name"] for each in made] for phase, made in steering.items()}
    return EngineSpec(name, model, config, names, engine_args)


def policies(phase: str, count: int) -> list[dict[str, Any]]:
    """No two alike."""
    return [
        {
            "name": f"{phase}-{i}",
            "interventions": [
                {"feature": f"feature_{i % 64}", "add": 0.5 + i / 1000, "phase": phase}
            ],
        }
        for i in range(count)
    ]
