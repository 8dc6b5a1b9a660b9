"""Small case files of the embedded world, and what ``lab discover`` finds with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import on_engine, ran

SIZES = {
    "positive": (120, 30, 40),
    "negative": (120, 30, 40),
    "side": (30, 20, 20),
    "evaluation": (0, 40, 60),
}


@pytest.fixture(scope="session")
def case_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small case files of the embedded world."""
    folder = tmp_path_factory.mktemp("cases")
    for name, (fit, dev, test) in SIZES.items():
        out = folder / f"{name}.jsonl"
        ran("demo", "cases", name, "--fit", fit, "--dev", dev, "--test", test, "--out", out)
    ran("demo", "cases", "declines", "--out", folder / "declines.txt")
    return folder


@pytest.fixture(scope="session")
def discovered(case_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``lab discover`` from scratch: no dictionary, no layer, no token is told to it."""
    out = tmp_path_factory.mktemp("discovered") / "out"
    ran(
        *("lab", "discover", "--name", "known_entity", "--opposite", "unknown_entity"),
        *("--label", "known", "--positive", case_files / "positive.jsonl"),
        *("--negative", case_files / "negative.jsonl", "--side", case_files / "side.jsonl"),
        *("--out", out, *on_engine(case_files)),
    )
    return out
