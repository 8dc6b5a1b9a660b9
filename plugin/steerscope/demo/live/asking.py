"""Ask the served model questions the way any client would: the official OpenAI client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from openai import AsyncOpenAI

from steerscope.demo.live.server import MODEL_NAME, DemoServer

CONCURRENCY: Final = 16
MAX_TOKENS: Final = 32

Steering = str | list[dict[str, Any]] | None
"""A policy's name, inline interventions, or nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ``request_id`` is the external id, the key to the request's report."""

    text: str
    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Asker:
    """Greedy questions, many at a time."""

    def __init__(self, server: DemoServer) -> None:
        self._client = AsyncOpenAI(
            base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120.0
        )
        self._slots = asyncio.Semaphore(CONCURRENCY)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def ask(self, question: str, steering: Steering = None) -> Answer:
        """One answer; raises ``openai.APIStatusError`` where the server refuses."""
        async with self._slots:
            reply = await self._client.chat.completions.create(
                model=MODEL_NAME,
                messages=[{"role": "user", "content": question}],
                temperature=0.0,
                max_tokens=MAX_TOKENS,
                logprobs=True,
                extra_body={"return_token_ids": True, **_flag(steering)},
            )
        choice = reply.choices[0]
        chosen = choice.logprobs.content if choice.logprobs else None
        return Answer(
            text=(choice.message.content or "").strip(),
            request_id=reply.id,
            token_ids=tuple(getattr(choice, "token_ids", None) or ()),
            logprobs=tuple(token.logprob for token in chosen or ()),
        )

    async def ask_all(
        self,
        questions: Sequence[str],
        steering: Steering = None,
        progress: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """All answers, in the order of the questions."""

        async def one(question: str) -> Answer:
            answer = await self.ask(question, steering)
            progress()
            return answer

        return list(await asyncio.gather(*(one(question) for question in questions)))


def _flag(steering: Steering) -> dict[str, Any]:
    if steering is None:
        return {}
    flag = steering if isinstance(steering, str) else json.dumps({"interventions": steering})
    return {"vllm_xargs": {"steering": flag}}
