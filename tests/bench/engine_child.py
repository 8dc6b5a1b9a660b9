"""One engine under test, on one core, that steps when it is told to.

    python engine_child.py '{"model": ..., "config": ... or null, "core": 1, "hub_core": 0, ...}'

Commands come as JSON lines on stdin; each answer is one line on stdout that begins ``RESULT ``.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any

_numbers = itertools.count()


class Engine:
    """An engine core in this very process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        began = time.perf_counter()
        self.engine = LLM(
            model=arguments["model"], skip_tokenizer_init=True, seed=0, **arguments["engine_args"]
        ).llm_engine
        self.started_seconds = time.perf_counter() - began
        self.vocab_size = self.engine.vllm_config.model_config.get_vocab_size()

    def fill(self, prompts: list[list[int]], steering: list[str], max_tokens: int) -> int:
        """Submit the requests and step until each of them generates; the number of steps."""
        for i, prompt in enumerate(prompts):
            self._submit(prompt, steering[i % len(steering)] if steering else "", max_tokens)
        scheduler = self.engine.engine_core.engine_core.scheduler
        for count in itertools.count():
            running = scheduler.running
            if len(running) == len(prompts) and all(r.num_output_tokens for r in running):
                return count
            self.engine.step()
        raise AssertionError("count has no end")

    def steps(self, count: int) -> list[int]:
        """So many steps; nanoseconds each."""
        taken = []
        for _ in range(count):
            began = time.perf_counter_ns()
            self.engine.step()
            taken.append(time.perf_counter_ns() - began)
        return taken

    def drain(self) -> None:
        """Abort what runs, and let the end be told."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        self.engine.abort_request([r.request_id for r in scheduler.running], internal=True)
        for _ in range(3):
            self.engine.step()

    def prefill(self, prompt: list[int], steering: str) -> int:
        """Nanoseconds until the first token of a request that is alone."""
        began = time.perf_counter_ns()
        self._submit(prompt, steering, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter_ns() - began

    def _submit(self, prompt: list[int], steering: str, max_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            max_tokens=max_tokens,
            extra_args={"steering": steering} if steering else None,
        )
        self.engine.add_request(f"r-{next(_numbers)}", {"prompt_token_ids": prompt}, params)


def resident() -> dict[str, int]:
    """Proportional memory in bytes: ours, and our children's, which is the hub."""
    import psutil

    me = psutil.Process()
    children = me.children(recursive=True)
    return {
        "engine": me.memory_full_info().pss,
        "hub": sum(c.memory_full_info().pss for c in children),
    }


def main() -> None:
    """Serve commands until stdin ends."""
    arguments = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {arguments["core"]})
    engine = Engine(arguments)
    _place_children(arguments["hub_core"])
    _tell({"started_seconds": engine.started_seconds, "vocab_size": engine.vocab_size})
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        name = command.pop("do")
        _tell(resident() if name == "resident" else getattr(engine, name)(**command))


def _place_children(core: int) -> None:
    """The hub is another process: it must not wait for the engine's core."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        for thread in child.threads():
            os.sched_setaffinity(thread.id, {core})


def _tell(answer: Any) -> None:
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
