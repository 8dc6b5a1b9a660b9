"""The gates: whole answers on held-out names and phrasings, from the committed files.

`python -m steerscope.demo.study.evaluate` prints them; training stores them in the catalog's
evidence.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR
from steerscope.demo.study.catalog import Catalog, Signal, read_catalog
from steerscope.demo.study.confidence import answered_auroc, at_prompt_end, lowest
from steerscope.demo.study.harvest import Answered, answer_all, entity_tokens, other_prompt_tokens
from steerscope.demo.study.interventions import Feature, Intervention
from steerscope.demo.study.populations import Population, reporting
from steerscope.demo.study.probes import auroc_interval
from steerscope.demo.world import Question
from steerscope.demo.world.phrasings import LANGUAGES
from steerscope.demo.world.scoring import Outcome, auroc, wilson

REPORT_SEED: Final = 2026
_ANSWERED: Final = (Outcome.CORRECT, Outcome.WRONG)

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


def signal_score(signal: Signal, features: Mapping[str, Feature], answer: Answered) -> float:
    """Return a signal's log-odds for one answer."""
    total = signal.bias
    for term in signal.terms:
        feature = features[term.feature]
        if term.reduce == "last_prompt_token":
            value = float(feature.acts(at_prompt_end([answer], feature.layer))[0])
        else:
            value = float(lowest(feature, [answer])[0])
        total += term.weight * value
    return total


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
    signals = {s.name: s for s in bench.catalog.signals}
    confidence = signals["known_entity_confidence"]
    scores = [[signal_score(confidence, bench.features, x) for x in a] for a in (known, unknown)]
    report["known_entity_confidence"] = separation(scores[0], scores[1])
    report["hallucination_risk"] = _risk(bench, signals["hallucination_risk"], doubtful)
    report["force_known_size"] = _edit_sizes(bench.catalog.policy("force-known"), unknown)
    report["force_unknown_size"] = _edit_sizes(bench.catalog.policy("force-unknown"), known)
    report["firing"] = {
        "unknown_entity_on_unknown": _firing(bench.features["unknown_entity"], unknown),
        "unknown_entity_on_known": _firing(bench.features["unknown_entity"], known),
    }
    moved = bench.answer(asked.unknown, bench.catalog.policy("force-known"), capture=True)
    forced = [signal_score(confidence, bench.features, a) for a in moved]
    report["known_entity_confidence_moves"] = {
        "median_unknown": _median_probability(scores[1]),
        "median_unknown_under_force_known": _median_probability(forced),
        "median_known": _median_probability(scores[0]),
    }
    return report


def _median_probability(log_odds: Sequence[float]) -> float:
    return round(float(torch.tensor(list(log_odds)).median().sigmoid()), 4)


def _firing(feature: Feature, answers: Sequence[Answered]) -> float:
    acts_N = feature.acts(entity_tokens(answers, feature.layer))
    return round(float((acts_N > 0).float().mean()), 4)


def _risk(bench: Bench, signal: Signal, answers: Sequence[Answered]) -> Report:
    risk = [signal_score(signal, bench.features, a) for a in answers]
    safe = [-r for r in risk]
    least = [min(a.transcript.probabilities) for a in answers]
    wrong = [r for r, a in zip(risk, answers, strict=True) if a.outcome is Outcome.WRONG]
    right = [r for r, a in zip(risk, answers, strict=True) if a.outcome is not Outcome.WRONG]
    return {
        "all_answers": separation(wrong, right),
        "well_formed_answers_auroc": round(answered_auroc(safe, answers), 4),
        "token_probability_baseline_auroc": round(answered_auroc(least, answers), 4),
        "n_wrong": len(wrong),
        "n_right": len(right),
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
