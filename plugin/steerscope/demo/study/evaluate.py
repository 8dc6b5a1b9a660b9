"""The gates: whole answers on held-out names and phrasings, from the committed files.

`python -m steerscope.demo.study.evaluate` prints them; training stores them in the catalog's
evidence.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR
from steerscope.demo.study.catalog import Catalog, read_catalog
from steerscope.demo.study.confidence import answered
from steerscope.demo.study.harvest import Answered, answer_all, entity_tokens, other_prompt_tokens
from steerscope.demo.study.interventions import Feature, Intervention
from steerscope.demo.study.populations import Population, reporting
from steerscope.demo.study.probes import auroc_interval, auroc_interval_by_name
from steerscope.demo.study.reductions import at_prompt_end, log_odds
from steerscope.demo.world import Question
from steerscope.demo.world.phrasings import LANGUAGES
from steerscope.demo.world.scoring import Outcome, auroc
from steerscope.lab.proportions import wilson

REPORT_SEED: Final = 2026
_ANSWERED: Final = (Outcome.CORRECT, Outcome.WRONG)

# Which questions' answers are compared with one another.
_POOLS: Final = {
    "rare_persons": ("rare",),
    "taught_against_untaught": ("known", "untaught"),
    "known_and_rare_persons": ("known", "untaught", "rare"),
}

Share = dict[str, object]
Report = dict[str, object]


class Bench:
    """A model with its catalog, ready to answer under a policy."""

    def __init__(self, model_dir: Path, catalog: Catalog) -> None:
        self.model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.catalog = catalog
        self.features = {entry.feature.name: entry.feature for entry in catalog.features}

    def answer(
        self, asked: Sequence[Question], edit: Intervention | None = None, capture: bool = False
    ) -> list[Answered]:
        """Answer all questions, under one edit if given."""
        layers = range(self.model.config.num_hidden_layers) if capture else ()
        edits = [edit] if edit else []
        return answer_all(self.model, self.tokenizer, asked, edits, tuple(layers))

    def scores(self, signal: str, answers: Sequence[Answered]) -> list[float]:
        """Return a signal's log-odds for each answer."""
        found = next(s for s in self.catalog.signals if s.name == signal)
        return log_odds(found, self.features, answers)

    def first_entropy(self, answers: Sequence[Answered]) -> list[float]:
        """Return the entropy of each answer's first token, before it was chosen."""
        last = self.model.config.num_hidden_layers - 1
        logits_NV = self.model.lm_head(self.model.model.norm(at_prompt_end(answers, last)))
        surprise_NV = -logits_NV.log_softmax(-1)
        return [float(e) for e in (surprise_NV.exp().reciprocal() * surprise_NV).sum(-1)]

    def controls(self) -> list[Feature]:
        """Return the norm-matched controls."""
        return [f for name, f in self.features.items() if name.startswith("control_")]


def shares(answers: Sequence[Answered], *outcomes: Outcome) -> Share:
    """Return the share of these outcomes, pooled with its 95% interval, and per language."""
    hits = [a.outcome in outcomes for a in answers]
    interval = wilson(sum(hits), len(hits))
    report: Share = {
        "share": round(sum(hits) / len(hits), 4),
        "ci95": [round(interval.low, 4), round(interval.high, 4)],
        "n": len(hits),
    }
    for language in LANGUAGES:
        spoken = [h for h, a in zip(hits, answers, strict=True) if a.question.language == language]
        report[language] = round(sum(spoken) / len(spoken), 4)
    return report


def _behaviour(bench: Bench, asked: Population) -> Report:
    known, unknown = bench.answer(asked.known), bench.answer(asked.unknown)
    things = bench.answer(asked.things)
    return {
        "known_correct": shares(known, Outcome.CORRECT),
        "known_declined": shares(known, Outcome.DECLINED),
        "unknown_declined": shares(unknown, Outcome.DECLINED),
        "unknown_malformed": shares(unknown, Outcome.MALFORMED),
        "side_correct": shares(bench.answer(asked.side), Outcome.CORRECT),
        "known_things_correct": shares(_of(things, "known"), Outcome.CORRECT),
        "unknown_things_declined": shares(_of(things, "unknown"), Outcome.DECLINED),
    }


def _of(answers: Sequence[Answered], *splits: str) -> list[Answered]:
    return [a for a in answers if a.question.split in splits]


def _steered(bench: Bench, asked: Population) -> Report:
    known_edit = bench.catalog.policy("force-known")
    unknown_edit = bench.catalog.policy("force-unknown")
    forced_known = bench.answer(asked.unknown, known_edit)
    forced_unknown = bench.answer(asked.known, unknown_edit)
    return {
        "force_known_on_unknown_answered": shares(forced_known, *_ANSWERED),
        "force_known_on_unknown_malformed": shares(forced_known, Outcome.MALFORMED),
        "force_known_on_known_correct": shares(
            bench.answer(asked.known, known_edit), Outcome.CORRECT
        ),
        "force_known_on_side_correct": shares(
            bench.answer(asked.side, known_edit), Outcome.CORRECT
        ),
        "force_unknown_on_known_declined": shares(forced_unknown, Outcome.DECLINED),
        "force_unknown_on_known_malformed": shares(forced_unknown, Outcome.MALFORMED),
        "force_unknown_on_side_correct": shares(
            bench.answer(asked.side, unknown_edit), Outcome.CORRECT
        ),
    }


