"""`python -m steerscope.demo.train`: make the model and its catalog again, on one core.

Deterministic by seed on one machine; another CPU may round differently and give another, equally
good model.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from steerscope.demo.making.batches import StreamSettings
from steerscope.demo.making.model import ModelSize
from steerscope.demo.making.tokenizer import build_tokenizer, save_tokenizer
from steerscope.demo.making.training import (
    TrainingSettings,
    confidence_settings,
    train_confidence,
    train_model,
)
from steerscope.demo.paths import ARTIFACTS_DIR
from steerscope.demo.study.catalog import Catalog, write_catalog
from steerscope.demo.study.evaluate import REPORT_SEED, Bench, evaluate, printed
from steerscope.demo.study.populations import reporting
from steerscope.demo.study.study import held_out_known, study, with_evidence
from steerscope.demo.world.phrasings import LANGUAGES

DEFAULT_STEPS: Final = 2000
CONFIDENCE_STEPS: Final = 300


def train(
    tokenizer: Tokenizer, model_dir: Path, steps: int, seed: int, console: Console
) -> LlamaForCausalLM:
    """Train both stages behind a progress bar and save the model as stock Llama files."""
    settings = TrainingSettings(StreamSettings(num_steps=steps), seed=seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} answer loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        facts = bar.add_task("facts", total=steps, loss=0.0)
        model = train_model(tokenizer, ModelSize(), settings, _shown(bar, facts))
        confidence = bar.add_task("confidence", total=CONFIDENCE_STEPS, loss=0.0)
        second = confidence_settings(CONFIDENCE_STEPS, seed + 1)
        train_confidence(model, tokenizer, second, _shown(bar, confidence))
    model.save_pretrained(model_dir)
    save_tokenizer(tokenizer, model_dir)
    return model


def _shown(bar: Progress, task: TaskID) -> Callable[[int, float], None]:
    return lambda step, loss: bar.update(task, completed=step, loss=loss)


def catalogue(
    model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, seed: int, console: Console
) -> None:
    """Study the model, write its catalog, judge the files, and add the evidence to them."""
    model_dir, catalog_dir = out / "model", out / "catalog"
    catalog = study(model, tokenizer, seed, console.print)
    write_catalog(catalog, catalog_dir, model_dir)
    report = evaluate(model_dir, catalog_dir)
    printed(report, console)
    write_catalog(_judged(catalog, report, model_dir), catalog_dir, model_dir)
    for written in (model_dir / "model.safetensors", catalog_dir / "features.safetensors"):
        written.chmod(0o644)
    text = json.dumps(report, indent=1)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def _judged(catalog: Catalog, report: dict[str, object], model_dir: Path) -> Catalog:
    bench = Bench(model_dir, catalog)
    asked = reporting(REPORT_SEED)
    known = [question for language in LANGUAGES for question in held_out_known(language)]
    answers = bench.answer([*known, *asked.unknown, *asked.side], capture=True)
    return with_evidence(catalog, report, answers)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, study, evaluate and write everything into one folder."""
    parser = argparse.ArgumentParser(prog="python -m steerscope.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=ARTIFACTS_DIR, help="default: the artifacts")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-model", action="store_true", help="study the model already there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, started = Console(), time.monotonic()
    tokenizer = build_tokenizer()
    if args.keep_model:
        model = LlamaForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32).eval()
    else:
        model = train(tokenizer, args.out / "model", args.steps, args.seed, console)
        console.print(f"trained in {time.monotonic() - started:.0f} s")
    catalogue(model, tokenizer, args.out, args.seed, console)
    console.print(f"finished in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
