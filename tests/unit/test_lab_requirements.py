"""A requirement on a report holds, is unmet for a reason, or is refused as meaningless."""

import msgspec
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")

from steerscope.lab.requirements import Comparison, Requirement, RequirementError, check, parse
from steerscope.lab.statistics import evaluate_scores

REPORT = {
    "hallucination_risk": {
        "auroc": {"value": 0.85, "low": 0.8, "high": 0.9},
        "num_cases": 120,
        "among_answers": {"auroc": {"value": 0.8, "low": 0.65, "high": 0.88}},
    },
    "steering": {"force-known": {"flip_rate": 0.95, "name": "force-known", "exact": True}},
    "broken": {"psi": float("nan")},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("risk.auroc>=0.8", Requirement(("risk", "auroc"), Comparison.AT_LEAST, 0.8)),
        ("  risk.auroc  <  1e-2 ", Requirement(("risk", "auroc"), Comparison.BELOW, 0.01)),
        ("a.b-c.d_1<=-3", Requirement(("a", "b-c", "d_1"), Comparison.AT_MOST, -3.0)),
        ("a>0", Requirement(("a",), Comparison.ABOVE, 0.0)),
    ],
)
def test_a_requirement_is_a_path_a_comparison_and_a_number(
    text: str, expected: Requirement
) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "auroc", "a==1", "a>=", ">=1", "a..b>=1", ".a>1", "a>=x", "a>=nan", "a>=inf", "a>=1 b>=2",
     "a=>1", "a>=>1", "a>=__import__('os')", "a b>=1"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RequirementError, match="requirement"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "hallucination_risk.auroc>=0.8",
        "hallucination_risk.auroc>=0.85",
        "hallucination_risk.auroc<=0.85",
        "hallucination_risk.auroc.low>0.79",
        "hallucination_risk.num_cases>100",
        "hallucination_risk.among_answers.auroc.low>=0.65",
        "steering.force-known.flip_rate>=0.9",
    ],
)
def test_what_holds_is_not_told(text: str) -> None:
    assert check([parse(text)], REPORT) == []


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        ("hallucination_risk.auroc>0.85", 0.85, "is 0.85"),
        ("hallucination_risk.auroc<0.85", 0.85, "is 0.85"),
        ("hallucination_risk.among_answers.auroc.low>=0.7", 0.65, "is 0.65"),
        ("broken.psi<1", None, "is not a number in the report"),
    ],
)
def test_what_does_not_hold_is_told_with_its_value(
    text: str, value: float | None, reason: str
) -> None:
    (unmet,) = check([parse("hallucination_risk.auroc>=0"), parse(text)], REPORT)
    assert (str(unmet.requirement), unmet.value, unmet.reason) == (text, value, reason)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("risk.auroc>=0.8", "no 'risk' in the report, which has: broken, hallu"),
        (
            "hallucination_risk.auprc>=0.8",
            "no 'auprc' in 'hallucination_risk', which has: among_answers, auroc, num_cases",
        ),
        ("hallucination_risk.num_cases.low>=1", "'hallucination_risk.num_cases' has no parts"),
        ("steering.force-known>=1", r"parts \(exact, flip_rate, name\) there, not a number"),
        ("steering.force-known.name>=1", "a str there, not a number"),
        ("steering.force-known.exact>=1", "a bool there, not a number"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(RequirementError, match=message):
        check([parse(text)], REPORT)


@pytest.mark.parametrize("path", ["risk.auroc", "risk.auroc.low"])
@pytest.mark.parametrize("comparison", [">=", "<"])
def test_a_metric_that_is_not_defined_meets_nothing(path: str, comparison: str) -> None:
    found = evaluate_scores(
        [0.1, 0.2], np.array([True, True]), ["a", "b"], probabilities=True, seed=0
    )
    (unmet,) = check([parse(f"{path}{comparison}0.5")], {"risk": msgspec.to_builtins(found)})
    assert unmet.value is None
    assert unmet.reason == "is not defined: no scored case is negative"
