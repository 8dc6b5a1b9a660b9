"""A vLLM engine in a process of its own, fed rounds of requests over pipes as JSON lines.

Run as a script it is the child; ``EngineProcess`` is the parent's handle.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

START_TIMEOUT_SECONDS = 300

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineProcess:
    """Start an engine on ``model``; with Steerscope where ``config`` is given."""

    def __init__(self, model: Path, config: Path | None, log: Path, **engine_args: Any) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERSCOPE")}
        environment |= ENVIRONMENT
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
        """Submit together; each is {"prompt", "max_tokens", "extra_args"?, ...sampling}."""
        self.process.stdin.write(json.dumps(requests).encode() + b"\n")
        self.process.stdin.flush()
        return self._read()

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

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        seed=0,
        block_size=32,
        **engine_args,
    )
    config = llm.llm_engine.vllm_config
    _tell(
        {
            "compilation_mode": int(config.compilation_config.mode),
            "enforce_eager": config.model_config.enforce_eager,
            "additional_config": config.additional_config,
            "compile_hash": config.compute_hash(),
        }
    )
    for line in sys.stdin:
        _tell(_round(llm, json.loads(line)))


def _round(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Admit what is admissible, run it as one batch, report what was refused."""
    from vllm.exceptions import VLLMClientError

    results: list[dict[str, Any]] = [{} for _ in requests]
    admitted: dict[str, int] = {}
    for index, request in enumerate(requests):
        try:
            request_id = _submit(llm, index, request)
        except VLLMClientError as error:
            results[index] = {"error": str(error), "parameter": getattr(error, "parameter", None)}
        else:
            admitted[request_id] = index
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                results[admitted[output.request_id]] = {
                    "request_id": output.request_id,
                    "tokens": [list(c.token_ids) for c in output.outputs],
                    "cached": output.num_cached_tokens,
                }
    return results


_count = iter(range(1_000_000))


def _submit(llm: Any, index: int, request: dict[str, Any]) -> str:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    request = dict(request)
    request_id = f"req-{next(_count)}"
    prompt = {"prompt_token_ids": request.pop("prompt")}
    greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    params = SamplingParams(**greedy | request, output_kind=RequestOutputKind.FINAL_ONLY)
    llm.llm_engine.add_request(request_id, prompt, params)
    return request_id


def _tell(result: Any) -> None:
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
