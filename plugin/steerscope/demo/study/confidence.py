"""Read-outs: does the model take a name for known, and does it recall what it states?

Both read-outs are linear probes fitted on names kept for fitting; the signals built on them are
calibrated on dev. Shape letters: N samples, G generated tokens, D width.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from steerscope.demo.making.model import SITE_LAYER
from steerscope.demo.study.catalog import Signal, Term
from steerscope.demo.study.circuit import Harvest
from steerscope.demo.study.harvest import Answered
from steerscope.demo.study.interventions import Activation, Feature
from steerscope.demo.study.probes import Probe, fit_logistic, fit_lowest, fit_two_classes
from steerscope.demo.world.scoring import Outcome, auroc

READOUT: Final = "known_entity_readout"
RECALL: Final = "recall_confidence"
_RECALL_L2: Final = (1e-2, 1e-3)


class Doubtful(NamedTuple):
    """Answers of which some are wrong, to fit the recall probe and to calibrate the risk on."""

    answers: list[Answered]

    def right(self) -> Tensor:
        """Return 1.0 [N] where the answer is not wrong: correct, declined or malformed."""
        return torch.tensor([float(a.outcome is not Outcome.WRONG) for a in self.answers])


def at_prompt_end(answers: Sequence[Answered], layer: int) -> Tensor:
    """Stack the streams [N, D] at the prompts' last tokens."""
    return torch.stack([a.at_prompt_end(layer) for a in answers])


def generated(answers: Sequence[Answered], layer: int) -> tuple[Tensor, Tensor]:
    """Return generated tokens' streams padded to [N, G, D], and which exist [N, G]."""
    streams = [a.transcript.generated_resid[layer] for a in answers]
    longest = max(len(stream) for stream in streams)
    x_NGD = torch.zeros(len(streams), longest, streams[0].shape[-1])
    present_NG = torch.zeros(len(streams), longest, dtype=torch.bool)
    for index, stream_GD in enumerate(streams):
        x_NGD[index, : len(stream_GD)] = stream_GD
        present_NG[index, : len(stream_GD)] = True
    return x_NGD, present_NG


def _feature(name: str, layer: int, probe: Probe) -> Feature:
    return Feature(name, layer, probe.weight_D, probe.bias, Activation.IDENTITY)


def fit_readout(
    harvest: Harvest, dev_known: list[Answered], dev_unknown: list[Answered]
) -> Feature:
    """Fit known against unknown at the prompt's end, in the layer that reads best on dev."""
    num_layers = len(harvest.known[0].transcript.prompt_resid)
    fitted = []
    for layer in range(SITE_LAYER + 1, num_layers):
        probe = fit_two_classes(
            at_prompt_end(harvest.known, layer), at_prompt_end(harvest.unknown, layer), l2=1e-2
        )
        feature = _feature(READOUT, layer, probe)
        scores = [feature.acts(at_prompt_end(a, layer)).tolist() for a in (dev_known, dev_unknown)]
        fitted.append((auroc(*scores), -layer, feature))
    return max(fitted, key=lambda entry: entry[:2])[2]


def lowest(feature: Feature, answers: Sequence[Answered]) -> Tensor:
    """Return the lowest activation [N] over each answer's generated tokens."""
    x_NGD, present_NG = generated(answers, feature.layer)
    acts_NG = feature.acts(x_NGD)
    return torch.where(present_NG, acts_NG, torch.full_like(acts_NG, torch.inf)).min(1).values


def recall_auroc(feature: Feature, doubtful: Doubtful) -> float:
    """Return how well the lowest recall tells right from wrong, among well-formed answers."""
    scores = lowest(feature, doubtful.answers).tolist()
    return answered_auroc(scores, doubtful.answers)


def answered_auroc(confidence: Sequence[float], answers: Sequence[Answered]) -> float:
    """Return the AUROC of a confidence for correct over wrong answers; declines do not count."""
    correct = [s for s, a in zip(confidence, answers, strict=True) if a.outcome is Outcome.CORRECT]
    wrong = [s for s, a in zip(confidence, answers, strict=True) if a.outcome is Outcome.WRONG]
    return auroc(correct, wrong)


def fit_recall(fit: Doubtful, dev: Doubtful) -> Feature:
    """Fit the recall probe, in the layer that tells wrong answers best on dev."""
    fitted = []
    layers = sorted(fit.answers[0].transcript.generated_resid)[SITE_LAYER + 1 :]
    for layer in layers:
        x_NGD, present_NG = generated(fit.answers, layer)
        for l2 in _RECALL_L2:
            feature = _feature(RECALL, layer, fit_lowest(x_NGD, present_NG, fit.right(), l2))
            fitted.append((recall_auroc(feature, dev), layer, feature))
    return max(fitted, key=lambda entry: entry[:2])[2]


def known_confidence(
    readout: Feature, dev_known: list[Answered], dev_unknown: list[Answered]
) -> Signal:
    """Calibrate P(the model takes the name for known) on dev."""
    scores_N1 = torch.cat(
        [readout.acts(at_prompt_end(a, readout.layer)) for a in (dev_known, dev_unknown)]
    )[:, None]
    labels_N = torch.tensor([1.0] * len(dev_known) + [0.0] * len(dev_unknown))
    probe = fit_logistic(scores_N1, labels_N, l2=1e-2)
    return Signal(
        "known_entity_confidence",
        "Probability that the model takes the entity asked about for one it knows.",
        (Term(READOUT, "last_prompt_token", float(probe.weight_D[0])),),
        probe.bias,
    )


def hallucination_risk(readout: Feature, recall: Feature, dev: Doubtful) -> Signal:
    """Calibrate P(the answer is wrong) on dev."""
    known_N = readout.acts(at_prompt_end(dev.answers, readout.layer))
    lowest_N = lowest(recall, dev.answers)
    probe = fit_logistic(torch.stack([known_N, lowest_N], 1), 1.0 - dev.right())
    return Signal(
        "hallucination_risk",
        "Probability that the answer is wrong: the name is taken for known, but recall is weak.",
        (
            Term(READOUT, "last_prompt_token", float(probe.weight_D[0])),
            Term(RECALL, "min_generation", float(probe.weight_D[1])),
        ),
        probe.bias,
    )