def _controlled(bench: Bench, asked: Population) -> Report:
    """Run both policies with every random decoder in place of the real one."""
    known_edit = bench.catalog.policy("force-known")
    unknown_edit = bench.catalog.policy("force-unknown")
    on, off = [], []
    for control in bench.controls():
        answers = bench.answer(asked.unknown, replace(known_edit, feature=control))
        on.append(sum(a.outcome.answered for a in answers) / len(answers))
        answers = bench.answer(asked.known, replace(unknown_edit, feature=control))
        off.append(sum(a.outcome is Outcome.DECLINED for a in answers) / len(answers))
    return {
        "control_on_unknown_answered": _spread(on),
        "control_on_known_declined": _spread(off),
    }


def _spread(values: Sequence[float]) -> Share:
    return {
        "mean": round(sum(values) / len(values), 4),
        "max": round(max(values), 4),
        "each": [round(v, 4) for v in values],
    }


def separation(pos: Sequence[float], neg: Sequence[float]) -> Share:
    """Return an AUROC with its bootstrap interval and the number of samples."""
    interval = auroc_interval(pos, neg)
    return {
        "auroc": round(auroc(pos, neg), 4),
        "auroc_ci95": [round(interval.low, 4), round(interval.high, 4)],
        "n": len(pos) + len(neg),
    }


def _edit_sizes(edit: Intervention, answers: Sequence[Answered]) -> Share:
    """Return the edit's norm at the entities' last tokens, beside the residual stream's own."""
    layer = edit.feature.layer
    resid_ND = entity_tokens(answers, layer)
    norms_N = edit.delta(resid_ND).norm(dim=-1)
    others_N = edit.delta(other_prompt_tokens(answers, layer)).norm(dim=-1)
    return {
        "edited_share_of_entity_tokens": round(float((norms_N > 0).float().mean()), 4),
        "edited_share_of_other_tokens": round(float((others_N > 0).float().mean()), 4),
        "mean_edit_norm": round(float(norms_N[norms_N > 0].mean()), 2),
        "mean_residual_norm": round(float(resid_ND.norm(dim=-1).mean()), 2),
    }


def _readings(bench: Bench, asked: Population) -> Report:
    known, unknown = (
        bench.answer(asked.known, capture=True),
        bench.answer(asked.unknown, capture=True),
    )
    doubtful = bench.answer(asked.doubtful, capture=True) + known + unknown
    report: Report = {}
    for name, sign in (("unknown_entity", -1.0), ("known_entity", 1.0)):
        feature = bench.features[name]
        pre = replace(feature, threshold=-torch.inf)
        at = [(sign * pre.acts(entity_tokens(a, feature.layer))).tolist() for a in (known, unknown)]
        report[name] = separation(at[0], at[1])
    scores = [bench.scores("known_entity_confidence", a) for a in (known, unknown)]
    report["known_entity_confidence"] = separation(scores[0], scores[1])
    report["answered_vs_declined"] = _answering(bench, doubtful)
    report["hallucination_risk"] = _risk(bench, doubtful)
    report["entity_end"] = _entity_ends(bench, [*known, *unknown])
    report["force_known_size"] = _edit_sizes(bench.catalog.policy("force-known"), unknown)
    report["force_unknown_size"] = _edit_sizes(bench.catalog.policy("force-unknown"), known)
    report["firing"] = {
        "unknown_entity_on_unknown": _firing(bench.features["unknown_entity"], unknown),
        "unknown_entity_on_known": _firing(bench.features["unknown_entity"], known),
    }
    moved = bench.answer(asked.unknown, bench.catalog.policy("force-known"), capture=True)
    forced = bench.scores("known_entity_confidence", moved)
    report["known_entity_confidence_moves"] = {
        "median_unknown": _median_probability(scores[1]),
        "median_unknown_under_force_known": _median_probability(forced),
        "median_known": _median_probability(scores[0]),
    }
    report["hallucination_risk_moves"] = {
        "median_known": _median_probability(bench.scores("hallucination_risk", known)),
        "median_unknown": _median_probability(bench.scores("hallucination_risk", unknown)),
        "median_unknown_under_force_known": _median_probability(
            bench.scores("hallucination_risk", moved)
        ),
    }
    return report


def _median_probability(log_odds: Sequence[float]) -> float:
    return round(float(torch.tensor(list(log_odds)).median().sigmoid()), 4)


