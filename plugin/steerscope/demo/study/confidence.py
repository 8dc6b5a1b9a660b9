"""Read-outs and signals: does the model know the name, will it answer, and will that be wrong?

The read-outs are linear probes of the prompt's last token, fitted on names kept for fitting; the
signals built on them, and on how far one value leads (`lead`), are calibrated on dev.
Shape letters: N answers, D width.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from steerscope.demo.making.model import SITE_LAYER
from steerscope.demo.study.catalog import Signal, Term
from steerscope.demo.study.harvest import Answered
from steerscope.demo.study.interventions import Activation, Feature
from steerscope.demo.study.lead import Bar
from steerscope.demo.study.probes import Probe, fit_logistic, fit_two_classes
from steerscope.demo.study.reductions import FIRST_GENERATED, at_prompt_end, reduced
from steerscope.demo.world.scoring import Outcome, auroc

KNOWN_READOUT: Final = "known_entity_readout"
ANSWERS: Final = "answers_readout"
DECLINES: Final = "about_to_decline"
DOUBT: Final = "answer_doubt"
_DOUBT_L2: Final = (1e-2, 1e-1, 1.0)

Fit = Callable[[int, float], Probe]


class Asked(NamedTuple):
    """The answers of one use: about known and unknown names, and those that may be wrong."""

    known: list[Answered]
    unknown: list[Answered]
    doubtful: list[Answered]

    @property
    def everyone(self) -> list[Answered]:
        """All answers."""
        return [*self.doubtful, *self.known, *self.unknown]


def answered(answers: Sequence[Answered]) -> list[Answered]:
    """Return the well-formed answers, right or wrong."""
    return [a for a in answers if a.outcome.answered]


def is_wrong(answers: Sequence[Answered]) -> Tensor:
    """Return 1.0 [N] where an answer is well formed and wrong."""
    return torch.tensor([float(a.outcome is Outcome.WRONG) for a in answers])


def _feature(name: str, layer: int, probe: Probe) -> Feature:
    return Feature(name, layer, probe.weight_D, probe.bias, Activation.IDENTITY)


def _best(
    name: str,
    num_layers: int,
    strengths: Sequence[float],
    fit: Fit,
    dev: tuple[list[Answered], list[Answered]],
) -> Feature:
    """Fit in every layer above the site, and keep what tells dev's two classes apart best."""
    fitted = []
    for layer in range(SITE_LAYER + 1, num_layers):
        for l2 in strengths:
            feature = _feature(name, layer, fit(layer, l2))
            scores = [feature.acts(at_prompt_end(a, layer)).tolist() for a in dev]
            fitted.append((auroc(*scores), -layer, l2, feature))
    return max(fitted, key=lambda entry: entry[:3])[3]


def _num_layers(asked: Asked) -> int:
    return len(asked.known[0].transcript.prompt_resid)


def fit_readout(fit: Asked, dev: Asked) -> Feature:
    """Fit known against unknown names."""

    def probe(layer: int, l2: float) -> Probe:
        return fit_two_classes(
            at_prompt_end(fit.known, layer), at_prompt_end(fit.unknown, layer), l2=l2
        )

    return _best(KNOWN_READOUT, _num_layers(fit), (1e-2,), probe, (dev.known, dev.unknown))


def fit_answers(fit: Asked, dev: Asked) -> Feature:
    """Fit answers against declines, whatever the name is."""
    yes, no = _by_decline(fit)

    def probe(layer: int, l2: float) -> Probe:
        return fit_two_classes(at_prompt_end(yes, layer), at_prompt_end(no, layer), l2=l2)

    return _best(ANSWERS, _num_layers(fit), (1e-2,), probe, _by_decline(dev))


def _by_decline(asked: Asked) -> tuple[list[Answered], list[Answered]]:
    declined = [a for a in asked.everyone if a.outcome is Outcome.DECLINED]
    return answered(asked.everyone), declined


def declines(answers: Feature, signal: Signal) -> Feature:
    """Return the calibrated log-odds of a decline, 0 where an answer is more likely."""
    slope = signal.terms[0].weight
    return replace(
        answers,
        name=DECLINES,
        W_enc=-slope * answers.W_enc,
        b_enc=-slope * answers.b_enc - signal.bias,
        activation=Activation.RELU,
    )


