"""The canary: known questions on a timer, which prove the chain from feature to signal.

A request is known for the canary's by an id that nobody can guess and only this hub knows, so
that no client can keep its own traffic out of the metrics.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import httpx

from steerscope import config
from steerscope.config import CanaryCheck, CanarySettings
from steerscope.errors import ConfigError
from steerscope.hub.watches.waiters import Waiters
from steerscope.telemetry.totals import CanaryOutcome, CanaryTotals
from steerscope.telemetry.tracks import RequestTrack, Score

ID_PREFIXES: Final = {"chat": "chatcmpl-{}", "completions": "cmpl-{}-0"}
"""How vLLM makes the request's id of the client's."""
MAX_ASKED: Final = 256
"""So many ids are remembered: a server may be late with what it no longer needs to answer."""
READY_SECONDS: Final = 1.0
"""Between two looks whether the server is there yet."""

_log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request


class Verdict(NamedTuple):
    """What came of one run, and why unless it passed."""

    outcome: CanaryOutcome
    why: str = ""


class Canary:
    """Runs every check of the settings, one after the other. On the hub's loop.

    Args:
        settings: what to ask, where, and what to expect.
        report: the sequences known under a client's id.
        waiters: whoever waits for the end of one.
        totals: by check; filled in here.
    """

    def __init__(
        self,
        settings: CanarySettings,
        report: Callable[[str], Iterable[RequestTrack]],
        waiters: Waiters,
        totals: dict[str, CanaryTotals],
    ) -> None:
        self._settings = settings
        self._headers = _headers(settings)
        self._verify = _trust(settings)
        self._report = report
        self._waiters = waiters
        self._totals = totals
        self._totals.update({name: CanaryTotals() for name in settings.checks})
        self._prompts = {
            name: itertools.cycle(check.prompts) for name, check in settings.checks.items()
        }
        self._latest: dict[str, Verdict] = {}
        self._asked: deque[str] = deque(maxlen=MAX_ASKED)

    def is_ours(self, external_id: str) -> bool:
        """Whether the request, by the client's id, is one that was asked lately."""
        return external_id in self._asked

    async def run(self) -> None:
        """Ask until cancelled, from when the server answers for the first time."""
        settings = self._settings
        async with httpx.AsyncClient(
            base_url=settings.base_url,
            headers=self._headers,
            verify=self._verify,
            timeout=settings.timeout_seconds,
            trust_env=False,
        ) as client:
            while not await _is_up(client):
                await asyncio.sleep(READY_SECONDS)
            while True:
                began = time.monotonic()
                for name, check in settings.checks.items():
                    self._note(name, await self._ask(client, name, check))
                spent = time.monotonic() - began
                await asyncio.sleep(max(settings.interval_seconds - spent, READY_SECONDS))

    async def _ask(self, client: httpx.AsyncClient, name: str, check: CanaryCheck) -> Verdict:
        own_id = f"steerscope-canary-{secrets.token_hex(16)}"
        self._asked.append(ID_PREFIXES[self._settings.api].format(own_id))
        path, body = self._question(check, next(self._prompts[name]))
        try:
            answer = await client.post(path, json=body, headers={"x-request-id": own_id})
            if answer.status_code != httpx.codes.OK:
                told = answer.text[:200]
                return Verdict(CanaryOutcome.FAILED, f"HTTP {answer.status_code}: {told}")
        except httpx.HTTPError as error:
            return Verdict(CanaryOutcome.FAILED, str(error) or type(error).__name__)
        return await self._judge(name, check, self._asked[-1])

    def _question(self, check: CanaryCheck, prompt: str) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"max_tokens": check.max_tokens, "temperature": 0}
        if self._settings.model:
            body["model"] = self._settings.model
        if self._settings.api == "completions":
            return "/v1/completions", {**body, "prompt": prompt}
        messages = [{"role": "user", "content": prompt}]
        return "/v1/chat/completions", {**body, "messages": messages}

    async def _judge(self, name: str, check: CanaryCheck, external_id: str) -> Verdict:
        def ended() -> list[RequestTrack]:
            return [track for track in self._report(external_id) if track.finished]

        seconds = self._settings.timeout_seconds
        await self._waiters.until(external_id, lambda: bool(ended()), seconds)
        if not ended():
            return Verdict(CanaryOutcome.UNREPORTED, "no end of it was seen")
        (track,) = ended()
        scores = {score.signal: score for score in track.scores}
        told = {signal: s.score for signal, s in scores.items() if s.score is not None}
        self._totals[name].scores.update(told)
        return _verdict(check, scores)

    def _note(self, name: str, verdict: Verdict) -> None:
        totals = self._totals[name]
        totals.runs[verdict.outcome] += 1
        if verdict.outcome is CanaryOutcome.PASSED:
            totals.last_success = time.time()
        before = self._latest.get(name)
        if before is None or before.outcome is not verdict.outcome:
            level = logging.INFO if verdict.outcome is CanaryOutcome.PASSED else logging.WARNING
            _log.log(level, "canary %r %s %s", name, verdict.outcome, verdict.why)
        self._latest[name] = verdict


def _verdict(check: CanaryCheck, scores: dict[str, Score]) -> Verdict:
    for signal in check.expect:
        if signal not in scores or scores[signal].score is None:
            return Verdict(CanaryOutcome.UNSCORED, f"{signal} has no score")
    for signal, label in check.expect.items():
        if scores[signal].label != label:
            found = scores[signal]
            why = f"{signal} is {found.label} ({found.score:.3f}), expected is {label}"
            return Verdict(CanaryOutcome.UNEXPECTED, why)
    return Verdict(CanaryOutcome.PASSED)


async def _is_up(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _headers(settings: CanarySettings) -> dict[str, str]:
    key = config.canary_key(settings)
    if key is None:
        return {}
    try:
        return {"authorization": f"Bearer {key.encode('ascii').decode()}"}
    except UnicodeEncodeError:
        raise ConfigError(f"canary.api_key_env: {settings.api_key_env} is not ASCII") from None


def _trust(settings: CanarySettings) -> ssl.SSLContext | bool:
    if settings.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"canary.ca_file: {settings.ca_file}: {error}") from None
