"""The causal trial: every finalist is turned up and down, and one is chosen on dev.

A finalist is edited at the tokens it is read at. Turning a latent off touches the tokens where it
is active; turning anything on needs to know where, so a gate is fitted beside it: a probe that
tells chosen tokens from others. Values are multiples of what the feature shows by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerscope.catalog.model import Activation, Feature, FeatureKind, LabelSource
from steerscope.catalog.store import FeatureVectors, SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.lab.bench import Bench
from steerscope.lab.candidates import Candidate, Sides, logistic_probe
from steerscope.lab.cases import Case
from steerscope.lab.causal import Comparison, Variants, compare, effect, say
from steerscope.lab.harvest import Harvest, Harvested, TokenChoice
from steerscope.lab.judging import Judge, Outcome
from steerscope.steering.interventions import Intervention, Phase, SteeringSpec, When

STRENGTHS = (1.0, 1.5, 2.0)
"""1 sets the feature to what it is on the other class by itself."""
AS_GOOD = 0.05
MIN_CONTRAST = 0.2
"""Classes whose shares of answers differ by less are not told apart by answering or declining."""


@dataclass(frozen=True, slots=True, eq=False)
class Finalist:
    """A candidate that can be edited, under the names it has in the trial's catalog."""

    name: str
    gate: str
    candidate: Candidate
    high: float
    """Its mean activation on the class it is higher on."""

    @property
    def feature(self) -> Feature:
        """Its entry in the trial's catalog."""
        candidate = self.candidate
        return Feature(
            name=self.name,
            kind=candidate.kind,
            site=candidate.key.site,
            layer=candidate.key.layer,
            activation=candidate.activation,
            label_source=LabelSource.AUTOMATIC,
            source=dict(candidate.source),
        )

    def spec(self, toward_positive: bool, strength: float) -> SteeringSpec:
        """The edit that makes a case look like one of the other class."""
        if self.candidate.activation is Activation.IDENTITY:
            edit = self._shift((strength - 0.5) * (1 if toward_positive else -1))
        elif toward_positive == self.candidate.is_positive:
            edit = self._shift(strength * self.high)
        else:
            edit = Intervention(
                feature=self.name,
                clamp=(1.0 - strength) * self.high,
                only_if_active=True,
                phase=Phase.PROMPT,
            )
        return SteeringSpec(interventions=(edit,))

    def _shift(self, value: float) -> Intervention:
        when = When(feature=self.gate, above=0.0)
        return Intervention(feature=self.name, clamp=value, when=when, phase=Phase.PROMPT)


@dataclass(frozen=True, slots=True)
class Turned:
    """How far one finalist turned one class at one strength, on dev."""

    finalist: Finalist
    toward_positive: bool
    strength: float
    flipped: float
    malformed: float
    damaged: float = 0.0
    """Share of unrelated dev answers that changed; 0 where there are no such cases."""

    @property
    def net(self) -> float:
        """Flipped, less what was only broken, here or elsewhere."""
        return round(self.flipped - self.malformed - self.damaged, 3)


@dataclass(frozen=True, slots=True)
class Contrast:
    """What tells the classes' answers apart: that one is answered and the other declined."""

    positive_answers: bool | None
    """None where both are answered alike: then any change of the answer counts as a flip."""

    @property
    def shares(self) -> tuple[str, str]:
        """What counts toward positive, and toward negative."""
        if self.positive_answers is None:
            return "changed", "changed"
        return ("answered", "declined") if self.positive_answers else ("declined", "answered")


def contrast(sides: Sides) -> Contrast:
    """Which class is answered, from the unsteered answers."""
    shares = [_answered(side) for side in (sides.positive, sides.negative)]
    difference = shares[0] - shares[1]
    return Contrast(None if abs(difference) < MIN_CONTRAST else difference > 0)


def gate(harvest: Harvest, fit: Sides, key: SiteKey, choice: TokenChoice) -> FeatureVectors:
    """A probe that is above 0 at chosen tokens, and below at the other tokens of a prompt."""
    chosen_ND = np.concatenate(fit.at(key, choice))
    rest = [harvest.others[key], *(_not_chosen(h, key, choice) for h in fit.all)]
    return logistic_probe(chosen_ND, np.concatenate(rest))


