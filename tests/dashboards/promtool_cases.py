"""Unit tests of alerts as data, and promtool to run them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from steerscope.export import instruments as names

TARGET = {"job": "steerscope", "instance": "hub:9464"}
ENGINE = {"model_name": "org/model", "engine": "0"}
RUNBOOKS = "https://steerscope.example/runbooks"
GRAFANA = "https://grafana.example/d"


@dataclass(frozen=True)
class Fired:
    """An alert as its reader gets it; links are added."""

    labels: Mapping[str, str]
    summary: str
    description: str
    board: str

    def expected(self, alert: str) -> dict[str, dict[str, str]]:
        shown = {"model_name": "model", "engine": "engine", "feature": "feature"}
        query = "&".join(
            f"var-{variable}={self.labels[label].replace('/', '%2F')}"
            for label, variable in shown.items()
            if label in self.labels
        )
        return {
            "exp_labels": dict(self.labels),
            "exp_annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{RUNBOOKS}/{alert}.md",
                "dashboard_url": f"{GRAFANA}/{self.board}" + (f"?{query}" if query else ""),
            },
        }


@dataclass(frozen=True)
class Case:
    """Series in, alerts out. ``why`` is the sentence that the case proves."""

    why: str
    alert: str
    at: str
    series: Mapping[str, str]
    fired: Sequence[Fired] = field(default=())

    def __str__(self) -> str:
        return f"{self.alert}: {self.why}".replace(" ", "-")


def series(name: str, /, **labels: str) -> str:
    """A series' name and labels, those of the target included."""
    pairs = ", ".join(f'{k}="{v}"' for k, v in {**TARGET, **labels}.items())
    return f"{name}{{{pairs}}}"


def labelled(signal: str = "hallucination_risk", **per_minute: float) -> dict[str, str]:
    """Finished sequences by label."""
    return {
        series(names.SIGNAL_REQUESTS.name, **ENGINE, signal=signal, label=label): steady(count)
        for label, count in per_minute.items()
    }


def scores(above: str, count: str) -> dict[str, str]:
    """Scored sequences: how many of them at most at the objective's score, and all."""
    base = names.SIGNAL_SCORE.name
    signal = {**ENGINE, "signal": "hallucination_risk"}
    return {
        series(f"{base}_bucket", **signal, le="0.9"): above,
        series(f"{base}_count", **signal): count,
        series(names.SIGNAL_REQUESTS.name, **signal, label="low"): count,
    }


def steady(per_minute: float, minutes: int = 400) -> str:
    """A counter that grows evenly, in promtool's notation."""
    return f"0+{per_minute:g}x{minutes}"


def run(cases: Sequence[Case], rules: Sequence[Path], folder: Path) -> str:
    """What promtool says of them; empty when all of them hold."""
    tests = [
        {
            "interval": "1m",
            "name": str(case),
            "input_series": [{"series": k, "values": v} for k, v in case.series.items()],
            "alert_rule_test": [
                {
                    "eval_time": case.at,
                    "alertname": case.alert,
                    "exp_alerts": [fired.expected(case.alert) for fired in case.fired],
                }
            ],
        }
        for case in cases
    ]
    tree = {
        "rule_files": [str(path.resolve()) for path in rules],
        "evaluation_interval": "1m",
        "tests": tests,
    }
    path = folder / "cases.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    done = subprocess.run(
        ["promtool", "test", "rules", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr
