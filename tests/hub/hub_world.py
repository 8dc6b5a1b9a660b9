"""A small catalog, frames for it, and ways to look at a running hub."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import msgspec
import numpy as np
import yaml
import zmq
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file
from steerscope.catalog.store import Catalog
from steerscope.hub.protocol import frames_address
from steerscope.steering.interventions import Intervention, canonical_json
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.frames import (
    FRAME_VERSION,
    Frame,
    RequestEnd,
    RequestStart,
    SiteActivations,
    encode,
)
from steerscope.telemetry.requests import Limits, RequestLedger
from steerscope.telemetry.tracks import RequestTrack

D_MODEL = 4
ENGINE = {"model_name": "demo", "engine": "0"}
ABOUT_ENTITY = {
    "name": "about_entity",
    "terms": [
        {
            "feature": "known",
            "reduce": "max_entity_span",
            "weight": 2.0,
            "span": {"feature": "unknown", "above": 1.5},
        },
        {"feature": "late", "reduce": "mean_first_generated", "weight": -0.5, "first": 3},
    ],
    "bias": -2.0,
    "labels": [{"label": "low", "below": 0.35}, {"label": "high"}],
    "predicts": {"label": "wrong", "among": "answered"},
    "calibration": {
        "map": {"method": "platt", "scale": 0.5, "offset": 0.25},
        "num_cases": 400,
        "split": "dev, sha256:ab12",
        "thresholds": [{"score": 0.8, "max_fpr": 0.05, "num_negatives": 150}],
    },
}
"""A signal with all that a signal can have; ``unknown`` marks the entity."""
SITES = {"resid_post.1": ("known", "unknown"), "resid_post.2": ("late",)}


def write_catalog(folder: Path) -> Path:
    """Two relu features at layer 1, a read-only one at layer 2, four signals, one policy."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in ("known", "unknown", "late"):
        tensors[f"{name}.W_enc"] = np.ones(D_MODEL, np.float32)
        tensors[f"{name}.b_enc"] = np.zeros(1, np.float32)
        if name != "late":
            tensors[f"{name}.W_dec"] = np.ones(D_MODEL, np.float32)
    save_file(tensors, folder / "features.safetensors")
    (folder / "catalog.yaml").write_text(yaml.safe_dump(_document(), sort_keys=False))
    return folder


def _document() -> dict:
    feature = {"kind": "direction", "site": "resid_post", "activation": "relu"}
    labels = [{"label": "low", "below": 0.35}, {"label": "high"}]
    return {
        "schema": "steerscope.catalog/v1",
        "name": "small",
        "version": "1",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": D_MODEL,
            "num_hidden_layers": 4,
            "vocab_size": 8,
        },
        "features": [
            {"name": "known", "layer": 1, "label": "Known entity", **feature},
            {"name": "unknown", "layer": 1, **feature},
            {"name": "late", "layer": 2, **feature},
        ],
        "signals": [
            {
                "name": name,
                "terms": [{"feature": feature_name, "reduce": reduce, "weight": 1.0}],
                "bias": -2.0,
                "labels": labels,
            }
            for name, feature_name, reduce in (
                ("at_question", "known", "last_prompt_token"),
                ("whole_prompt", "unknown", "mean_prompt"),
                ("in_answer", "known", "max_generation"),
            )
        ]
        + [ABOUT_ENTITY],
        "policies": [
            {"name": "force-known", "interventions": [{"feature": "known", "clamp": 6.0}]}
        ],
    }


def start(
    request_id: str,
    num_prompt_tokens: int,
    *,
    first_position: int = 0,
    external_id: str | None = None,
    policy: str = "",
    interventions: tuple[Intervention, ...] = (),
) -> RequestStart:
    return RequestStart(
        request_id,
        external_id or request_id,
        num_prompt_tokens,
        first_position,
        policy,
        "d1" if policy else "",
        canonical_json(interventions) if interventions else b"",
    )


def frame(
    catalog: Catalog,
    *shares: tuple[str, int, int],
    acts: object = 1.0,
    started: tuple[RequestStart, ...] = (),
    finished: tuple[str, ...] = (),
    edited: dict[int, float] | None = None,
    **fields: object,
) -> Frame:
    """A frame of ``(request, position, tokens)`` shares; ``acts`` fills [T, F] of all sites.

    ``edited`` maps rows to the change of ``known`` there; each has dose 0.5.
    """
    lengths = [length for _, _, length in shares]
    num_tokens = sum(lengths)
    values = np.broadcast_to(np.asarray(acts, np.float32), (num_tokens, 3))
    rows = np.array(sorted(edited or {}), np.int32)
    deltas = np.array([[(edited or {})[r], 0.0] for r in rows.tolist()], np.float32)
    doses = np.full(len(rows), 0.5, np.float32)
    first = SiteActivations(
        "resid_post.1",
        2,
        values[:, :2].tobytes(),
        rows.tobytes(),
        deltas.tobytes(),
        doses.tobytes(),
    )
    second = SiteActivations("resid_post.2", 1, values[:, 2:].tobytes())
    made = Frame(
        version=FRAME_VERSION,
        catalog_digest=catalog.digest,
        model_name="demo",
        engine="0",
        rank=0,
        step=0,
        monotonic_ns=time.monotonic_ns(),
        overhead_ns=(50_000,),
        dropped=0,
        dropped_tokens=0,
        started=started,
        finished=tuple(RequestEnd(name, 0) for name in finished),
        changed=(),
        request_ids=tuple(name for name, _, _ in shares),
        query_start_loc=(0, *np.cumsum(lengths, dtype=int).tolist()),
        positions=tuple(position for _, position, _ in shares),
        sites=(first, second) if num_tokens else (),
    )
    return msgspec.structs.replace(made, **fields)


def observed(
    catalog: Catalog,
    acts: object,
    num_prompt_tokens: int,
    *,
    limit: int = 4096,
    tail_lost: bool = False,
) -> RequestTrack:
    """A running sequence whose first tokens had these activations [T, F]."""
    ledger = RequestLedger(Columns(catalog), Limits(10, 60.0, limit), lambda track: ())
    share, started = ("a", 0, len(acts)), (start("a", num_prompt_tokens),)
    ledger.feed(frame(catalog, share, acts=acts, started=started), 1.0)
    (track,) = ledger.report("a")
    track.tail_lost = tail_lost
    return track


class Worker:
    """A worker's end of the frames socket."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDTIMEO, 5000)
        self._socket.connect(frames_address(endpoint))

    def send(self, payload: Frame | bytes) -> None:
        self._socket.send(payload if isinstance(payload, bytes) else encode(payload))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """A sample's value; None when there is no such series."""
        return self._samples.get((name, frozenset(labels.items())))


def scrape(http_port: int, accept: str = "") -> Metrics:
    headers = {"accept": accept} if accept else {}
    reply = httpx.get(f"http://127.0.0.1:{http_port}/metrics", headers=headers, timeout=5)
    reply.raise_for_status()
    return Metrics(reply.text)


def eventually(condition, seconds: float = 5.0):
    """The first true value of ``condition()``; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value
