"""The trial: what an edit sets a feature to, where, and which finalist is chosen.

Shapes: T tokens, D model width.
"""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")

from lab_world import KEY, WIDTH, harvested, sides, steered, vectors, write
from steerscope.catalog.model import Activation, FeatureKind
from steerscope.catalog.store import SiteKey
from steerscope.lab.candidates import Candidate, Sides, difference_of_means
from steerscope.lab.harvest import Harvest, TokenChoice
from steerscope.lab.judging import Outcome
from steerscope.lab.trial import (
    AS_GOOD,
    STRENGTHS,
    Contrast,
    Finalist,
    Turned,
    best,
    contrast,
    gate,
    gate_feature,
)
from steerscope.steering.interventions import Phase, check_spec

LAST = TokenChoice.LAST_ENTITY
READ, GATE, OTHER = 2, 5, 0
HIGH = 4.0


def unit(d, length=1.0):
    return length * np.eye(WIDTH, dtype=np.float32)[d]


def latent(positive, name="finalist_00"):
    """Reads and writes the same coordinate, so that what it was set to can be seen there."""
    candidate = Candidate(
        KEY, LAST, FeatureKind.SAE_LATENT, Activation.RELU, vectors(unit(READ), unit(READ)),
        {"sae": "planted", "latent": "3"}, 0.9 if positive else 0.1,
    )  # fmt: skip
    return Finalist(name, "gate", candidate, HIGH)


def direction(dev_auroc=0.9):
    pos_ND, neg_ND = np.stack([unit(READ, 6.0)] * 2), np.stack([unit(READ, -2.0)] * 2)
    way = difference_of_means(pos_ND, neg_ND)
    candidate = Candidate(
        KEY, LAST, FeatureKind.DIRECTION, Activation.IDENTITY, way, {"fit": "means"}, dev_auroc
    )
    return Finalist("finalist_00", "gate", candidate, 0.5)


# A name's token with the feature on, one with it off, and the same two elsewhere in a prompt.
ON, OFF, ON_ELSEWHERE, OFF_ELSEWHERE = range(4)
TOKENS_TD = np.stack(
    [
        unit(READ, 3.0) + unit(GATE),
        unit(READ, -1.0) + unit(GATE),
        unit(READ, 3.0) - unit(GATE),
        unit(READ, -1.0) - unit(GATE),
    ]
)


def edited(tmp_path, finalist, toward_positive, strength):
    """The read coordinate [T] after the edit; asserts that nothing else moved."""
    spec = finalist.spec(toward_positive, strength)
    check_spec(spec)
    assert [i.phase for i in spec.interventions] == [Phase.PROMPT]
    catalog = write(
        tmp_path / "catalog",
        [finalist.feature, gate_feature("gate", KEY, LAST)],
        {finalist.name: finalist.candidate.vectors, "gate": vectors(unit(GATE), None)},
    )
    moved_TD = steered(catalog, spec, TOKENS_TD)
    untouched = [d for d in range(WIDTH) if d != READ]
    np.testing.assert_array_equal(moved_TD[:, untouched], TOKENS_TD[:, untouched])
    return moved_TD[:, READ]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("positive", [True, False])
def test_a_latent_is_turned_on_at_gated_tokens_by_multiples_of_what_it_shows(
    tmp_path, positive, strength
):
    moved = edited(tmp_path, latent(positive), positive, strength)
    # The change is from f to the target; f is 0 where the latent is off.
    assert moved[ON] == pytest.approx(strength * HIGH)
    assert moved[OFF] == pytest.approx(-1.0 + strength * HIGH)
    assert moved[[ON_ELSEWHERE, OFF_ELSEWHERE]].tolist() == [3.0, -1.0]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("positive", [True, False])
def test_a_latent_is_turned_off_wherever_it_is_active(tmp_path, positive, strength):
    moved = edited(tmp_path, latent(positive), not positive, strength)
    assert moved[[ON, ON_ELSEWHERE]] == pytest.approx((1.0 - strength) * HIGH, abs=1e-6)
    assert moved[[OFF, OFF_ELSEWHERE]].tolist() == [-1.0, -1.0]


def test_strength_1_is_the_other_class_and_more_is_beyond(tmp_path):
    off = latent(True).spec(False, 1.0).interventions[0]
    assert (off.clamp, off.only_if_active, off.when) == (0.0, True, None)
    on = latent(True).spec(True, 1.0).interventions[0]
    assert (on.clamp, on.only_if_active, on.when.above) == (HIGH, False, 0.0)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dev_auroc", [0.9, 0.1])
