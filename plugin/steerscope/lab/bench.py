"""The bench: the model under study in a real vLLM engine, with a hub in this very process.

Everything the lab measures goes the way it goes in production: admission, taps in the graph,
frames, the hub's ledger. Only the hub is nearer, so that whole activations can be taken from it.

Shapes: N tokens of one request, F features of the catalog in the order of its columns.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from steerscope import config
from steerscope.errors import LabError
from steerscope.hub.server import Hub
from steerscope.lab.cases import Case
from steerscope.steering.interventions import SteeringSpec
from steerscope.telemetry.tracks import RequestTrack

ROUND = 256
"""Cases asked together; their tracks are taken before the next round."""
NUM_LOGPROBS = 20
"""Alternatives that the entropy of a token is worked out from."""
CPU_KV_CACHE_BYTES = 1 << 30
SETTLE_SECONDS = 30.0
HUB_START_SECONDS = 30.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one case led to."""

    case: Case
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: npt.NDArray[np.float64]
    """Of each generated token [G]."""
    first_entropy: float
    """Of the first generated token's distribution, in nats; a lower bound: what lies beyond the
    first ``NUM_LOGPROBS`` alternatives counts as one."""
    track: RequestTrack

    @property
    def mean_logprob(self) -> float:
        """Over the generated tokens, the end of the sequence included."""
        return float(self.logprobs.mean()) if len(self.logprobs) else math.nan


class Bench:
    """One model with one catalog. Use as a context manager.

    ``engine_args`` go to ``vllm.LLM`` as they are.
    """

    def __init__(
        self,
        model: Path,
        catalog: Path,
        *,
        max_tokens: int = 64,
        engine_args: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if config.has_core_in_process():
            raise LabError(
                "VLLM_ENABLE_V1_MULTIPROCESSING=0: the lab needs vLLM's engine core in a process "
                "of its own, which tells of a request's end by itself"
            )
        self.model = model
        self.max_tokens = max_tokens
        self._stack = contextlib.ExitStack()
        settings = _settings(catalog)
        try:
            self._hub = self._stack.enter_context(_HubThread(settings))
            self._llm = _engine(model, settings, engine_args)
            self._stack.callback(self._llm.llm_engine.engine_core.shutdown)
        except BaseException:
            self._stack.close()
            raise
        self.tokenizer = self._llm.get_tokenizer()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(
        self, cases: Sequence[Case], steering: SteeringSpec | str | None = None
    ) -> Iterator[Answer]:
        """Put every case to the model, greedily, in order; a policy's name or a spec steers.

        Raises ``LabError`` when not every token of a case was observed.
        """
        for first in range(0, len(cases), ROUND):
            yield from self._round(cases[first : first + ROUND], steering)

    def render(self, case: Case) -> str:
        """The text that the model reads."""
        if case.prompt is not None:
            return case.prompt
        turns = [{"role": m.role, "content": m.content} for m in case.messages or ()]
        turns = turns or [{"role": "user", "content": case.question or ""}]
        rendered: str = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def tokens(self, case: Case) -> tuple[list[int], list[int]]:
        """The prompt's token ids, and the positions of the entity's (its last mention)."""
        text = self.render(case)
        encoded = self.tokenizer(
            text, add_special_tokens=case.prompt is not None, return_offsets_mapping=True
        )
        ids: list[int] = encoded["input_ids"]
        if not case.entity:
            return ids, []
        begin = text.rindex(case.entity)
        end = begin + len(case.entity)
        spans = encoded["offset_mapping"]
        return ids, [i for i, (a, b) in enumerate(spans) if a < end and b > begin and b > a]

    def _round(
        self, cases: Sequence[Case], steering: SteeringSpec | str | None
    ) -> Iterator[Answer]:
        prompts = [{"prompt_token_ids": self.tokens(case)[0]} for case in cases]
        outputs = self._llm.generate(prompts, _sampling(self.max_tokens, steering), use_tqdm=False)
        tracks = self._hub.tracks([output.request_id for output in outputs])
        for case, output, track in zip(cases, outputs, tracks, strict=True):
            yield self._answer(case, output, track)

    def _answer(self, case: Case, output: Any, track: RequestTrack) -> Answer:
        said = output.outputs[0]
        steps = list(zip(said.token_ids, said.logprobs, strict=True))
        first = [value.logprob for value in steps[0][1].values()] if steps else []
        return Answer(
            case=case,
            prompt_token_ids=tuple(output.prompt_token_ids),
            token_ids=tuple(said.token_ids),
            text=self.tokenizer.decode(said.token_ids, skip_special_tokens=True).strip(),
            logprobs=np.array([step[token].logprob for token, step in steps], np.float64),
            first_entropy=_entropy(first),
            track=track,
        )


class _HubThread:
    """A hub on a loop of its own; its objects are only touched there."""

    def __init__(self, settings: config.Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="steerscope-hub", daemon=True)

    def __enter__(self) -> _HubThread:
        self._folder = tempfile.TemporaryDirectory(prefix="steerscope-")
        self._thread.start()
        self._ready.result(HUB_START_SECONDS)
        config.publish_hub_endpoint(self._folder.name)
        return self

    def __exit__(self, *_: object) -> None:
        config.withdraw_hub_endpoint()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(HUB_START_SECONDS)
        self._folder.cleanup()

    def tracks(self, external_ids: Sequence[str]) -> list[RequestTrack]:
        """The finished tracks of these requests, once all are; none of them lacks a token."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            found = self._call(self._reports(external_ids))
            if all(track is not None and track.finished for track in found):
                break
            if time.monotonic() > deadline:
                raise LabError("the hub did not hear the end of every request")
            time.sleep(0.01)
        tracks = [track for track in found if track is not None]
        for track in tracks:
            if not track.is_complete:
                raise LabError(f"tokens were not observed: {track.unobserved()}")
        return tracks

    async def _reports(self, external_ids: Sequence[str]) -> list[RequestTrack | None]:
        ledger = self._hub.observer.ledger
        return [next(iter(ledger.report(external_id)), None) for external_id in external_ids]

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SETTLE_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        try:
            self._hub = Hub(self._settings, self._folder.name)
            async with self._hub.serving():
                self._ready.set_result(None)
                await self._stopping.wait()
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)


def _settings(catalog: Path) -> config.Settings:
    tree = {
        "catalog": str(catalog),
        "hub": {
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "max_reports": 2 * ROUND,
            "max_tokens_per_report": 1 << 20,
            "max_report_bytes": 1 << 40,
            "max_frame_wait_seconds": 86_400.0,
            "report_ttl_seconds": 3600.0,
        },
        "telemetry": {"max_series_per_engine": 1 << 30},  # nobody scrapes a lab
    }
    return config.from_tree(tree, base=Path.cwd(), where="lab")


def _engine(model: Path, settings: config.Settings, engine_args: Mapping[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    defaults: dict[str, Any] = {"max_num_seqs": 64, "enable_prefix_caching": False, "seed": 0}
    if current_platform.is_cpu():  # where vLLM's own default is nearly all of the memory
        defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    tree = {config.ADDITIONAL_CONFIG_KEY: config.to_tree(settings)}
    return LLM(model=str(model), additional_config=tree, **{**defaults, **engine_args})


def _sampling(max_tokens: int, steering: SteeringSpec | str | None) -> Any:
    import msgspec
    from vllm import SamplingParams

    flag = steering
    if isinstance(steering, SteeringSpec):
        flag = msgspec.json.encode(steering).decode()
    extra_args = None if flag is None else {"steering": flag}
    # Not detokenized there: vLLM fails on alternatives beyond the tokenizer's vocabulary, which a
    # model whose embedding is padded has.
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=NUM_LOGPROBS,
        detokenize=False,
        extra_args=extra_args,
    )


def _entropy(logprobs: Sequence[float]) -> float:
    p = np.exp(np.array(logprobs, np.float64))
    rest = max(1.0 - float(p.sum()), 0.0)
    p = np.append(p, rest)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())
