"""What a capture run leaves behind: the streams at the tokens that matter, and some others.

Shapes: n tokens of one choice, D model width, M sampled tokens of all cases.
"""

from __future__ import annotations

import enum
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from steerscope.catalog import authoring
from steerscope.catalog.store import SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.lab.bench import Answer, Bench
from steerscope.lab.capture import captured, write_capture_catalog
from steerscope.lab.cases import Case
from steerscope.lab.judging import Judge, Outcome

MAX_SAMPLE_BYTES = 1 << 30
"""Streams kept for training a dictionary and for telling chosen tokens from others."""


class TokenChoice(enum.StrEnum):
    """Which prompt tokens a candidate is read at."""

    LAST_ENTITY = "last_entity_token"
    LAST_PROMPT = "last_prompt_token"
    MAX_SPAN = "max_entity_span"


@dataclass(frozen=True, slots=True)
class Harvested:
    """One case: its answer, and the streams at its entity's tokens and its prompt's last one."""

    case: Case
    text: str
    outcome: Outcome
    span: Mapping[SiteKey, FloatArray]
    """[n, D] by site; n is 0 where the case has no entity."""
    last: Mapping[SiteKey, FloatArray]
    """[1, D] by site."""

    def at(self, key: SiteKey, choice: TokenChoice) -> FloatArray:
        """The streams [n, D] at the chosen tokens."""
        if choice is TokenChoice.LAST_PROMPT:
            return self.last[key]
        return self.span[key][-1:] if choice is TokenChoice.LAST_ENTITY else self.span[key]


@dataclass(frozen=True, slots=True)
class Harvest:
    """All cases, in the order asked."""

    cases: tuple[Harvested, ...]
    others: Mapping[SiteKey, FloatArray]
    """[M, D]: prompt tokens that are neither of the entity nor the last, of fit cases."""
    sample: Mapping[SiteKey, FloatArray]
    """[M, D]: tokens of all kinds, prompts and answers, of fit cases."""

    def of(self, wanted: Iterable[Case]) -> list[Harvested]:
        """Those of the wanted cases."""
        ids = {id(case) for case in wanted}
        return [h for h in self.cases if id(h.case) in ids]


def harvest(
    model: Path,
    cases: Sequence[Case],
    fit: Sequence[Case],
    keys: Sequence[SiteKey],
    judge: Judge,
    *,
    max_tokens: int,
    seed: int,
    engine_args: Mapping[str, Any] = MappingProxyType({}),
) -> Harvest:
    """Ask every case unsteered and keep what is needed; ``fit`` may teach, the others only test."""
    keys = sorted(keys)
    with tempfile.TemporaryDirectory() as folder:
        catalog = Path(folder) / "capture"
        write_capture_catalog(catalog, authoring.fingerprint_of(model), keys)
        with Bench(model, catalog, max_tokens=max_tokens, engine_args=engine_args) as bench:
            return _collect(bench, cases, fit, keys, judge, np.random.default_rng(seed))


def _collect(
    bench: Bench,
    cases: Sequence[Case],
    fit: Sequence[Case],
    keys: Sequence[SiteKey],
    judge: Judge,
    rng: np.random.Generator,
) -> Harvest:
    teaching = {id(case) for case in fit}
    kept: list[Harvested] = []
    others: dict[SiteKey, list[FloatArray]] = {key: [] for key in keys}
    sample: dict[SiteKey, list[FloatArray]] = {key: [] for key in keys}
    room = MAX_SAMPLE_BYTES // max(len(teaching) * len(keys), 1)
    for answer in bench.ask(cases):
        streams = captured(answer.track, keys)
        span = bench.tokens(answer.case)[1]
        kept.append(_harvested(answer, streams, span, judge))
        if id(answer.case) in teaching:
            plain = _plain_tokens(answer, span)
            for key, stream_ND in streams.items():
                num = max(room // stream_ND[:1].nbytes, 1)
                others[key].append(stream_ND[plain[:num]])
                sample[key].append(_some(stream_ND, num, rng))
    return Harvest(tuple(kept), _joined(others), _joined(sample))


def _harvested(
    answer: Answer, streams: Mapping[SiteKey, FloatArray], span: Sequence[int], judge: Judge
) -> Harvested:
    end = len(answer.prompt_token_ids) - 1
    return Harvested(
        case=answer.case,
        text=answer.text,
        outcome=judge.outcome(answer.case, answer.text),
        span={key: stream_ND[list(span)].copy() for key, stream_ND in streams.items()},
        last={key: stream_ND[end : end + 1].copy() for key, stream_ND in streams.items()},
    )


def _plain_tokens(answer: Answer, span: Sequence[int]) -> list[int]:
    end = len(answer.prompt_token_ids) - 1
    return [i for i in range(end) if i not in span]


def _some(stream_ND: FloatArray, num: int, rng: np.random.Generator) -> FloatArray:
    if len(stream_ND) <= num:
        return stream_ND.copy()
    return stream_ND[rng.choice(len(stream_ND), num, replace=False)]


def _joined(parts: Mapping[SiteKey, Sequence[FloatArray]]) -> Mapping[SiteKey, FloatArray]:
    return {key: np.concatenate(streams) for key, streams in parts.items() if streams}
