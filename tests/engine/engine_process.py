"""A vLLM engine in a process of its own, fed rounds of requests over pipes as JSON lines.

Run as a script it is the child; ``EngineProcess`` is the parent's handle. The engine core runs
inside the child, so that a test can see preemptions and plant a bug (``mutations.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

NUM_LAST_STEPS = 3
"""Steps without tokens, which a core in a process of its own takes too: they tell of ends."""
MUTATION_ENV = "TEST_MUTATION"
HEALTHY_ENV = "TEST_HUB_HEALTHY_SECONDS"
"""After how long a hub that ends is started again at once, for tests that kill it often."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
TRITON_CPU = Path(__file__).parents[1] / "triton_cpu"
V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join([str(TRITON_CPU), os.environ.get("PYTHONPATH", "")]),
}
"""Environment for the V2 model runner on a CPU."""


class EngineProcess:
    """Start an engine on ``model``; with Steerscope where ``config`` is given.

    ``environment`` adds to the child's; ``mutation`` names a bug to plant in it.
    """

    def __init__(
        self,
        model: Path,
        config: Path | None,
        log: Path,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        mutation: str = "",
        **engine_args: Any,
    ) -> None:
        added = {**ENVIRONMENT, **environment, MUTATION_ENV: mutation}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERSCOPE")}
        environment |= added
        self.num_preemptions = 0
        if config is not None:
            environment["STEERSCOPE_CONFIG"] = str(config)
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(model), json.dumps(engine_args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        self.info = self._read()

    def run(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """Submit together; each is {"prompt", "max_tokens", "extra_args"?, ...sampling}.

        A request may also say ``arrive_at``, the step before which it is submitted, and
        ``abort_after``, how many tokens it may have before it is aborted. ``change_after`` is
        how many it has when its steering is changed in flight to ``change_to``, a spec's JSON or
        ``release``; ``change_at_step`` is the step before which that happens. ``pace`` is how
        many seconds each step of the round takes at least, for a test that acts meanwhile.
        """
        self.process.stdin.write(json.dumps(requests).encode() + b"\n")
        self.process.stdin.flush()
        reply = self._read()
        self.num_preemptions += reply["preemptions"]
        return reply["results"]

    def stop(self) -> None:
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> Any:
        for line in self.process.stdout:
            if line.startswith(b"RESULT "):
                return json.loads(line[7:])
        raise RuntimeError(f"engine ended:\n{self.log.read_text(errors='replace')[-4000:]}")


def steering(*interventions: dict[str, Any]) -> dict[str, str]:
    """``extra_args`` with inline steering."""
    return {"steering": json.dumps({"interventions": interventions})}


def _serve(model: str, engine_args: dict[str, Any]) -> None:
    from vllm import LLM
    from vllm.v1.core.sched.scheduler import Scheduler

    if mutation := os.environ[MUTATION_ENV]:
        import mutations

        mutations.plant(mutation)
    if healthy := os.environ.get(HEALTHY_ENV):
        from steerscope.hub import supervision

        supervision.HEALTHY_SECONDS = float(healthy)
    preemptions = []
    preempt = Scheduler._preempt_request
    Scheduler._preempt_request = lambda self, request, *args, **kwargs: (
        preemptions.append(request.request_id),
        preempt(self, request, *args, **kwargs),
    )[1]
    defaults = {"dtype": "float32", "max_model_len": 256, "seed": 0, "block_size": 32}
    llm = LLM(model=model, skip_tokenizer_init=True, **defaults | engine_args)
    config = llm.llm_engine.vllm_config
    _tell(
        {
            "compilation_mode": int(config.compilation_config.mode),
            "enforce_eager": config.model_config.enforce_eager,
            "additional_config": config.additional_config,
            "compile_hash": config.compute_hash(),
            "v2_model_runner": config.use_v2_model_runner,
        }
    )
    for line in sys.stdin:
        preemptions.clear()
        results = Round(llm, json.loads(line)).run()
        _tell({"results": results, "preemptions": len(preemptions)})


_count = iter(range(1_000_000))


class Round:
    """Admit what is admissible as it arrives, run it together, report what was refused."""

    def __init__(self, llm: Any, requests: list[dict[str, Any]]) -> None:
        self.engine = llm.llm_engine
        self.results: list[dict[str, Any]] = [{} for _ in requests]
        self.abort_after: dict[str, int] = {}
        self.changes: dict[str, tuple[int, str]] = {}
        self.timed: dict[int, tuple[str, str]] = {}
        self.changed_at: dict[str, int] = {}
        self.index_of: dict[str, int] = {}
        self.pace = max((request.pop("pace", 0.0) for request in requests), default=0.0)
        indexed = [(i, {"arrive_at": 0, **request}) for i, request in enumerate(requests)]
        self.arriving = sorted(indexed, key=lambda item: item[1]["arrive_at"], reverse=True)

    def run(self) -> list[dict[str, Any]]:
        step = 0
        while self.arriving or self.engine.has_unfinished_requests():
            while self.arriving and self.arriving[-1][1]["arrive_at"] <= step:
                self.submit(*self.arriving.pop())
            if step in self.timed:
                self.change(*self.timed[step])
            for output in self.engine.step():
                self.take(output)
            step += 1
            time.sleep(self.pace)
        for _ in range(NUM_LAST_STEPS):
            self.engine.step()
        return self.results

    def take(self, output: Any) -> None:
        tokens = [list(c.token_ids) for c in output.outputs]
        limit = self.abort_after.get(output.request_id)
        if (
            output.request_id in self.changes
            and len(tokens[0]) >= self.changes[output.request_id][0]
        ):
            self.change(output.request_id, self.changes.pop(output.request_id)[1])
        is_cut = limit is not None and len(tokens[0]) >= limit and not output.finished
        if is_cut:
            self.engine.abort_request([output.request_id])
        if is_cut or output.finished:
            self.results[self.index_of[output.request_id]] = {
                "request_id": output.request_id,
                "tokens": tokens,
                "cached": output.num_cached_tokens,
                "aborted": is_cut,
                "changed_at": self.changed_at.get(output.request_id),
                "logprobs": _logprobs(output),
            }

    def change(self, external_id: str, spec: str) -> None:
        """Steer a running request anew, at the scheduler, from its next step on."""
        from steerscope.engine.seams import scheduler_side_of
        from steerscope.steering.interventions import SteeringSpec, parse_spec
        from steerscope.steering.stamp import STAMP_KEY, Stamp, decode

        scheduler = self.engine.engine_core.engine_core.scheduler
        (request,) = (r for i, r in scheduler.requests.items() if i.startswith(external_id + "-"))
        catalog = self.engine.vllm_config.additional_config["steerscope"]["catalog_digest"]

        released = SteeringSpec(interventions=())

        def stamp_from(position: int) -> Stamp:
            self.changed_at[external_id] = position
            before = decode(request.sampling_params.extra_args[STAMP_KEY])
            asked = released if spec == "release" else parse_spec(spec)
            return before.changed(position, "inline", asked, catalog, request.num_prompt_tokens)

        scheduler_side_of(scheduler).change(request.request_id, stamp_from)

    def submit(self, index: int, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        request = dict(request)
        request_id = f"req-{next(_count)}"
        del request["arrive_at"]
        limit = request.pop("abort_after", None)
        change = request.pop("change_after", None), request.pop("change_to", "")
        if (step := request.pop("change_at_step", None)) is not None:
            self.timed[step] = (request_id, change[1])
        is_watched = limit is not None or change[0] is not None
        kind = RequestOutputKind.CUMULATIVE if is_watched else RequestOutputKind.FINAL_ONLY
        prompt = {"prompt_token_ids": request.pop("prompt")}
        greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(**greedy | request, output_kind=kind)
        try:
            self.engine.add_request(request_id, prompt, params)
        except VLLMValidationError as error:
            refused = {"error": str(error), "parameter": getattr(error, "parameter", None)}
            self.results[index] = refused
            return
        self.index_of[request_id] = index
        if limit is not None:
            self.abort_after[request_id] = limit
        if change[0] is not None:
            self.changes[request_id] = change


def _logprobs(output: Any) -> list[dict[int, float]] | None:
    """Of each token of the first sequence, where they were asked for."""
    logprobs = output.outputs[0].logprobs
    if not logprobs:
        return None
    return [{token: value.logprob for token, value in step.items()} for step in logprobs]


def _tell(result: Any) -> None:
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
