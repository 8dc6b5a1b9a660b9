"""The evaluation behind ``.demo/report.json``: everything through the real server.

Held-out names and held-out phrasings, both languages, whole answers scored, a 95%
Wilson interval beside each rate. Controls are random SAE latents at exactly the
edit's per-token norm: the same intervention on the features ``control_*``, which
share the edited feature's encoder (so its gate and its size) and differ in direction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from steerscope.catalog.store import Catalog
from steerscope.client import Client
from steerscope.demo import world
from steerscope.demo.live.asking import Answer, Asker, Steering
from steerscope.demo.world import Question
from steerscope.demo.world.scoring import Outcome, auroc, classify
from steerscope.lab.proportions import wilson
from steerscope.steering.interventions import canonical_json

PER_LANGUAGE: Final = 80
SIDE_PER_LANGUAGE: Final = 40
NEIGHBOURS: Final = 60
CONTROL_DIRECTIONS: Final = 8
SEED: Final = 7_2026

Progress = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions with the answers they got."""

    questions: list[Question]
    answers: list[Answer]

    def outcomes(self) -> list[Outcome]:
        """Each whole answer, judged."""
        return [classify(q, a.text) for q, a in zip(self.questions, self.answers, strict=True)]

    def count(self, test: Callable[[Outcome], bool]) -> int:
        """How many answers pass."""
        return sum(map(test, self.outcomes()))


class _Judged(NamedTuple):
    """One natural answer: what it amounts to, the signal's risk, the baseline's surprise."""

    outcome: Outcome
    risk: float
    surprise: float


