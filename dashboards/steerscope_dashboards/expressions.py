"""Every expression that is shipped: of panels, variables, recording rules and alerts."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from steerscope.export.instruments import CANARY_RUNS, CANARY_SCORE

from steerscope_dashboards.alerts import VLLM_RUNNING, alerts
from steerscope_dashboards.recording import recordings
from steerscope_dashboards.settings import Settings

EVERYTHING: Final = ".*"
NEED_VLLM: Final = (VLLM_RUNNING, CANARY_SCORE.name, f"{CANARY_RUNS.name}{{")
"""Its own metrics, scores of the canary's questions, and a share of how many of them passed."""
VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(("model", "engine", "signal", "feature"), EVERYTHING)
)
_VARIABLE: Final = re.compile(r"\$\{?([a-z_A-Z]+)\}?")


class Role(enum.StrEnum):
    """What an expression is for, and so what an answer to it is."""

    PANEL = "panel"
    VARIABLE = "variable"
    RECORDING = "recording"
    CONDITION = "condition"
    """What an alert compares, without the comparison: it has a value also when all is well."""
    ALERT = "alert"
    """The whole rule: it must be understood, and is empty when all is well."""


class Expression(NamedTuple):
    """One expression and where it stands."""

    role: Role
    where: str
    text: str

    @property
    def needs_vllm(self) -> bool:
        """Whether a vLLM must be scraped too, or have answered the canary."""
        return any(part in self.text for part in NEED_VLLM)

    def filled(
        self, rate_interval: str, time_range: str, chosen: Mapping[str, str] = VARIABLES
    ) -> str:
        """The text as Grafana would send it; what is not ``chosen`` is everything."""
        values = {
            **VARIABLES,
            **chosen,
            "__rate_interval": rate_interval,
            "__range": time_range,
        }
        return _VARIABLE.sub(lambda found: values[found[1]], self.text)


class Shown(NamedTuple):
    """A panel of a dashboard as it is on disk."""

    board: str
    title: str
    kind: str
    description: str
    unit: str
    targets: tuple[tuple[str, str], ...]
    """Expressions with their legends."""


def expressions(settings: Settings, generated: Path) -> list[Expression]:
    """All of them. Absence alerts have no condition: promtool tests them."""
    found = [
        Expression(Role.PANEL, f"{panel.board} / {panel.title}", text)
        for path in boards(generated)
        for panel in panels(path)
        for text, _ in panel.targets
    ]
    found += [variable for path in boards(generated) for variable in variables(path)]
    for recorded in recordings(settings):
        found.append(Expression(Role.RECORDING, recorded.name, str(recorded.vector)))
        found.append(Expression(Role.RECORDING, recorded.name, recorded.name))
    for alert in alerts(settings):
        found.append(Expression(Role.ALERT, alert.name, alert.expression))
        found += [
            Expression(Role.CONDITION, alert.name, str(condition.vector))
            for condition in alert.conditions
        ]
    return found


def boards(generated: Path) -> list[Path]:
    """The dashboards' files."""
    return sorted(generated.glob("*.json"))


def panels(path: Path) -> Iterator[Shown]:
    """A dashboard's panels, in their order."""
    tree = _tree(path)
    for panel in tree["panels"]:
        if panel["type"] != "row":
            yield Shown(
                tree["uid"],
                panel["title"],
                panel["type"],
                panel["description"],
                panel.get("fieldConfig", {}).get("defaults", {}).get("unit", ""),
                tuple((t["expr"], t.get("legendFormat", "")) for t in panel["targets"]),
            )


def variables(path: Path) -> Iterator[Expression]:
    """A dashboard's queried variables."""
    tree = _tree(path)
    for variable in tree["templating"]["list"]:
        if variable["type"] == "query":
            where = f"{tree['uid']} / ${variable['name']}"
            yield Expression(Role.VARIABLE, where, variable["query"])


def _tree(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree
