"""Every target: what runs, how its inputs are mutated, how long they may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fuzz_files
import fuzz_hub
import fuzz_lab
import fuzz_steering
import fuzz_trees
import fuzz_wires
from fuzz_trees import Codec

CORPUS = Path(__file__).parent / "corpus"
MAX_SEED_BYTES = 4096


class Target(NamedTuple):
    """``run`` takes an input and says whether it was accepted; an exception is a finding."""

    run: Callable[[bytes], bool]
    codec: Codec | None
    """None: only bytes are mutated."""


TARGETS: dict[str, Target] = {
    "spec": Target(fuzz_steering.spec, fuzz_trees.JSON),
    "admission": Target(fuzz_steering.admission, fuzz_trees.JSON),
    "stamps": Target(fuzz_steering.stamps, fuzz_trees.MSGPACK),
    "config": Target(fuzz_files.config, fuzz_trees.YAML),
    "identities": Target(fuzz_files.identities, fuzz_trees.YAML),
    "catalog_yaml": Target(fuzz_files.catalog_yaml, fuzz_trees.YAML),
    "catalog_tensors": Target(fuzz_files.catalog_tensors, fuzz_trees.TENSORS),
    "tensors": Target(fuzz_files.tensors, fuzz_trees.TENSORS),
    "npz": Target(fuzz_files.npz, None),
    "directions": Target(fuzz_files.directions, fuzz_trees.TENSORS),
    "linear_probe": Target(fuzz_files.linear_probe, fuzz_trees.TENSORS),
    "gguf": Target(fuzz_files.gguf, None),
    "dictionary_config": Target(fuzz_files.dictionary_config, fuzz_trees.YAML),
    "graph": Target(fuzz_files.graph, fuzz_trees.JSON),
    "model": Target(fuzz_files.model, fuzz_trees.JSON),
    "frames": Target(fuzz_wires.frames, fuzz_trees.MSGPACK),
    "control": Target(fuzz_wires.control, fuzz_trees.MSGPACK),
    "from_hub": Target(fuzz_wires.from_hub, fuzz_trees.MSGPACK),
    "engines": Target(fuzz_wires.engines, fuzz_trees.MSGPACK),
    "orders": Target(fuzz_wires.orders, fuzz_trees.MSGPACK),
    "rpcs": Target(fuzz_hub.rpcs, fuzz_trees.PROTO),
    "filters": Target(fuzz_hub.filters, fuzz_trees.TEXT),
    "kept": Target(fuzz_hub.kept, fuzz_trees.JSON),
    "kept_answers": Target(fuzz_hub.kept_answers, fuzz_trees.JSON),
    "kept_rules": Target(fuzz_hub.kept_rules, fuzz_trees.JSON),
    "cursors": Target(fuzz_hub.cursors, fuzz_trees.CURSOR),
    "audit": Target(fuzz_hub.audit, fuzz_trees.CHAIN),
    "cases": Target(fuzz_lab.cases, fuzz_trees.LINES),
    "requirements": Target(fuzz_lab.requirements, fuzz_trees.TEXT),
}


def seeds(name: str) -> list[Path]:
    """The target's seeds: ``ok-*`` are accepted, ``no-*`` are refused."""
    return sorted((CORPUS / name).iterdir())
