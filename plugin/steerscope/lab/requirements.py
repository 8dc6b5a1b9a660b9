"""Requirements on a report: ``hallucination_risk.auroc>=0.8`` holds, or is told as unmet.

The left side is a dotted path into the report. Where it ends at an estimate, its ``value`` is
meant; ``.low`` and ``.high`` are its bounds.
"""

from __future__ import annotations

import enum
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from steerscope.errors import LabError

_FORM: Final = re.compile(r"\s*([\w-]+(?:\.[\w-]+)*)\s*(>=|<=|>|<)\s*(\S+)\s*")


class RequirementError(LabError):
    """A requirement is malformed, or asks for what the report does not have."""


class Comparison(enum.StrEnum):
    """How a value must relate to the bound."""

    AT_LEAST = ">="
    AT_MOST = "<="
    ABOVE = ">"
    BELOW = "<"


_HOLDS: Final[Mapping[Comparison, Callable[[float, float], bool]]] = MappingProxyType(
    {
        Comparison.AT_LEAST: operator.ge,
        Comparison.AT_MOST: operator.le,
        Comparison.ABOVE: operator.gt,
        Comparison.BELOW: operator.lt,
    }
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One number of the report against a bound."""

    path: tuple[str, ...]
    comparison: Comparison
    bound: float

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}{self.comparison}{self.bound:g}"


@dataclass(frozen=True, slots=True)
class Unmet:
    """A requirement that does not hold; ``value`` is None where the report has no number."""

    requirement: Requirement
    value: float | None
    reason: str


def parse(text: str) -> Requirement:
    """Read ``<path><comparison><number>``; raise ``RequirementError`` where it is not that."""
    form = _FORM.fullmatch(text)
    if form is None:
        raise RequirementError(
            f"requirement {text!r}: must read like 'hallucination_risk.auroc>=0.8'"
        )
    path, comparison, bound = form.groups()
    try:
        number = float(bound)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RequirementError(f"requirement {text!r}: {bound!r} is not a finite number")
    return Requirement(tuple(path.split(".")), Comparison(comparison), number)


def check(requirements: Iterable[Requirement], report: Mapping[str, object]) -> list[Unmet]:
    """Return the requirements that do not hold.

    A metric that is not defined does not meet anything; ``undefined`` beside it says why.

    Raises:
        RequirementError: a path leads to nothing, or to what is not a number.
    """
    checked = (_check(requirement, report) for requirement in requirements)
    return [unmet for unmet in checked if unmet is not None]


def _check(requirement: Requirement, report: Mapping[str, object]) -> Unmet | None:
    found = _find(requirement, report)
    if isinstance(found, str):
        return Unmet(requirement, None, found)
    if math.isnan(found):
        return Unmet(requirement, None, "is not a number in the report")
    if _HOLDS[requirement.comparison](found, requirement.bound):
        return None
    return Unmet(requirement, found, f"is {found:.6g}")


def _find(requirement: Requirement, report: Mapping[str, object]) -> float | str:
    """The number that the path leads to, or why the report has none."""
    here: object = report
    for depth, key in enumerate(requirement.path):
        if not isinstance(here, Mapping):
            raise RequirementError(f"{requirement}: {_told(requirement, depth)} has no parts")
        if key not in here:
            exist = ", ".join(sorted(map(str, here))) or "nothing"
            raise RequirementError(
                f"{requirement}: no {key!r} in {_told(requirement, depth)}, which has: {exist}"
            )
        if here[key] is None:
            return _why(here, key)
        here = here[key]
    if isinstance(here, Mapping) and "value" in here:
        here = here["value"]
    if isinstance(here, bool) or not isinstance(here, int | float):
        raise RequirementError(f"{requirement}: the report has {_kind(here)} there, not a number")
    return float(here)


def _why(around: Mapping[str, object], key: str) -> str:
    reasons = around.get("undefined")
    reason = reasons.get(key) if isinstance(reasons, Mapping) else None
    return f"is not defined: {reason}" if reason else "is not defined"


def _told(requirement: Requirement, depth: int) -> str:
    return repr(".".join(requirement.path[:depth])) if depth else "the report"


def _kind(found: object) -> str:
    if isinstance(found, Mapping):
        return "parts (" + ", ".join(sorted(map(str, found))) + ")"
    return f"a {type(found).__name__}"