def test_a_direction_is_set_to_the_mean_of_the_other_class_and_beyond(
    tmp_path, dev_auroc, strength
):
    """The class means lie at 6 and -2 of the coordinate, whatever dev says of the sign."""
    up = edited(tmp_path / "up", direction(dev_auroc), True, strength)
    down = edited(tmp_path / "down", direction(dev_auroc), False, strength)
    beyond = 8.0 * (strength - 1.0)
    assert up[[ON, OFF]] == pytest.approx(6.0 + beyond, abs=1e-4)
    assert down[[ON, OFF]] == pytest.approx(-2.0 - beyond, abs=1e-4)
    for moved in (up, down):
        assert moved[[ON_ELSEWHERE, OFF_ELSEWHERE]].tolist() == [3.0, -1.0]


def test_a_finalists_entry_says_where_it_came_from():
    entry = latent(True).feature
    assert (entry.name, entry.kind) == ("finalist_00", FeatureKind.SAE_LATENT)
    assert (entry.site, entry.layer) == (KEY.site, KEY.layer)
    assert entry.source == {"sae": "planted", "latent": "3"}


def answered(positive, negative):
    def side(outcomes):
        return [harvested(unit(0), f"Name {i}", outcome) for i, outcome in enumerate(outcomes)]

    return Sides(side(positive), side(negative))


RIGHT, WRONG, NO, BROKEN = Outcome.CORRECT, Outcome.WRONG, Outcome.DECLINED, Outcome.MALFORMED


@pytest.mark.parametrize(
    ("positive", "negative", "answers"),
    [
        ([RIGHT] * 10, [NO] * 10, True),
        ([NO] * 10, [RIGHT, WRONG] * 5, False),
        ([RIGHT] * 10, [WRONG] * 10, None),
        ([NO] * 10, [NO] * 10, None),
        ([RIGHT] * 10, [RIGHT] * 9 + [NO], None),
        ([RIGHT] * 10, [RIGHT] * 7 + [NO] * 3, True),
        ([BROKEN] * 10, [NO] * 10, True),
    ],
)
def test_the_classes_differ_by_who_is_answered(positive, negative, answers):
    assert contrast(answered(positive, negative)).positive_answers is answers


def test_what_counts_as_turned_is_what_the_other_class_does():
    assert Contrast(True).shares == ("answered", "declined")
    assert Contrast(False).shares == ("declined", "answered")
    assert Contrast(None).shares == ("changed", "changed")


def tried(finalist, ways):
    """Turned by (toward positive, strength, flipped, malformed)."""
    return [Turned(finalist, *way) for way in ways]


def test_the_finalist_whose_worse_way_is_best_wins():
    lopsided, even = latent(True, "finalist_00"), latent(True, "finalist_01")
    turned = [
        *tried(lopsided, [(True, 1.0, 1.0, 0.0), (False, 1.0, 0.3, 0.0)]),
        *tried(even, [(True, 1.0, 0.6, 0.0), (False, 1.0, 0.5, 0.0)]),
    ]
    assert [t.finalist for t in best(turned)] == [even, even]


def test_each_way_has_its_own_strength_and_the_weakest_of_equals():
    one = latent(True)
    turned = tried(
        one,
        [
            (True, 2.0, 0.9, 0.0), (True, 1.5, 0.9, 0.0), (True, 1.0, 0.4, 0.0),
            (False, 2.0, 0.8, 0.0), (False, 1.0, 0.5, 0.0),
        ],
    )  # fmt: skip
    toward_positive, toward_negative = best(turned)
    assert (toward_positive.toward_positive, toward_positive.strength) == (True, 1.5)
    assert (toward_negative.toward_positive, toward_negative.strength) == (False, 2.0)


def test_broken_answers_are_no_success_of_a_strength():
    turned = tried(
        latent(True), [(True, 2.0, 1.0, 0.5), (True, 1.0, 0.7, 0.0), (False, 1.0, 1.0, 0.0)]
    )
    assert best(turned)[0].strength == 1.0


def test_broken_answers_are_no_success_of_a_finalist():
    """Where any change counts, garbling every answer would look like turning every answer."""
    garbles, turns = latent(True, "finalist_00"), latent(True, "finalist_01")
    turned = [
        *tried(garbles, [(True, 1.0, 1.0, 0.9), (False, 1.0, 1.0, 0.9)]),
        *tried(turns, [(True, 1.0, 0.8, 0.0), (False, 1.0, 0.7, 0.0)]),
    ]
    assert best(turned)[0].finalist is turns


