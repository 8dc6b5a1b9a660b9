"""Where dashboards and runbooks are found: stable ids, and the links that alerts carry."""

from __future__ import annotations

import enum
from typing import Final

from steerscope_dashboards.settings import Settings

OWN_TAG: Final = "steerscope"
TAGS: Final = ("vllm", OWN_TAG)
"""``vllm`` puts ours into the drop-down of vLLM's own dashboards."""


class Board(enum.StrEnum):
    """A dashboard's uid, which never changes: bookmarks and alerts hold it."""

    OVERVIEW = "steerscope-overview"
    FEATURE = "steerscope-feature"
    STEERING = "steerscope-steering"
    PIPELINE = "steerscope-pipeline"


def runbook_url(settings: Settings, alert: str) -> str:
    """The alert's runbook."""
    return f"{settings.runbooks}/{alert}.md"


def board_url(settings: Settings, board: Board, labels: frozenset[str]) -> str:
    """The dashboard, showing the model, engine and feature that such an alert is about."""
    shown = {"model_name": "model", "engine": "engine", "feature": "feature"}
    query = "&".join(
        f"var-{variable}={{{{ $labels.{label} | urlquery }}}}"
        for label, variable in shown.items()
        if label in labels
    )
    return f"{settings.grafana}/d/{board}" + (f"?{query}" if query else "")
