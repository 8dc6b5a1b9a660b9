"""Greedy generation with a plain Transformers model, with edits and captured residual streams.

Prompts of equal length run together, so that no padding exists and every output equals that of a
lone prompt. Shape letters: B prompts, L tokens, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from steerscope.demo.making.tokenizer import EOS, SPECIALS, prompt_text
from steerscope.demo.study.interventions import Intervention, Phase, edited

MAX_NEW_TOKENS: Final = 16
_MAX_BATCH: Final = 256


@dataclass(slots=True)
class Transcript:
    """What one prompt led to; residual streams are taken before the edits of their own layer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    """The probability of each generated token, end of sequence included."""
    prompt_ids: list[int] = field(default_factory=list)
    prompt_resid: dict[int, Tensor] = field(default_factory=dict)
    """By layer, [prompt tokens, D]."""
    generated_resid: dict[int, Tensor] = field(default_factory=dict)
    """By layer, [generated tokens that were fed back, D]."""


@dataclass(slots=True)
class _Tap:
    """What the layer hooks share: the phase of the running step and the streams seen."""

    interventions: Sequence[Intervention]
    phase: Phase = "prompt"
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def hook(
        self, layer: int, capture: bool, _: nn.Module, __: object, resid_BLD: Tensor
    ) -> Tensor:
        if capture:
            self.seen.setdefault(layer, []).append(resid_BLD.clone())
        return edited(resid_BLD, layer, self.interventions, self.phase)


@contextmanager
def _tapped(
    model: LlamaForCausalLM, interventions: Sequence[Intervention], capture: Sequence[int]
) -> Iterator[_Tap]:
    tap = _Tap(interventions)
    with ExitStack() as stack:
        for index in sorted({*capture, *(i.feature.layer for i in interventions)}):
            hook = partial(tap.hook, index, index in capture)
            stack.callback(model.model.layers[index].register_forward_hook(hook).remove)
        yield tap


@torch.no_grad()
def _generate_batch(
    model: LlamaForCausalLM, ids_BL: Tensor, tap: _Tap, eos: int
) -> tuple[Tensor, Tensor]:
    """Return generated ids and their probabilities, both [B, steps]."""
    cache = DynamicCache(config=model.config)
    finished_B = torch.zeros(ids_BL.shape[0], dtype=torch.bool)
    ids, probabilities, fed_BL = [], [], ids_BL
    tap.phase = "prompt"
    for _ in range(MAX_NEW_TOKENS):
        logits_BV = model(fed_BL, past_key_values=cache, use_cache=True).logits[:, -1].float()
        best = logits_BV.softmax(-1).max(-1)
        ids.append(best.indices)
        probabilities.append(best.values)
        finished_B |= best.indices == eos
        if bool(finished_B.all()):
            break
        tap.phase, fed_BL = "generation", best.indices[:, None]
    return torch.stack(ids, 1), torch.stack(probabilities, 1)


def _transcript(
    tokenizer: Tokenizer, row: int, ids_BS: Tensor, probs_BS: Tensor, tap: _Tap, eos: int
) -> Transcript:
    ids = ids_BS[row].tolist()
    length = ids.index(eos) + 1 if eos in ids else len(ids)
    fed = length - 1
    return Transcript(
        text=tokenizer.decode(ids[:length]).strip(),
        token_ids=ids[:length],
        probabilities=probs_BS[row, :length].tolist(),
        prompt_resid={layer: steps[0][row] for layer, steps in tap.seen.items()},
        generated_resid={
            layer: torch.cat([steps[0][row][:0], *(step[row] for step in steps[1 : 1 + fed])])
            for layer, steps in tap.seen.items()
        },
    )


def run(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    interventions: Sequence[Intervention] = (),
    capture: Sequence[int] = (),
) -> list[Transcript]:
    """Answer every question greedily, each as a single user message, in the order given."""
    eos = SPECIALS.index(EOS)
    prompts = [tokenizer.encode(prompt_text(question)).ids for question in questions]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: dict[int, Transcript] = {}
    while order:
        length = len(prompts[order[0]])
        batch = [i for i in order[:_MAX_BATCH] if len(prompts[i]) == length]
        order = order[len(batch) :]
        with _tapped(model, interventions, capture) as tap:
            outputs = _generate_batch(model, torch.tensor([prompts[i] for i in batch]), tap, eos)
        for row, index in enumerate(batch):
            results[index] = _transcript(tokenizer, row, *outputs, tap, eos)
            results[index].prompt_ids = prompts[index]
    return [results[index] for index in range(len(prompts))]
