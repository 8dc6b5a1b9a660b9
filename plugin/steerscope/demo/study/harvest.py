"""Questions put to the trained model, with the residual streams seen meanwhile.

Shape letters: N tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from steerscope.demo.making.batches import encode_turns
from steerscope.demo.study.interventions import Intervention
from steerscope.demo.study.runner import Transcript, run
from steerscope.demo.world import Question
from steerscope.demo.world.scoring import Outcome, classify


@dataclass(frozen=True, slots=True)
class Answered:
    """One question, its answer, and the prompt token its entity ends at (-1: none)."""

    question: Question
    transcript: Transcript
    outcome: Outcome
    entity_last: int

    def at_entity(self, layer: int) -> Tensor:
        """Return the residual stream [D] at the entity's last token."""
        return self.transcript.prompt_resid[layer][self.entity_last]

    def at_prompt_end(self, layer: int) -> Tensor:
        """Return the residual stream [D] at the prompt's last token."""
        return self.transcript.prompt_resid[layer][-1]


def answer_all(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    asked: Sequence[Question],
    interventions: Sequence[Intervention] = (),
    capture: Sequence[int] = (),
) -> list[Answered]:
    """Put every question to the model and judge the whole answers."""
    transcripts = run(model, tokenizer, [q.question for q in asked], interventions, capture)
    turns = encode_turns(tokenizer, list(asked))
    return [
        Answered(question, transcript, classify(question, transcript.text), turn.entity_last)
        for question, transcript, turn in zip(asked, transcripts, turns, strict=True)
    ]


def entity_tokens(answered: Sequence[Answered], layer: int) -> Tensor:
    """Stack the streams [N, D] at the entities' last tokens."""
    return torch.stack([a.at_entity(layer) for a in answered])


def other_prompt_tokens(answered: Sequence[Answered], layer: int) -> Tensor:
    """Stack the streams [N, D] at every prompt token but the entities' last."""
    kept = []
    for a in answered:
        resid_ND = a.transcript.prompt_resid[layer]
        keep_N = torch.arange(len(resid_ND)) != a.entity_last
        kept.append(resid_ND[keep_N])
    return torch.cat(kept)


def all_tokens(answered: Sequence[Answered], layer: int) -> Tensor:
    """Stack the streams [N, D] of whole turns, prompts and answers."""
    return torch.cat(
        [
            torch.cat([a.transcript.prompt_resid[layer], a.transcript.generated_resid[layer]])
            for a in answered
        ]
    )


def share(answered: Sequence[Answered], *outcomes: Outcome) -> float:
    """Return the share of answers with one of these outcomes."""
    return sum(a.outcome in outcomes for a in answered) / len(answered)
