"""``lab explain``: what each feature of a catalog responds to, gathered from text and weights.

Shapes: N tokens of one text, F features of the catalog in the order of its columns.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from steerscope.catalog import store
from steerscope.catalog.model import Activation, Feature
from steerscope.catalog.tensors import FloatArray
from steerscope.lab.bench import Answer, Bench
from steerscope.lab.cases import Case
from steerscope.lab.unembedding import Promoted, Unembedding

NUM_EXAMPLES = 10
CONTEXT_TOKENS = 24
"""Tokens shown before the one that activates most; four follow it."""
FOLLOWING_TOKENS = 4


@dataclass(frozen=True, slots=True, order=True)
class Example:
    """A stretch of text around the token at which the feature is highest."""

    activation: float
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    """Index of the highest token in ``tokens``."""
    generated: bool
    """Whether the model wrote that token itself."""


@dataclass(slots=True)
class Explanation:
    """One feature."""

    feature: Feature
    steers: bool
    examples: list[Example] = field(default_factory=list)
    """Highest first, one a text."""
    num_tokens: int = 0
    num_active: int = 0
    """Tokens above 0; for an identity feature that is only its sign."""
    values: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))
    """All activations."""
    promoted: Promoted | None = None
    tokens_of: dict[int, str] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of tokens at which it is active."""
        return self.num_active / self.num_tokens if self.num_tokens else 0.0

    @property
    def is_sparse(self) -> bool:
        """Whether "active" means more than a sign."""
        return self.feature.activation is not Activation.IDENTITY


def explain(
    model: Path,
    catalog: Path,
    corpus: Sequence[Case],
    *,
    features: Sequence[str] | None = None,
    max_tokens: int = 32,
    engine_args: Mapping[str, Any] = MappingProxyType({}),
) -> list[Explanation]:
    """Run the corpus through the engine and gather what every feature did, or only ``features``."""
    loaded = store.load(catalog)
    for name in features or ():
        loaded.feature(name)
    unembedding = Unembedding(model)
    made = {
        feature.name: Explanation(feature, loaded.vectors[feature.name].W_dec is not None)
        for site in loaded.sites.values()
        for feature in site
    }
    with Bench(model, catalog, max_tokens=max_tokens, engine_args=engine_args) as bench:
        _read(bench, corpus, list(made.values()))
        for name in made.keys() - set(features or made):
            del made[name]
        for explanation in made.values():
            W_dec = loaded.vectors[explanation.feature.name].W_dec
            if W_dec is not None:
                explanation.promoted = unembedding.of(W_dec)
                explanation.tokens_of = _names(bench.tokenizer, explanation.promoted)
    return list(made.values())


def _read(bench: Bench, corpus: Sequence[Case], made: Sequence[Explanation]) -> None:
    values: list[FloatArray] = []
    best: list[list[tuple[float, int, Example]]] = [[] for _ in made]
    for n, answer in enumerate(bench.ask(corpus)):
        acts_NF = answer.track.activations()
        values.append(acts_NF)
        tokens = _texts(bench.tokenizer, answer, len(acts_NF))
        peaks_F = acts_NF.argmax(axis=0)
        for column, (explanation, heap) in enumerate(zip(made, best, strict=True)):
            peak = int(peaks_F[column])
            highest = float(acts_NF[peak, column])
            inactive = explanation.is_sparse and highest <= 0
            if inactive or (len(heap) == NUM_EXAMPLES and highest <= heap[0][0]):
                continue
            example = _example(tokens, acts_NF[:, column], peak, answer)
            (heapq.heappushpop if len(heap) == NUM_EXAMPLES else heapq.heappush)(
                heap, (highest, -n, example)
            )
    acts_MF = np.concatenate(values)
    for column, explanation in enumerate(made):
        explanation.values = acts_MF[:, column]
        explanation.num_tokens = len(acts_MF)
        explanation.num_active = int((acts_MF[:, column] > 0).sum())
        explanation.examples = [example for *_, example in sorted(best[column], reverse=True)]


def _example(
    tokens: Sequence[str], acts_N: npt.NDArray[np.float32], peak: int, answer: Answer
) -> Example:
    first = max(peak - CONTEXT_TOKENS, 0)
    last = min(peak + FOLLOWING_TOKENS + 1, len(acts_N))
    return Example(
        activation=float(acts_N[peak]),
        tokens=tuple(tokens[first:last]),
        activations=tuple(float(a) for a in acts_N[first:last]),
        peak=peak - first,
        generated=peak >= len(answer.prompt_token_ids),
    )


def _texts(tokenizer: Any, answer: Answer, num_tokens: int) -> list[str]:
    ids = (*answer.prompt_token_ids, *answer.token_ids)[:num_tokens]
    return [token_text(tokenizer, token) for token in ids]


def _names(tokenizer: Any, promoted: Promoted) -> dict[int, str]:
    return {t: token_text(tokenizer, t) for t, _ in (*promoted.promoted, *promoted.suppressed)}


def token_text(tokenizer: Any, token: int) -> str:
    """The token as it stands in text, with its leading space; its number if it has no text."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # an embedding may have more rows than the vocabulary
        return f"<{token}>"
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    # SentencePiece takes the space away from what it decodes first.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