class Evaluation:
    """Asks everything once and keeps what is needed for the report."""

    def __init__(self, asker: Asker, client: Client, catalog: Catalog, progress: Progress) -> None:
        self._asker = asker
        self._client = client
        self._catalog = catalog
        self._progress = progress
        self.known = _both(lambda lang: world.questions("known", lang, PER_LANGUAGE, SEED))
        self.unknown = _both(lambda lang: world.questions("unknown", lang, PER_LANGUAGE, SEED))
        self.rare = _both(lambda lang: world.questions("rare", lang, PER_LANGUAGE, SEED))
        self.untaught = _both(lambda lang: world.untaught_questions(lang, PER_LANGUAGE // 2, SEED))
        self.side = _both(lambda lang: world.side_questions(lang, SIDE_PER_LANGUAGE, SEED))

    @property
    def num_requests(self) -> int:
        """How many requests ``run`` makes, for a progress bar."""
        both = len(self.known) + len(self.unknown)
        natural = both + len(self.rare) + len(self.untaught)
        return natural + both * (1 + CONTROL_DIRECTIONS) + len(self.side) + 3 * NEIGHBOURS

    async def run(self) -> dict[str, Any]:
        """The report, but for what only the caller knows (model, eager, total seconds)."""
        began = time.monotonic()
        known = await self._ask(self.known)
        unknown = await self._ask(self.unknown)
        forced_known = await self._ask(self.unknown, "force-known")
        forced_unknown = await self._ask(self.known, "force-unknown")
        side = await self._ask(self.side, "force-known")
        others = [await self._ask(self.rare), await self._ask(self.untaught)]
        aurocs = self._auroc(known, unknown, others)  # while the hub still has their reports
        report: dict[str, Any] = {
            "known": rate(known.count(_correct), len(self.known), "correct"),
            "unknown": rate(unknown.count(_declined), len(self.unknown), "declined"),
            "force_known_on_unknown": {
                **rate(forced_known.count(_answered), len(self.unknown), "answered"),
                "malformed": forced_known.count(_malformed),
            },
            "force_unknown_on_known": rate(
                forced_unknown.count(_declined), len(self.known), "declined"
            ),
            "control_on_unknown": await self._controls(
                self.unknown, "force-known", _answered, "answered"
            ),
            "control_on_known": await self._controls(
                self.known, "force-unknown", _declined, "declined"
            ),
            "side": rate(side.count(_correct), len(self.side), "correct"),
            "auroc": aurocs,
            "neighbours_changed": await self._neighbours_changed(),
        }
        report["seconds"] = {"evaluation": round(time.monotonic() - began, 1)}
        return report

    async def _ask(self, questions: list[Question], steering: Steering = None) -> Asked:
        texts = [q.question for q in questions]
        return Asked(questions, await self._asker.ask_all(texts, steering, self._progress))

    async def _controls(
        self, questions: list[Question], policy: str, test: Callable[[Outcome], bool], name: str
    ) -> dict[str, Any]:
        counts = []
        for direction in range(CONTROL_DIRECTIONS):
            interventions = control_interventions(self._catalog, policy, direction)
            counts.append((await self._ask(questions, interventions)).count(test))
        return {
            **rate(sum(counts), len(questions) * len(counts), name),
            "directions": len(counts),
            f"max_{name}": max(counts) / len(questions),
            "per_direction": [count / len(questions) for count in counts],
        }

    def _auroc(self, known: Asked, unknown: Asked, others: list[Asked]) -> dict[str, Any]:
        """Known against unknown names; then wrong answers against everything else.

        The harder question, wrong against right among what was answered at all, stands
        beside it: a signal can be good at the first by knowing who declines.
        """
        confidence = [self._scores(asked, "known_entity_confidence") for asked in (known, unknown)]
        judged = [
            _Judged(outcome, score, -min(answer.logprobs))
            for asked in (known, unknown, *others)
            for outcome, answer, score in zip(
                asked.outcomes(),
                asked.answers,
                self._scores(asked, "hallucination_risk"),
                strict=True,
            )
        ]
        answered = [each for each in judged if each.outcome.answered]
        return {
            "known_entity_confidence": auroc(*confidence),
            "hallucination_risk": _wrong_auroc(judged, lambda each: each.risk),
            "baseline_logprob": _wrong_auroc(judged, lambda each: each.surprise),
            "hallucination_risk_among_answered": _wrong_auroc(answered, lambda each: each.risk),
            "baseline_logprob_among_answered": _wrong_auroc(answered, lambda each: each.surprise),
            "n": {
                "known": len(known.answers),
                "unknown": len(unknown.answers),
                "judged": len(judged),
                "answered": len(answered),
                "wrong": sum(each.outcome is Outcome.WRONG for each in judged),
            },
        }

    def _scores(self, asked: Asked, signal: str) -> list[float]:
        return [self._score(answer.request_id, signal) for answer in asked.answers]

    def _score(self, request_id: str, signal: str) -> float:
        report = self._client.get_request_report(request_id, wait=10.0)
        (completion,) = report.completions
        return next(s.score for s in completion.signals if s.signal == signal)

    async def _neighbours_changed(self) -> int:
        """Unsteered requests alone, then among steered ones: how many differ in any token."""
        questions = (self.known + self.unknown)[:: (2 * len(self.known)) // NEIGHBOURS]
        texts = [q.question for q in questions][:NEIGHBOURS]
        alone = [await self._asker.ask(text) for text in texts]
        mixed = await asyncio.gather(
            *(self._asker.ask(text) for text in texts),
            *(self._asker.ask(text, _policy_for(q)) for text, q in zip(texts, questions)),  # noqa: B905
        )
        for _ in range(3 * len(texts)):
            self._progress()
        pairs = zip(alone, mixed[: len(texts)], strict=True)
        return sum(before.token_ids != after.token_ids for before, after in pairs)


def _wrong_auroc(judged: Sequence[_Judged], score: Callable[[_Judged], float]) -> float:
    wrong = [score(each) for each in judged if each.outcome is Outcome.WRONG]
    rest = [score(each) for each in judged if each.outcome is not Outcome.WRONG]
    return auroc(wrong, rest)


def control_interventions(catalog: Catalog, policy: str, direction: int) -> list[dict[str, Any]]:
    """The policy's interventions, moved onto the control feature of that number."""
    (found,) = (p for p in catalog.policies if p.name == policy)
    moved: list[dict[str, Any]] = msgspec.json.decode(canonical_json(found.interventions))
    for intervention in moved:
        intervention["feature"] = control_feature(catalog, intervention["feature"], direction)
    return [{k: v for k, v in i.items() if v is not None} for i in moved]


def control_feature(catalog: Catalog, edited: str, direction: int) -> str:
    """The control feature that shares ``edited``'s encoder."""
    names = [
        feature.name
        for feature in catalog.document.features
        if feature.name.startswith("control_") and feature.source.get("encoder") == edited
    ]
    return sorted(names)[direction]


def rate(count: int, n: int, name: str) -> dict[str, Any]:
    """A count with its share and 95% Wilson interval."""
    low, high = wilson(count, n)
    return {"n": n, name: count, "rate": count / n, "ci95": [round(low, 4), round(high, 4)]}


def _both(ask: Callable[[Any], Sequence[Question]]) -> list[Question]:
    return [*ask("en"), *ask("fr")]


def _policy_for(question: Question) -> str:
    return "force-unknown" if question.split == "known" else "force-known"


def _correct(outcome: Outcome) -> bool:
    return outcome is Outcome.CORRECT


def _declined(outcome: Outcome) -> bool:
    return outcome is Outcome.DECLINED


def _malformed(outcome: Outcome) -> bool:
    return outcome is Outcome.MALFORMED


def _answered(outcome: Outcome) -> bool:
    return outcome.answered
