"""One engine under test, on one core, that works when it is told to.

    python engine_child.py '{"model": ..., "core": 1, "hub_core": 0, "start_core": 0, ...}'

Commands come as JSON lines on stdin; each answer is one line on stdout that begins ``RESULT ``.
All engines that get the same commands do the same work: prompts and lengths depend on nothing
else.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128


class Engine:
    """An engine core in this very process.

    ``steering`` names policies that requests take in turn: ``all`` steer the whole request,
    ``generation`` what is generated, and so leave shared prefixes shared.
    """

    def __init__(self, model: str, engine_args: dict[str, Any], steering: dict[str, Any]) -> None:
        from vllm import LLM

        began = time.perf_counter()
        self.engine = LLM(model=model, skip_tokenizer_init=True, seed=0, **engine_args).llm_engine
        self.started_seconds = time.perf_counter() - began
        self._vocab_size = self.engine.vllm_config.model_config.get_vocab_size()
        self._steering = steering
        self._num_prompts, self._num_requests = itertools.count(1), itertools.count()
        self._num_ended = 0

    def fill(self, concurrency: int) -> None:
        """Submit so many requests, which end one after the other, and step until all generate."""
        for i in range(concurrency):
            self._submit(self._prompt(PROMPT_TOKENS), 1 + (i + 1) * OUTPUT_TOKENS // concurrency)
        self.engine.step()
        self._num_ended = 0

    def submit(self, concurrency: int, max_tokens: int) -> None:
        """Submit so many requests that end together."""
        for _ in range(concurrency):
            self._submit(self._prompt(PROMPT_TOKENS), max_tokens)

    def steps(self, count: int, lead_in: bool) -> dict[str, list[Any]]:
        """So many steps: nanoseconds each, on the clock and of the processor (all our threads),
        and whether requests waited it out between tokens.

        For each request that ended another one comes, within the time of the next step. The
        first step after other engines worked finds cold caches: with ``lead_in`` it is not told.
        """
        taken, used, are_gaps = [], [], []
        for _ in range(count + lead_in):
            prompts = [self._prompt(PROMPT_TOKENS) for _ in range(self._num_ended)]
            began, used_before = time.perf_counter_ns(), time.process_time_ns()
            for prompt in prompts:
                self._submit(prompt, OUTPUT_TOKENS)
            outputs = self.engine.step()
            taken.append(time.perf_counter_ns() - began)
            used.append(time.process_time_ns() - used_before)
            are_gaps.append(any(len(o.outputs[0].token_ids) > 1 for o in outputs))
            self._num_ended = sum(o.finished for o in outputs)
        return {"ns": taken[lead_in:], "used": used[lead_in:], "are_gaps": are_gaps[lead_in:]}

    def drain(self) -> None:
        """Abort what runs, and let the end be told."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        self.engine.abort_request([r.request_id for r in scheduler.running], internal=True)
        for _ in range(3):
            self.engine.step()

    def first_tokens(
        self, count: int, lead_in: bool, length: int, num_shared: int
    ) -> dict[str, list[int]]:
        """So many requests, each alone: nanoseconds until the first token, tokens not computed.

        Prompts begin with the same ``num_shared`` tokens.
        """
        taken, cached = [], []
        for _ in range(count + lead_in):
            shared = self._tokens(0, num_shared)
            prompt = shared + self._prompt(length - num_shared)
            began = time.perf_counter_ns()
            self._submit(prompt, 1, "generation" if num_shared else "all")
            (output,) = self.engine.step()
            taken.append(time.perf_counter_ns() - began)
            cached.append(output.num_cached_tokens)
        return {"ns": taken[lead_in:], "cached": cached[lead_in:]}

    def _prompt(self, length: int) -> list[int]:
        """Unlike any before, so that no prefix is shared by chance."""
        return self._tokens(next(self._num_prompts), length)

    def _tokens(self, seed: int, length: int) -> list[int]:
        tokens: list[int] = (
            np.random.default_rng(seed).integers(2, self._vocab_size, length).tolist()
        )
        return tokens

    def _submit(self, prompt: Sequence[int], max_tokens: int, phase: str = "all") -> None:
        from vllm import SamplingParams

        number = next(self._num_requests)
        names = self._steering[phase]
        params = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            max_tokens=max_tokens,
            extra_args={"steering": names[number % len(names)]} if names else None,
        )
        self.engine.add_request(f"r-{number}", {"prompt_token_ids": prompt}, params)

    def resident(self) -> dict[str, int]:
        """Proportional memory in bytes: ours, and the hub's."""
        import psutil

        me = psutil.Process()
        hubs = [c for c in me.children(recursive=True) if "steerscope.hub" in c.cmdline()]
        return {
            "engine": me.memory_full_info().pss,
            "hub": sum(hub.memory_full_info().pss for hub in hubs),
        }


def main() -> None:
    """Serve commands until stdin ends."""
    arguments = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {arguments["start_core"]})
    engine = Engine(arguments["model"], arguments["engine_args"], arguments["steering"])
    place(os.getpid(), arguments["core"], arguments["hub_core"])
    _tell({"started_seconds": engine.started_seconds})
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        _tell(getattr(engine, command.pop("do"))(**command))


def place(pid: int, core: int, hub_core: int) -> None:
    """The threads that compute to one core, the hub to another.

    Threads that only carry messages (ZeroMQ's, front ends') go where there is room, as they do
    where nobody places them: on the one core they would push the model out each time.
    """
    import psutil

    top = psutil.Process(pid)
    for process in (top, *top.children(recursive=True)):
        is_hub = "steerscope.hub" in process.cmdline()
        for thread in process.threads():
            own = {core} if thread.id == process.pid else {core, hub_core}
            os.sched_setaffinity(thread.id, {hub_core} if is_hub else own)


def _tell(answer: Any) -> None:
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
