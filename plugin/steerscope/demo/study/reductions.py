"""One number from one feature of one answer, as the hub reduces it, and the signals made of them.

Shape letters: N answers, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from steerscope.demo.study.catalog import Reduce, Signal
from steerscope.demo.study.harvest import Answered
from steerscope.demo.study.interventions import Feature

FIRST_GENERATED: Final = 8


def at_prompt_end(answers: Sequence[Answered], layer: int) -> Tensor:
    """Stack the streams [N, D] at the prompts' last tokens."""
    return torch.stack([a.at_prompt_end(layer) for a in answers])


def reduced(feature: Feature, how: Reduce, answers: Sequence[Answered], first: int) -> Tensor:
    """Return one number [N] for each answer; `first` counts generated tokens."""
    if how == "last_prompt_token":
        return feature.acts(at_prompt_end(answers, feature.layer))
    streams = [a.transcript.generated_resid[feature.layer][:first] for a in answers]
    ends = torch.tensor([len(stream) for stream in streams]).cumsum(0)[:-1]
    parts = feature.acts(torch.cat(streams)).tensor_split(ends)
    return torch.stack([acts_T.min() for acts_T in parts])


def log_odds(
    signal: Signal, features: Mapping[str, Feature], answers: Sequence[Answered]
) -> list[float]:
    """Return a signal's log-odds for each answer."""
    total_N = torch.full((len(answers),), signal.bias)
    for term in signal.terms:
        total_N += term.weight * reduced(features[term.feature], term.reduce, answers, term.first)
    return total_N.tolist()