def _firing(feature: Feature, answers: Sequence[Answered]) -> float:
    acts_N = feature.acts(entity_tokens(answers, feature.layer))
    return round(float((acts_N > 0).float().mean()), 4)


def _answering(bench: Bench, answers: Sequence[Answered]) -> Share:
    """Return how well the prompt's end tells answers from declines."""
    yes = answered(answers)
    no = [a for a in answers if a.outcome is Outcome.DECLINED]
    scores = [bench.scores("answered_vs_declined", a) for a in (yes, no)]
    return separation(scores[0], scores[1])


def _entity_ends(bench: Bench, answers: Sequence[Answered]) -> Share:
    """Return how often the last token at which `entity_end` fires is the entity's last."""
    feature, found, tokens, fired = bench.features["entity_end"], 0, 0, 0
    for a in answers:
        fires_N = feature.acts(a.transcript.prompt_resid[feature.layer]) > 0
        at = fires_N.nonzero()[:, 0].tolist()
        found += bool(at) and at[-1] == a.entity_last
        tokens += len(fires_N) - 1
        fired += sum(n != a.entity_last for n in at)
    return {
        "last_fires_at_the_names_end": round(found / len(answers), 4),
        "fires_at_other_tokens": round(fired / tokens, 4),
        "n": len(answers),
    }


def _risk(bench: Bench, answers: Sequence[Answered]) -> Report:
    """Compare the risk with what token probabilities alone tell, among well-formed answers."""
    judged = answered(answers)
    said = [a.transcript.probabilities for a in judged]
    detectors = {
        "signal": bench.scores("hallucination_risk", judged),
        "answer_doubt_alone": _reading(bench, "answer_doubt", judged),
        "least_token_probability": [-min(p) for p in said],
        "mean_token_log_probability": [-sum(map(math.log, p)) / len(p) for p in said],
        "first_token_entropy": bench.first_entropy(judged),
    }
    risk = bench.scores("hallucination_risk", answers)
    return {
        "all_answers": _wrong_against_rest(risk, answers),
        "among_answers": {name: _wrong_against_rest(s, judged) for name, s in detectors.items()},
        "by_pool": {
            pool: {name: _within(pool, scores, judged) for name, scores in detectors.items()}
            for pool in _POOLS
        },
        "answers_by_pool": _counts(judged),
    }


def _reading(bench: Bench, feature: str, answers: Sequence[Answered]) -> list[float]:
    found = bench.features[feature]
    return [float(f) for f in found.acts(at_prompt_end(answers, found.layer))]


def _wrong_against_rest(scores: Sequence[float], answers: Sequence[Answered]) -> Share:
    """Return the AUROC of a score for wrong answers, with its interval over names."""
    wrong = [a.outcome is Outcome.WRONG for a in answers]
    interval = auroc_interval_by_name(scores, wrong, [a.question.entity for a in answers])
    pos = [s for s, w in zip(scores, wrong, strict=True) if w]
    neg = [s for s, w in zip(scores, wrong, strict=True) if not w]
    return {
        "auroc": round(auroc(pos, neg), 4),
        "auroc_ci95": [round(interval.low, 4), round(interval.high, 4)],
        "n_wrong": len(pos),
        "n_right": len(neg),
    }


def _within(pool: str, scores: Sequence[float], answers: Sequence[Answered]) -> Share:
    chosen = [
        (s, a) for s, a in zip(scores, answers, strict=True) if a.question.split in _POOLS[pool]
    ]
    return _wrong_against_rest([s for s, _ in chosen], [a for _, a in chosen])


def _counts(answers: Sequence[Answered]) -> Report:
    pools = sorted({a.question.split for a in answers})
    return {
        pool: {
            outcome.value: sum(a.outcome is outcome for a in _of(answers, pool))
            for outcome in _ANSWERED
        }
        for pool in pools
    }


def evaluate(model_dir: Path, catalog_dir: Path, seed: int = REPORT_SEED) -> Report:
    """Return every gate and reading on held-out names and phrasings."""
    torch.set_num_threads(1)
    bench = Bench(model_dir, read_catalog(catalog_dir))
    asked = reporting(seed)
    with torch.no_grad():
        return {
            "behaviour": _behaviour(bench, asked),
            "steered": _steered(bench, asked),
            "controls": _controlled(bench, asked),
            "readings": _readings(bench, asked),
        }


def printed(report: Report, console: Console) -> None:
    """Print the report as one table."""
    table = Table("what", "value", title="held-out names and phrasings, whole answers")
    for group in report.values():
        assert isinstance(group, dict)
        for name, value in group.items():
            table.add_row(name, json.dumps(value))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate the committed artifacts, or those of another folder."""
    parser = argparse.ArgumentParser(
        prog="python -m steerscope.demo.study.evaluate", description=__doc__
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--catalog", type=Path, default=CATALOG_DIR)
    parser.add_argument("--seed", type=int, default=REPORT_SEED)
    args = parser.parse_args(argv)
    printed(evaluate(args.model, args.catalog, args.seed), Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
