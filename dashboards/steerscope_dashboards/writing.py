"""All files that are made here, and whether those on disk are the same."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from steerscope_dashboards import rules
from steerscope_dashboards.feature import feature
from steerscope_dashboards.overview import overview
from steerscope_dashboards.pipeline import pipeline
from steerscope_dashboards.settings import Settings
from steerscope_dashboards.steering import steering

BOARDS: Final = (overview, feature, steering, pipeline)


def files(settings: Settings) -> dict[str, str]:
    """Every generated file's text, by its name."""
    boards = [make(settings) for make in BOARDS]
    return {
        "recording.rules.yaml": rules.recording_file(settings),
        "alerting.rules.yaml": rules.alert_file(settings),
        "prometheusrule.yaml": rules.operator_file(settings),
        **{f"{made.uid}.json": _encode(made) for made in boards},
    }


def write(wanted: Mapping[str, str], folder: Path) -> None:
    """Write them; what else is in the folder may be somebody's, and stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


def differences(wanted: Mapping[str, str], folder: Path) -> Iterator[str]:
    """How the folder differs from what would be written, line by line."""
    for name in sorted({path.name for path in folder.glob("*")} - set(wanted)):
        yield f"{folder / name}: is not made here; remove it"
    for name, text in wanted.items():
        path = folder / name
        have = path.read_text(encoding="utf-8") if path.exists() else ""
        yield from difflib.unified_diff(
            have.splitlines(), text.splitlines(), str(path), "as it would be made", lineterm=""
        )


def _encode(made: Dashboard) -> str:
    tree = json.loads(JSONEncoder().encode(made))
    return json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
