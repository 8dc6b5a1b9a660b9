"""Concept features: what is about to be said, in either language.

A concept is the set of questions that are answered by one attribute. A latent stands
for a concept when it is active, from the prompt's last token on, for its questions in English and
in French, and silent otherwise.
Shape letters: N samples, K latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from steerscope.demo.study.circuit import Harvest, latent_feature
from steerscope.demo.study.harvest import Answered, all_tokens
from steerscope.demo.study.interventions import Feature
from steerscope.demo.world import Question
from steerscope.demo.world.entities import PERSON_ATTRIBUTES
from steerscope.demo.world.phrasings import LANGUAGES
from steerscope.lab.dictionaries import Dictionary, DictionarySettings, train

ATTRIBUTE_SETTINGS: Final = DictionarySettings(192, 8, seed=0)
ATTRIBUTE_LAYER: Final = 3

Holds = Callable[[Question], bool]


@dataclass(frozen=True, slots=True)
class Concept:
    """A latent that stands for a concept, and how often it fires for it and otherwise."""

    name: str
    feature: Feature
    latent: int
    settings: DictionarySettings
    score: float


def _peaks(dictionary: Dictionary, answers: Sequence[Answered], layer: int) -> Tensor:
    """Return each latent's highest activation [N, K] from the prompt's last token on."""
    rows = []
    for a in answers:
        said = torch.cat(
            [a.transcript.prompt_resid[layer][-1:], a.transcript.generated_resid[layer]]
        )
        rows.append(dictionary.acts(said).max(0).values)
    return torch.stack(rows)


def _best_latent(peaks_NK: Tensor, answers: Sequence[Answered], holds: Holds) -> tuple[int, float]:
    """Return the latent whose firing best marks the concept, in its weaker language."""
    active_NK = (peaks_NK > 0).float()
    holds_N = torch.tensor([holds(a.question) for a in answers])
    rates = []
    for language in LANGUAGES:
        spoken_N = torch.tensor([a.question.language == language for a in answers])
        inside_N, outside_N = spoken_N & holds_N, spoken_N & ~holds_N
        if inside_N.sum() < 5:
            return 0, -1.0
        rates.append(active_NK[inside_N].mean(0) - active_NK[outside_N].mean(0))
    worst_K = torch.stack(rates).min(0).values
    latent = int(worst_K.argmax())
    return latent, float(worst_K[latent])


def states(attribute: str) -> Holds:
    """Return whether the expected answer states an attribute, whatever its value."""
    return lambda question: question.attribute == attribute and question.split != "unknown"


def _found(
    dictionary: Dictionary, settings: DictionarySettings, layer: int,
    peaks_NK: Tensor, answers: Sequence[Answered], name: str, holds: Holds,
) -> Concept:  # fmt: skip
    latent, score = _best_latent(peaks_NK, answers, holds)
    return Concept(name, latent_feature(dictionary, latent, name, layer), latent, settings, score)


def find_attributes(harvest: Harvest) -> list[Concept]:
    """Rank the latents that stand for a stated attribute, best first."""
    answers = [*harvest.known, *harvest.unknown, *harvest.side]
    dictionary = train(all_tokens(harvest.everyone, ATTRIBUTE_LAYER), ATTRIBUTE_SETTINGS)
    peaks_NK = _peaks(dictionary, answers, ATTRIBUTE_LAYER)
    found = [
        _found(
            dictionary, ATTRIBUTE_SETTINGS, ATTRIBUTE_LAYER, peaks_NK, answers,
            f"states_{attribute}", states(attribute),
        )
        for attribute in PERSON_ATTRIBUTES
    ]  # fmt: skip
    return sorted(found, key=lambda concept: -concept.score)


def firing(
    feature: Feature, answers: Sequence[Answered], holds: Holds
) -> dict[str, tuple[int, int]]:
    """Count (fired, asked) for the concept in each language, and otherwise."""
    counts: dict[str, tuple[int, int]] = {}
    for a in answers:
        layer = feature.layer
        said = torch.cat(
            [a.transcript.prompt_resid[layer][-1:], a.transcript.generated_resid[layer]]
        )
        fired = bool((feature.acts(said) > 0).any())
        group = a.question.language if holds(a.question) else "otherwise"
        hits, asked = counts.get(group, (0, 0))
        counts[group] = (hits + fired, asked + 1)
    return counts