def test_broken_answers_elsewhere_are_no_success_either():
    harms, turns = latent(True, "finalist_00"), latent(True, "finalist_01")
    turned = [
        Turned(harms, True, 1.0, 1.0, 0.0, damaged=0.4),
        Turned(harms, False, 1.0, 1.0, 0.0, damaged=0.4),
        *tried(turns, [(True, 1.0, 0.8, 0.0), (False, 1.0, 0.8, 0.0)]),
    ]
    assert best(turned)[0].finalist is turns


def placed(layer, choice, name):
    found = latent(True, name)
    key = SiteKey(layer, KEY.site)
    return replace(found, candidate=replace(found.candidate, key=key, choice=choice))


@pytest.mark.parametrize(
    ("later", "earlier"),
    [((3, LAST), (1, LAST)), ((1, TokenChoice.LAST_PROMPT), (3, LAST))],
)
def test_of_finalists_as_good_the_earliest_wins(later, earlier):
    """What comes later may only be the decision itself."""
    late, early = placed(*later, "finalist_00"), placed(*earlier, "finalist_01")
    ways = [(True, 1.0, 0.9, 0.0), (False, 1.0, 0.9, 0.0)]
    a_bit_worse = [(True, 1.0, 0.9 - 0.9 * AS_GOOD, 0.0), (False, 1.0, 0.9, 0.0)]
    much_worse = [(True, 1.0, 0.9 - 1.5 * AS_GOOD, 0.0), (False, 1.0, 0.9, 0.0)]
    assert best([*tried(late, ways), *tried(early, a_bit_worse)])[0].finalist is early
    assert best([*tried(late, ways), *tried(early, much_worse)])[0].finalist is late


def test_of_equal_finalists_the_first_on_dev_wins():
    first, second = latent(True, "finalist_00"), latent(True, "finalist_01")
    ways = [(True, 1.0, 0.5, 0.0), (False, 1.0, 0.5, 0.0)]
    assert best([*tried(first, ways), *tried(second, ways)])[0].finalist is first


RNG = np.random.default_rng(0)
NAME, EARLIER, END, ELSE = unit(1, 5.0), unit(2, 5.0), unit(3, 5.0), unit(4, 5.0)


def near(point, count=1):
    return (point + 0.3 * RNG.standard_normal((count, WIDTH))).astype(np.float32)


def gated(choice, at_end=False):
    """A gate, and fresh tokens of every kind; with ``at_end`` the prompt ends with the name."""
    cases = [
        harvested(near(NAME)[0], before=near(EARLIER, 2),
                  last_D=None if at_end else near(END)[0])
        for _ in range(60)
    ]  # fmt: skip
    fit = Sides(cases[:30], cases[30:])
    found = gate(Harvest(tuple(cases), {KEY: near(ELSE, 200)}, {}), fit, KEY, choice)
    assert found.W_dec is None
    points = {"name": NAME, "earlier": EARLIER, "end": END, "else": ELSE}
    odds = {kind: near(point, 200) @ found.W_enc + found.b_enc for kind, point in points.items()}
    sure = float(odds["end" if choice is TokenChoice.LAST_PROMPT and not at_end else "name"].mean())
    assert sure > 2.0, "chosen tokens are not among those it is told apart from"
    return {kind: float((odds_N > 0).mean()) for kind, odds_N in odds.items()}


def test_a_gate_holds_at_the_last_token_of_a_name_and_nowhere_else():
    opened = gated(LAST)
    assert opened["name"] > 0.97
    assert max(opened["earlier"], opened["end"], opened["else"]) < 0.03


def test_a_gate_for_the_prompts_end_is_shut_at_the_name():
    opened = gated(TokenChoice.LAST_PROMPT)
    assert opened["end"] > 0.97
    assert max(opened["name"], opened["earlier"], opened["else"]) < 0.03


@pytest.mark.parametrize("choice", [LAST, TokenChoice.LAST_PROMPT])
def test_a_token_that_is_both_a_names_and_the_prompts_last_opens_the_gate(choice):
    opened = gated(choice, at_end=True)
    assert opened["name"] > 0.97
    assert max(opened["earlier"], opened["else"]) < 0.03


def test_sides_of_the_harvest_are_of_the_cases_asked_for():
    told = sides(np.stack([unit(0)]), np.stack([unit(1)]))
    seen = Harvest((*told.positive, *told.negative), {}, {})
    assert seen.of([told.negative[0].case]) == told.negative
