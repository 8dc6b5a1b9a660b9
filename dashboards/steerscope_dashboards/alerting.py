"""What an alerting rule is: conditions that are judged, floors beneath which it is silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from steerscope_dashboards.pages import Board, board_url, runbook_url
from steerscope_dashboards.promql import Vector, number
from steerscope_dashboards.settings import Settings

Operator = Literal[">", "<", ">="]
Severity = Literal["critical", "warning", "none"]
"""``none`` is for nobody to act on: it goes to a dead man's switch."""


class Condition(NamedTuple):
    """A vector and where it must lie. What it is judged by comes first, floors after it."""

    vector: Vector
    operator: Operator
    bound: float

    def __str__(self) -> str:
        return f"{self.vector} {self.operator} {number(self.bound)}"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alerting rule."""

    name: str
    severity: Severity
    board: Board
    hold: str
    """How long it must hold before anybody is told."""
    summary: str
    description: str
    conditions: tuple[Condition, ...] = ()
    window: str = ""
    """Tells rules of one name apart, where there are several."""
    absence: Vector | None = None
    """Instead of conditions: fires where this is missing, and answers nothing otherwise."""

    @property
    def labels(self) -> frozenset[str]:
        """Labels that its instances carry, beside what the rule adds."""
        judged = self.absence or self.conditions[0].vector
        return judged.labels

    @property
    def expression(self) -> str:
        """The rule's expression."""
        if self.absence is not None:
            return str(self.absence)
        joined = f"\nand on ({', '.join(sorted(self.labels))})\n"
        return joined.join(str(condition) for condition in self.conditions)

    @property
    def rule_labels(self) -> dict[str, str]:
        """What the rule adds to its instances' labels."""
        window = {"window": self.window} if self.window else {}
        return {"severity": self.severity, **window}

    def annotations(self, settings: Settings) -> dict[str, str]:
        """What its reader gets."""
        return {
            "summary": self.summary,
            "description": self.description,
            "runbook_url": runbook_url(settings, self.name),
            "dashboard_url": board_url(settings, self.board, self.labels),
        }
