"""The ``lab evaluate`` command: run, write, and hold the result against what is required."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from steerscope.catalog import store
from steerscope.catalog.store import SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.errors import CaseError
from steerscope.lab import cases as case_files
from steerscope.lab import report, requirements, sheet
from steerscope.lab.cases import Case
from steerscope.lab.evaluate import DOSES, Plan, evaluate, requirement_tree
from steerscope.lab.judging import Judge
from steerscope.lab.saes import open_dictionary


def run(
    arguments: argparse.Namespace, judge: Judge, told: Callable[[str], None], unmet_code: int
) -> int:
    """Exit code 0, or ``unmet_code`` when a requirement does not hold."""
    required = [requirements.parse(text) for text in arguments.require]
    cases = case_files.load(arguments.cases)
    plan = Plan(
        model=arguments.model,
        catalog=arguments.catalog,
        cases=_of_split(cases, arguments.split),
        all_cases=cases,
        policies=tuple(arguments.policy),
        doses=tuple(arguments.dose or DOSES),
        num_controls=arguments.num_controls,
        max_cases_per_group=arguments.max_cases_per_group,
        side_groups=tuple(arguments.side_group),
        self_report=arguments.self_report,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        decoders=_decoders(arguments),
        engine_args=arguments.vllm,
    )
    evaluation, rows = evaluate(plan, judge, told)
    report.write_evaluation(arguments.out, evaluation, rows, arguments.title)
    (arguments.out / "cases.jsonl").write_bytes(sheet.to_json(rows))
    for name, signal in evaluation.signals.items():
        print(f"{name}  AUROC {report.estimate(signal.score.auroc)}  "
              f"ECE {report.estimate(signal.score.ece)}")  # fmt: skip
    print(arguments.out / "README.md")
    unmet = requirements.check(required, requirement_tree(evaluation))
    for one in unmet:
        print(f"not met: {one.requirement}: {one.reason}", file=sys.stderr)
    return unmet_code if unmet else 0


def _of_split(cases: list[Case], split: str) -> list[Case]:
    if split == "all":
        return cases
    chosen = [case for case in cases if case_files.split_of(case) == split]
    if split == "test":
        case_files.check_held_out(cases)
    if not chosen:
        raise CaseError(f"no case is in the {split} split")
    return chosen


def _decoders(arguments: argparse.Namespace) -> dict[SiteKey, FloatArray]:
    """The rows that controls are drawn from, at the dictionary's site."""
    if arguments.sae is None:
        return {}
    model = store.load(arguments.catalog).document.model
    dictionary = open_dictionary(arguments.sae, model)
    rows = dictionary.columns.W_dec
    return {} if rows is None else {dictionary.key: rows}
