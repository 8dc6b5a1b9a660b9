"""Per-token feature strips for the terminal: each token on a background of one feature's value."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import Final

from rich.markup import escape

from steerscope.api.v1.telemetry_pb2 import Completion
from steerscope.demo.live.asking import Answer
from steerscope.demo.live.server import MODEL_NAME, DemoServer

FEATURES: Final = ("unknown_entity", "known_entity")

SCALE: Final = ("default", "#f7e0c3", "#f1b97c", "#e08a3c", "#b35806")
"""From inactive to the strongest in the strip; one hue, readable without colour vision."""


def legend() -> str:
    """The scale, as markup."""
    return "".join(_cell(" weak " if i == 1 else " strong ", i) for i in (1, len(SCALE) - 1))


def tokens(server: DemoServer, question: str, answer: Answer) -> list[str]:
    """The request's tokens as text: the prompt as the server renders it, then the answer."""
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": question}],
        "return_token_strs": True,
    }
    prompt = _post(server, "/tokenize", body)["token_strs"]
    said = [
        str(_post(server, "/detokenize", {"model": MODEL_NAME, "tokens": [token]})["prompt"])
        for token in answer.token_ids
    ]
    return [_clean(token) for token in [*prompt, *said]]  # type: ignore[misc]


def lines(tokens: Sequence[str], completion: Completion) -> list[str]:
    """One line of markup per shown feature."""
    found = {track.feature: track for track in completion.features}
    made = []
    for name in FEATURES:
        track = found[name]
        top = max(track.activations, default=0.0)
        cells = [
            _cell(f" {token} ", _level(value, top))
            for token, value in zip(tokens[track.first_position :], track.activations, strict=False)
        ]
        peak = _peak(tokens[track.first_position :], track.activations)
        made.append(f"{name:>15} {peak} " + "".join(cells))
    return made


def _peak(tokens: Sequence[str], activations: Sequence[float]) -> str:
    """Where it is strongest, in words: colours may not be shown."""
    at = max(range(len(activations)), key=activations.__getitem__)
    if activations[at] <= 0.0:
        return f"{'silent':<22}"
    return escape(f"{activations[at]:5.1f} at {tokens[at]!r}"[:22].ljust(22))


def _level(value: float, top: float) -> int:
    if value <= 0.0 or top <= 0.0:
        return 0
    return 1 + min(int(value / top * (len(SCALE) - 1)), len(SCALE) - 2)


def _cell(text: str, level: int) -> str:
    if level == 0:
        return escape(text)
    ink = "black" if level < len(SCALE) - 1 else "white"
    return f"[{ink} on {SCALE[level]}]{escape(text)}[/]"


def _clean(token: str) -> str:
    return token.replace("▁", " ").strip() or "·"


def _post(server: DemoServer, path: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(
        server.base_url + path,
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        answer: dict[str, object] = json.load(response)
    return answer