def fit_doubt(fit: Asked, dev: Asked) -> Feature:
    """Fit wrong against right answers; each fact weighs alike, however often it was asked."""
    answers = answered(fit.everyone)
    wrong_N, weights_N = is_wrong(answers), _weights(answers)

    def probe(layer: int, l2: float) -> Probe:
        return fit_logistic(at_prompt_end(answers, layer), wrong_N, weights_N, l2)

    return _best(DOUBT, _num_layers(fit), _DOUBT_L2, probe, _by_truth(dev))


def _by_truth(asked: Asked) -> tuple[list[Answered], list[Answered]]:
    everyone = asked.everyone
    wrong = [a for a in everyone if a.outcome is Outcome.WRONG]
    return wrong, [a for a in everyone if a.outcome is Outcome.CORRECT]


def _weights(answers: Sequence[Answered]) -> Tensor:
    """Return weights [N] by which facts weigh alike within right and wrong, and both alike."""
    facts = [(a.question.entity, a.question.attribute, a.outcome) for a in answers]
    asked = Counter(facts)
    known = Counter(outcome for *_, outcome in asked)
    each = [len(facts) / (2 * known[fact[2]] * asked[fact]) for fact in facts]
    return torch.tensor(each)


def known_confidence(readout: Feature, dev: Asked) -> Signal:
    """Calibrate P(the model takes the name for known) on dev."""
    scores_N1 = readout.acts(at_prompt_end([*dev.known, *dev.unknown], readout.layer))[:, None]
    labels_N = torch.tensor([1.0] * len(dev.known) + [0.0] * len(dev.unknown))
    probe = fit_logistic(scores_N1, labels_N, l2=1e-2)
    return Signal(
        "known_entity_confidence",
        "Probability that the model takes the entity asked about for one it knows.",
        (Term(KNOWN_READOUT, "last_prompt_token", float(probe.weight_D[0])),),
        probe.bias,
        {"label": "known"},
    )


def answered_vs_declined(answers: Feature, dev: Asked) -> Signal:
    """Calibrate P(the model answers) on dev."""
    yes, no = _by_decline(dev)
    scores_N1 = answers.acts(at_prompt_end([*yes, *no], answers.layer))[:, None]
    labels_N = torch.tensor([1.0] * len(yes) + [0.0] * len(no))
    probe = fit_logistic(scores_N1, labels_N)
    return Signal(
        "answered_vs_declined",
        "Probability that the model answers rather than declines, before it says a word.",
        (Term(ANSWERS, "last_prompt_token", float(probe.weight_D[0])),),
        probe.bias,
        {"label": "answered"},
    )


def lead_of(bars: Sequence[Bar], answers: Sequence[Answered]) -> Tensor:
    """Return how many bars lie between the two leading values [N], where they are closest."""
    steps_NB = [
        reduced(bar.reached_once, "min_first_generated", answers, FIRST_GENERATED)
        - reduced(bar.unreached, "min_first_generated", answers, FIRST_GENERATED)
        for bar in bars
    ]
    return torch.stack(steps_NB, 1).sum(1)


def hallucination_risk(doubt: Feature, bars: Sequence[Bar], dev: Asked) -> Signal:
    """Calibrate P(the answer is wrong) on dev's answers; a likely decline lowers it.

    P(wrong) is P(answered) times P(wrong if answered): the log-odds of a decline are taken off.
    """
    answers = answered(dev.everyone)
    doubt_N = reduced(doubt, "last_prompt_token", answers, FIRST_GENERATED)
    probe = fit_logistic(torch.stack([doubt_N, lead_of(bars, answers)], 1), is_wrong(answers))
    at_end, lead = (float(weight) for weight in probe.weight_D)
    return Signal(
        "hallucination_risk",
        "Probability that the answer is wrong: names like this one are often answered wrongly, or "
        "no value clearly leads when one is stated.",
        (
            Term(DOUBT, "last_prompt_token", at_end),
            Term(DECLINES, "last_prompt_token", -1.0),
            *(Term(bar.reached_once.name, "min_first_generated", lead) for bar in bars),
            *(Term(bar.unreached.name, "min_first_generated", -lead) for bar in bars),
        ),
        probe.bias,
        {"label": "wrong", "among": "answered"},
    )
