"""``steerscope lab``: discover, train-sae, explain, evaluate, calibrate.

Declared here, run in ``steerscope.lab``, which is imported only then: it needs the extra ``lab``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from steerscope.errors import LabError

if TYPE_CHECKING:
    from steerscope.lab.judging import Judge

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

UNMET = 3
"""Exit code when a requirement does not hold."""

NEEDED = ("sklearn", "matplotlib", "vllm")


def add_commands(commands: Parsers) -> None:
    """Declare ``steerscope lab`` and its parts."""
    lab = commands.add_parser("lab", help="find, prove and calibrate features on your own cases")
    parts = lab.add_subparsers(required=True, metavar="PART")
    _add_discover(parts)
    _add_train_sae(parts)
    _add_explain(parts)
    _add_evaluate(parts)
    _add_calibrate(parts)


def _add_discover(parts: Parsers) -> None:
    part = parts.add_parser(
        "discover", help="find the feature that tells two sets of cases apart, and prove it"
    )
    part.add_argument("--positive", type=Path, required=True, help="cases (.jsonl) that show it")
    part.add_argument("--negative", type=Path, required=True, help="cases that do not")
    part.add_argument("--side", type=Path, help="unrelated cases that an edit should leave alone")
    part.add_argument("--name", required=True, help="of the feature: known_entity, say")
    part.add_argument("--opposite", help="of a latent that is active on the negative cases")
    part.add_argument("--label", help="what case files call it (default: the name)")
    part.add_argument("--site", action="append", help="resid_post.12; default: every resid_post")
    part.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="FORMAT:PATH",
        help="a dictionary to look into; without any, small ones are trained",
    )
    part.add_argument("--num-train", type=int, default=2, help="sites to train one for (default 2)")
    part.add_argument("--append", action="store_true", help="to the catalog that --out already is")
    _add_run(part)
    part.set_defaults(run=_discover)


def _add_train_sae(parts: Parsers) -> None:
    part = parts.add_parser("train-sae", help="train a small dictionary on captured streams")
    part.set_defaults(run=_train_sae)
    part.add_argument("model", type=Path, help="the model's folder")
    part.add_argument("--cases", type=Path, required=True, help="what to ask it (.jsonl)")
    part.add_argument("--site", required=True, help="where to read: resid_post.12, say")
    part.add_argument("--out", type=Path, required=True, help="a new folder for the dictionary")
    part.add_argument("--d-sae", type=int, default=192)
    part.add_argument("--k", type=int, default=8)
    part.add_argument("--steps", type=int, default=1500)
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--max-tokens", type=int, default=32, help="of each answer (default 32)")
    _add_vllm(part)


def _add_explain(parts: Parsers) -> None:
    part = parts.add_parser("explain", help="write each feature's card into its catalog")
    part.add_argument("catalog", type=Path)
    part.add_argument("--cases", type=Path, required=True, help="texts to read (.jsonl)")
    part.add_argument("--feature", action="append", help="only these; default: all")
    part.add_argument("--model", type=Path, required=True)
    part.add_argument("--max-tokens", type=int, default=32, help="of each answer (default 32)")
    _add_vllm(part)
    part.set_defaults(run=_explain)


def _add_evaluate(parts: Parsers) -> None:
    part = parts.add_parser(
        "evaluate", help="judge a catalog's signals and policies on labelled cases"
    )
    part.add_argument("catalog", type=Path)
    part.add_argument("--cases", type=Path, required=True, help="labelled cases (.jsonl)")
    part.add_argument("--split", choices=("fit", "dev", "test", "all"), default="test")
    part.add_argument("--policy", action="append", default=[], help="also steer, by dose")
    part.add_argument("--side-group", action="append", default=[], help="left alone by steering?")
    part.add_argument("--sae", metavar="FORMAT:PATH", help="whose rows the controls are drawn from")
    part.add_argument("--num-controls", type=_count, default=12)
    part.add_argument("--dose", type=float, action="append", help="amounts; default .25 to 1.5")
    part.add_argument("--max-cases-per-group", type=int, default=60, help="for steering")
    part.add_argument("--self-report", default="", help="a question about how sure the model is")
    part.add_argument("--title", default="Evaluation")
    part.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="'SIGNAL.METRIC>=NUMBER'",
        help=f"exit with {UNMET} unless it holds; may be given again",
    )
    _add_run(part)
    part.set_defaults(run=_evaluate)


def _add_calibrate(parts: Parsers) -> None:
    part = parts.add_parser(
        "calibrate", help="fit probabilities and thresholds, and remember what is normal"
    )
    part.add_argument("catalog", type=Path)
    part.add_argument("--cases", type=Path, required=True, help="labelled cases (.jsonl)")
    part.add_argument("--method", choices=("logistic", "platt", "isotonic", "auto"), default="auto")
    part.add_argument("--max-fpr", type=float, action="append", help="default 0.01 and 0.05")
    part.add_argument(
        "--relabel", action="append", default=[], help="a signal whose bands the thresholds become"
    )
    part.add_argument("--report", type=Path, help="folder for calibration.json and its page")
    _add_run(part)
    part.set_defaults(run=_calibrate)


def _add_run(part: argparse.ArgumentParser) -> None:
    part.add_argument("--model", type=Path, required=True, help="the model's folder")
    part.add_argument("--out", type=Path, required=True, help="folder for what is found")
    part.add_argument(
        "--declines",
        type=Path,
        help="regular expressions, one a line, of answers that decline (default: common English)",
    )
    part.add_argument(
        "--whole", action="store_true", help="a right answer is the expected one, not holds it"
    )
    part.add_argument("--max-tokens", type=int, default=64, help="of each answer (default 64)")
    part.add_argument("--seed", type=int, default=0)
    _add_vllm(part)


def _add_vllm(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--vllm",
        type=_engine_args,
        default={},
        metavar="JSON",
        help='arguments of vllm.LLM, e.g. \'{"max_model_len": 2048, "enforce_eager": true}\'',
    )


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _engine_args(text: str) -> dict[str, Any]:
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return tree


def _discover(arguments: argparse.Namespace, _: list[str]) -> int:
    _need()
    from steerscope.lab import discovery_command

    return discovery_command.run(arguments, _judge(arguments), _tell)


def _train_sae(arguments: argparse.Namespace, _: list[str]) -> int:
    _need()
    from steerscope.lab import train_sae

    return train_sae.run(arguments)


def _explain(arguments: argparse.Namespace, _: list[str]) -> int:
    _need()
    from steerscope.lab import cards, cases
    from steerscope.lab.explain import explain

    found = explain(
        arguments.model,
        arguments.catalog,
        cases.load(arguments.cases),
        features=arguments.feature,
        max_tokens=arguments.max_tokens,
        engine_args=arguments.vllm,
    )
    written = cards.write(arguments.catalog, found)
    print(f"{written[-1]}: {len(found)} cards")
    return 0


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> int:
    _need()
    from steerscope.lab import evaluate_command

    return evaluate_command.run(arguments, _judge(arguments), _tell, UNMET)


def _calibrate(arguments: argparse.Namespace, _: list[str]) -> int:
    _need()
    from steerscope.lab import calibrate, cases, report

    plan = calibrate.Plan(
        model=arguments.model,
        catalog=arguments.catalog,
        cases=cases.load(arguments.cases),
        method=arguments.method,
        max_fprs=tuple(arguments.max_fpr or (0.01, 0.05)),
        relabel=tuple(arguments.relabel),
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        engine_args=arguments.vllm,
    )
    found = calibrate.calibrate(plan, arguments.out, _judge(arguments), _tell)
    report.write_calibration(arguments.report or arguments.out, found)
    print(f"{arguments.out}: {len(found.signals)} signals, {found.num_baselines} baselines")
    return 0


def _judge(arguments: argparse.Namespace) -> Judge:
    from steerscope.lab import judging

    if arguments.declines is None:
        return judging.Judge(whole=arguments.whole)
    return judging.Judge(judging.read_declines(arguments.declines), whole=arguments.whole)


def _need() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LabError(f"{', '.join(missing)} not installed; install steerscope[lab] beside vLLM")


def _tell(what: str) -> None:
    print(f"lab: {what}", file=sys.stderr, flush=True)