def _not_chosen(case: Harvested, key: SiteKey, choice: TokenChoice) -> FloatArray:
    """Its entity's and last tokens but for the chosen one, which may be both of them."""
    chosen_1D = case.at(key, choice)[-1:]
    kept_nD = np.concatenate([case.span[key], case.last[key]])
    others_nD: FloatArray = kept_nD[(kept_nD != chosen_1D).any(axis=1)]
    return others_nD


def gate_feature(name: str, key: SiteKey, choice: TokenChoice) -> Feature:
    """The gate's entry in a catalog."""
    what = "the last token of a name" if choice is not TokenChoice.LAST_PROMPT else "a prompt's end"
    return Feature(
        name=name,
        kind=FeatureKind.PROBE,
        site=key.site,
        layer=key.layer,
        activation=Activation.IDENTITY,
        label=f"At {what}",
        label_source=LabelSource.AUTOMATIC,
        description=f"Log-odds that a token is {what}: says where to read and where to edit.",
        source={"fit": "logistic regression against the prompt's other tokens"},
    )


def turn_all(
    bench: Bench,
    finalists: Sequence[Finalist],
    dev: Sides,
    side: Sequence[Case],
    found: Contrast,
    judge: Judge,
) -> list[Turned]:
    """Every finalist, both ways, at every strength, on dev and on unrelated dev cases."""
    turned = []
    aside = say(bench, side, judge)
    for toward_positive in (True, False):
        cases = [h.case for h in (dev.negative if toward_positive else dev.positive)]
        unsteered = say(bench, cases, judge)
        for finalist in finalists:
            for strength in STRENGTHS:
                spec = finalist.spec(toward_positive, strength)
                seen = effect(say(bench, cases, judge, spec), unsteered)
                share = found.shares[0 if toward_positive else 1]
                flipped = float(getattr(seen, share))
                damaged = effect(say(bench, side, judge, spec), aside).changed if side else 0.0
                turned.append(
                    Turned(finalist, toward_positive, strength, flipped, seen.malformed, damaged)
                )
    return turned


def best(turned: Sequence[Turned]) -> tuple[Turned, Turned]:
    """The finalist that turns both classes, with its strength each way.

    Its worse way counts, and broken answers count against it; a weaker edit wins a tie. Of those
    within ``AS_GOOD`` of the best the earliest is taken, since what comes later may only be the
    decision itself: tokens of the name before the prompt's end, lower layers first.
    """

    def way(finalist: Finalist, toward_positive: bool) -> Turned:
        mine = [
            t for t in turned if t.finalist is finalist and t.toward_positive is toward_positive
        ]
        return max(mine, key=lambda t: (t.net, -t.strength))

    pairs = [(way(f, True), way(f, False)) for f in dict.fromkeys(t.finalist for t in turned)]
    worst = max(min(p.net for p in pair) for pair in pairs)
    good = [pair for pair in pairs if min(p.net for p in pair) >= worst - AS_GOOD]
    return min(good, key=lambda pair: (*_place(pair[0]), -sum(p.net for p in pair)))


def _place(turned: Turned) -> tuple[bool, SiteKey]:
    candidate = turned.finalist.candidate
    return candidate.choice is TokenChoice.LAST_PROMPT, candidate.key


def confirm(
    bench: Bench,
    turned: Turned,
    made: Variants,
    cases: Sequence[Case],
    judge: Judge,
    num_controls: int,
) -> Comparison:
    """The chosen edit beside its controls, on cases never chosen on."""
    spec = turned.finalist.spec(turned.toward_positive, turned.strength)
    controls = [made.spec(spec, 1 + c) for c in range(num_controls)]
    return compare(bench, cases, judge, spec, controls)


def _answered(side: Sequence[Harvested]) -> float:
    return sum(h.outcome is not Outcome.DECLINED for h in side) / len(side)
