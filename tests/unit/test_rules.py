"""Which policy governs a request: default < inline < named < bound < override."""

import msgspec
import pytest
from steerscope.errors import SpecError
from steerscope.steering.rules import (
    Binding,
    Match,
    Override,
    OverrideMode,
    Rules,
    SteeringSource,
    Traits,
    check,
    ruling,
)

TEAM = Binding(name="team", match=Match(headers={"x-team": "red"}), policy="calm")
OFF_FOR_LORA = Binding(name="lora", match=Match(lora="tuned"))
RULES = Rules(default_policy="usual", bindings=(OFF_FOR_LORA, TEAM))
FORCED = msgspec.structs.replace(RULES, override=Override(mode=OverrideMode.FORCE, policy="all"))
OFF = msgspec.structs.replace(RULES, override=Override(mode=OverrideMode.OFF))
KNOWN = frozenset({"x-team", "x-tier"})


def outcome(rules, has_asked=False, **traits):
    found = ruling(rules, Traits(**traits), has_asked)
    return None if found is None else (found.source.value, found.policy, found.rule)


@pytest.mark.parametrize("has_asked", [False, True])
def test_an_override_beats_everything(has_asked):
    assert outcome(FORCED, has_asked, headers={"x-team": "red"}) == ("override", "all", "")
    assert outcome(OFF, has_asked, lora="tuned") == ("override", None, "")


@pytest.mark.parametrize("has_asked", [False, True])
def test_a_binding_beats_what_is_asked_and_the_first_that_matches_decides(has_asked):
    assert outcome(RULES, has_asked, headers={"x-team": "red"}) == ("bound", "calm", "team")
    both = {"lora": "tuned", "headers": {"x-team": "red"}}
    assert outcome(RULES, has_asked, **both) == ("bound", None, "lora")


def test_the_default_is_for_who_asks_for_nothing():
    assert outcome(RULES) == ("default", "usual", "")
    assert outcome(RULES, has_asked=True) is None
    assert outcome(Rules()) is None


@pytest.mark.parametrize(
    ("match", "traits", "holds"),
    [
        (Match(model="m"), {"model": "m"}, True),
        (Match(model="m"), {"model": "m2"}, False),
        (Match(identity="a"), {"identity": "a"}, True),
        (Match(identity="a"), {}, False),
        (Match(model="m", identity="a"), {"model": "m"}, False),
        (Match(headers={"x-team": "red", "x-tier": "1"}), {"headers": {"x-team": "red"}}, False),
        (Match(headers={"x-team": "red"}), {"headers": {"x-team": "Red"}}, False),
    ],
)
def test_all_that_a_match_gives_must_hold(match, traits, holds):
    rules = Rules(bindings=(Binding(name="b", match=match, policy="p"),))
    assert (outcome(rules, **traits) is not None) == holds


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        (Rules(bindings=(TEAM, TEAM)), "bindings[1].binding"),
        (Rules(bindings=(Binding(name="b", match=Match()),)), "bindings[0].match"),
        (
            Rules(bindings=(Binding(name="b", match=Match(headers={"x-other": "1"})),)),
            "bindings[0].match.headers",
        ),
        (Rules(override=Override(mode=OverrideMode.FORCE)), "override.policy"),
        (Rules(override=Override(mode=OverrideMode.OFF, policy="p")), "override.policy"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_and_the_field_named(rules, field):
    with pytest.raises(SpecError) as caught:
        check(rules, KNOWN)
    assert caught.value.field == field


def test_sources_stand_in_the_order_of_precedence():
    order = ["", "default", "inline", "named", "bound", "ordered", "override"]
    assert [source.value for source in SteeringSource] == order
