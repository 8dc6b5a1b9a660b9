import json
import math

import pytest
from steerscope.errors import SpecError
from steerscope.steering.interventions import Op, parse_spec


def spec(*interventions: dict) -> str:
    return json.dumps({"interventions": list(interventions)})


@pytest.mark.parametrize(
    ("op", "value", "expected"),
    [
        ("clamp", 6.0, 6.0),
        ("ablate", True, 0.0),
        ("at_least", 1, 1.0),
        ("at_most", -2.5, -2.5),
        ("scale", 0, 0.0),
        ("add", 3.25, 3.25),
    ],
)
def test_each_operation_is_read_with_its_value(op, value, expected):
    (intervention,) = parse_spec(spec({"feature": "f", op: value})).interventions
    assert intervention.op is Op(op)
    assert intervention.value == expected


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", ""),
        ("{}", ""),
        ("[]", ""),
        ('{"interventions": []}', "interventions"),
        ('{"interventions": [{}]}', "interventions[0]"),
        (spec({"feature": "f"}), "interventions[0]"),
        (spec({"feature": "f", "clamp": 1, "add": 2}), "interventions[0]"),
        (spec({"feature": "f", "clamp": "high"}), "interventions[0].clamp"),
        (spec({"feature": "f", "clamp": 1}, {"feature": 3, "add": 1}), "interventions[1].feature"),
        (spec({"feature": "f", "clamp": 1, "dose": 2}), "interventions[0]"),
        (spec({"feature": "f", "clamp": 1, "phase": "sometimes"}), "interventions[0].phase"),
        (spec({"feature": "f", "ablate": False}), "interventions[0].ablate"),
        (spec({"feature": "f", "clamp": 1, "when": {"feature": "g"}}), "interventions[0].when"),
        (spec({"feature": "f", "clamp": 1, "span": [5, 5]}), "interventions[0].span"),
        (spec({"feature": "f", "clamp": 1, "span": [-1, 5]}), "interventions[0].span"),
        (spec({"feature": "f", "clamp": 1, "span": [1, 2, 3]}), "interventions[0].span"),
        (spec({"feature": "f", "clamp": math.nan}), ""),
        ('{"interventions": [{"feature": "f", "clamp": 1e999}]}', "interventions[0].clamp"),
        (
            spec({"feature": "f", "clamp": 1}, {"feature": "f", "add": 1}),
            "interventions[1].feature",
        ),
        (spec(*[{"feature": f"f{i}", "clamp": 1} for i in range(17)]), "interventions"),
        ("[" * 5000, ""),
        ("x" * 70_000, ""),
        ('{"interventions": [{"feature": "\ud800", "clamp": 1}]}', ""),
    ],
)
def test_a_malformed_spec_is_refused_and_the_field_named(text, field):
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ({"phase": "prompt"}, {"phase": "generation"}, False),
        ({"phase": "prompt"}, {"phase": "all"}, True),
        ({"span": [0, 3]}, {"span": [3, 6]}, False),
        ({"span": [0, 4]}, {"span": [3, 6]}, True),
        ({"span": [0, 4]}, {}, True),
    ],
)
def test_two_edits_of_one_feature_may_not_meet_at_a_token(first, second, meet):
    text = spec({"feature": "f", "clamp": 1, **first}, {"feature": "f", "add": 1, **second})
    if meet:
        with pytest.raises(SpecError, match="already edited"):
            parse_spec(text)
    else:
        assert len(parse_spec(text).interventions) == 2
