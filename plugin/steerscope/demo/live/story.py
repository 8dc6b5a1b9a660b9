"""``make demo``: serve the embedded model and tell, in the terminal, what Steerscope is for.

Every line printed is read from the running server: answers over HTTP, activations and
policies over gRPC, metrics from the Prometheus page. Leaves ``.demo/report.json``.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steerscope.catalog import store
from steerscope.catalog.store import Catalog
from steerscope.client import Client
from steerscope.demo import world
from steerscope.demo.live import server, strip
from steerscope.demo.live.asking import Asker, Steering
from steerscope.demo.live.served_evaluation import SEED, Evaluation, control_interventions
from steerscope.demo.live.server import DemoServer
from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR
from steerscope.demo.world import Question
from steerscope.demo.world.entities import Split
from steerscope.demo.world.scoring import classify

DEMO_DIR: Final = Path(".demo")
STORY_POLICY: Final = "calm-the-unknown"


def tell(folder: Path = DEMO_DIR) -> int:
    """Serve, tell, evaluate, write the report; 0 when all of it worked."""
    console = Console(highlight=False)
    began = time.monotonic()
    console.rule("[bold]Steerscope")
    console.print("Starting stock vLLM on the embedded model, compiled (about a minute on a CPU) …")
    with server.running(folder) as running:
        started = time.monotonic()
        report = asyncio.run(_Story(console, running, store.load(CATALOG_DIR)).tell())
    report["seconds"] |= {
        "server_start": round(started - began, 1),
        "total": round(time.monotonic() - began, 1),
    }
    path = folder / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"\nReport: {path}   ({report['seconds']['total']:.0f} s in all)")
    return 0


class _Story:
    """The telling, in order; each part shows one thing and says what it shows."""

    def __init__(self, console: Console, running: DemoServer, catalog: Catalog) -> None:
        self._console = console
        self._server = running
        self._catalog = catalog
        self._client = Client(running.grpc_address)

    async def tell(self) -> dict[str, Any]:
        config = self._server.vllm_config()
        eager = bool(config["model_config"]["enforce_eager"])
        compiled = config["compilation_config"]["mode"] != 0
        self._introduce(eager, compiled)
        before = self._server.metrics()
        async with Asker(self._server) as asker:
            began = time.monotonic()
            for part in (self._ask_plainly, self._take_the_dial, self._write_a_policy):
                await part(asker)
            self._show_metrics(before)
            self._client.delete_policy(STORY_POLICY)
            told = time.monotonic() - began
            report = await self._evaluate(asker)
        report["seconds"]["story"] = round(told, 1)
        document = self._catalog.document
        return {
            "model": {
                "name": server.MODEL_NAME,
                "architecture": document.model.architecture,
                "num_hidden_layers": document.model.num_hidden_layers,
                "hidden_size": document.model.hidden_size,
                "bytes": sum(p.stat().st_size for p in MODEL_DIR.iterdir()),
            },
            "catalog_digest": self._catalog.digest,
            "eager": eager or not compiled,
            **report,
        }

    def _introduce(self, eager: bool, compiled: bool) -> None:
        self._console.print(
            f"vLLM says: enforce_eager={eager}, compiled={compiled}.\n"
            f"OpenAI API {self._server.base_url}/v1\ngRPC       {self._server.grpc_address}\n"
            f"metrics    {self._server.metrics_url}"
        )
        self._console.print(
            "In each strip below, a token's colour is one feature at that token, read inside the "
            "compiled graph:\n  " + strip.legend()
        )

    async def _ask_plainly(self, asker: Asker) -> None:
        self._console.rule("1. A name it knows, a name nobody bears")
        for language in world.LANGUAGES:
            await self._show(asker, _question("known", language))
            await self._show(asker, _question("unknown", language))

    async def _take_the_dial(self, asker: Asker) -> None:
        self._console.rule("2. The hand on the dial")
        unknown, known = _question("unknown", "en"), _question("known", "en")
        self._say("Force the model to think it knows the made-up name: it confabulates.")
        await self._show(asker, unknown, "force-known")
        self._say("Tell it that it does not know the real one: it declines.")
        await self._show(asker, known, "force-unknown")
        self._say("A random direction of the same size at the same tokens, for comparison.")
        await self._show(asker, unknown, "control")
        await self._show(asker, known, control_interventions(self._catalog, "force-unknown", 0))

    async def _write_a_policy(self, asker: Asker) -> None:
        self._console.rule("3. A policy of your own, over gRPC")
        (force,) = (p for p in self._catalog.policies if p.name == "force-unknown")
        self._client.create_policy(
            STORY_POLICY, force.interventions, description="Decline, whoever is asked about."
        )
        self._say(f"CreatePolicy {STORY_POLICY!r} answered; the next request may use it by name.")
        await self._show(asker, _question("known", "fr"), STORY_POLICY)

    def _show_metrics(self, before: str) -> None:
        self._console.rule("4. What Prometheus saw")
        old = set(before.splitlines())
        for line in self._server.metrics().splitlines():
            moved = line not in old and not line.endswith(" 0.0")
            if moved and line.startswith(_TOLD_METRICS):
                self._console.print(escape(line), soft_wrap=True)

    async def _evaluate(self, asker: Asker) -> dict[str, Any]:
        self._console.rule("5. Does it hold? Held-out names and phrasings, both languages")
        columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task("asking", total=None)
            evaluation = Evaluation(
                asker, self._client, self._catalog, lambda: progress.advance(task)
            )
            progress.update(task, total=evaluation.num_requests)
            report = await evaluation.run()
        self._console.print(_table(report))
        return report

    async def _show(self, asker: Asker, question: Question, steering: Steering = None) -> None:
        answer = await asker.ask(question.question, steering)
        report = self._client.get_request_report(answer.request_id, wait=10.0)
        (completion,) = report.completions
        outcome = classify(question, answer.text).value
        who = (
            "" if steering is None else f" [{steering if isinstance(steering, str) else 'random'}]"
        )
        self._console.print(f"\n[bold]{escape(question.question)}[/bold]{escape(who)}")
        self._console.print(f"  [italic]{escape(answer.text)}[/italic]  ({outcome})")
        tokens = strip.tokens(self._server, question.question, answer)
        for line in strip.lines(tokens, completion):
            self._console.print(f"  {line}", soft_wrap=True)
        scores = ", ".join(f"{s.signal} {s.score:.2f} {s.label}" for s in completion.signals)
        self._console.print(f"  {scores}", style="dim")

    def _say(self, text: str) -> None:
        self._console.print(f"\n{text}", style="cyan")


_TOLD_METRICS: Final = (
    "steerscope_signal_requests_total",
    "steerscope_steering_requests_total",
    "steerscope_steered_tokens_total",
    "steerscope_observed_tokens_total",
    "steerscope_signal_score_ratio_sum",
)


def _question(split: Split, language: world.Language) -> Question:
    return world.questions(split, language, 1, SEED)[0]


def _table(report: dict[str, Any]) -> Table:
    table = Table("", "share", "95% interval", "n")
    for key, label in _ROWS.items():
        row = report[key]
        low, high = row["ci95"]
        table.add_row(label, f"{row['rate']:.3f}", f"{low:.3f} - {high:.3f}", str(row["n"]))
        for name in ("max_answered", "max_declined"):
            if name in row:
                table.add_row("  the strongest of them", f"{row[name]:.3f}", "", "")
    for name, label in _AUROC_ROWS.items():
        table.add_row(f"AUROC {label}", f"{report['auroc'][name]:.3f}", "", "")
    table.add_row("neighbours changed", str(report["neighbours_changed"]), "", "")
    return table


_ROWS: Final = {
    "known": "known names answered right",
    "unknown": "made-up names declined",
    "force_known_on_unknown": "force-known: made-up names answered",
    "control_on_unknown": "  same size, random latents",
    "force_unknown_on_known": "force-unknown: known names declined",
    "control_on_known": "  same size, random latents",
    "side": "questions about nobody, under force-known",
}

_AUROC_ROWS: Final = {
    "known_entity_confidence": "known_entity_confidence, known against made-up",
    "hallucination_risk": "hallucination_risk, wrong against all else",
    "baseline_logprob": "  least token probability",
    "hallucination_risk_among_answered": "hallucination_risk, wrong against right",
    "baseline_logprob_among_answered": "  least token probability",
}
