"""The hub that the scrape is measured on: 256 features, 4 engines, 50 policies."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import hub_world
import msgspec
import numpy as np
from hub_world import D_MODEL
from safetensors.numpy import save_file
from steerscope.catalog.store import Catalog
from steerscope.export.instruments import bounds_for
from steerscope.export.prometheus import signal_labels
from steerscope.steering.interventions import Intervention, Op, Policy
from steerscope.telemetry.columns import BoolArray, Columns
from steerscope.telemetry.frames import (
    FRAME_VERSION,
    Frame,
    RequestEnd,
    RequestStart,
    SiteActivations,
)
from steerscope.telemetry.totals import EngineTotals, FrameLoss
from steerscope.telemetry.tracks import EngineKey, Unobserved
from steerscope.telemetry.windows import DriftWindow

NUM_FEATURES = 256
ENGINES = ("0", "1", "2", "3")
NUM_POLICIES = 50
LAYERS = (1, 2)
PER_SITE = NUM_FEATURES // len(LAYERS)
FEATURES = tuple(f"feature_{i}" for i in range(NUM_FEATURES))
NUM_TOKENS = 1200
"""Of each phase in a long request: enough for drift to be known."""


def write_catalog(folder: Path) -> Path:
    """Every feature can be edited, has a baseline of each phase, and has a name like any."""
    folder.mkdir(parents=True)
    tensors = {}
    for name in FEATURES:
        tensors[f"{name}.W_enc"] = tensors[f"{name}.W_dec"] = np.ones(D_MODEL, np.float32)
        tensors[f"{name}.b_enc"] = np.zeros(1, np.float32)
    save_file(tensors, folder / "features.safetensors")
    (folder / "catalog.yaml").write_text(json.dumps(_document()))
    return folder


def _document() -> dict[str, object]:
    feature = {"kind": "direction", "site": "resid_post", "activation": "relu"}
    bins = {"edges": [0.25 * i for i in range(1, 10)], "shares": [0.1] * 10, "num_tokens": 5000}
    labels = [{"label": "low", "below": 0.35}, {"label": "high"}]
    return {
        "schema": "steerscope.catalog/v1",
        "name": "wide",
        "version": "1",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": D_MODEL,
            "num_hidden_layers": 4,
            "vocab_size": 8,
        },
        "features": [
            {"name": name, "layer": LAYERS[i // PER_SITE], **feature}
            for i, name in enumerate(FEATURES)
        ],
        "signals": [
            {
                "name": f"signal_{i}",
                "terms": [{"feature": FEATURES[i], "reduce": "max_generation", "weight": 1.0}],
                "bias": -2.0,
                "labels": labels,
            }
            for i in range(4)
        ],
        "baselines": [
            {"feature": name, "phase": phase, **bins}
            for name in FEATURES
            for phase in ("prompt", "generation")
        ],
    }


def policies() -> tuple[Policy, ...]:
    """Each edits a feature of its own; every operation occurs."""
    return tuple(
        Policy(name=f"policy-{i}", interventions=(_edit(FEATURES[i], op),))
        for i, op in zip(range(NUM_POLICIES), itertools.cycle(Op), strict=False)
    )


def _edit(feature: str, op: Op) -> Intervention:
    value = True if op is Op.ABLATE else 2.0
    return msgspec.convert({"feature": feature, op.value: value}, Intervention)


def traffic(catalog: Catalog, engine: str, num_requests: int) -> Iterator[Frame]:
    """Long requests, and a short one under each policy; all of them end."""
    chance = np.random.default_rng(int(engine))
    for number in range(num_requests):
        name = f"{engine}-{number}"
        told = hub_world.start(name, NUM_TOKENS)
        acts_TF = np.maximum(chance.normal(1.0, 2.0, (2 * NUM_TOKENS, NUM_FEATURES)), 0.0)
        yield _frame(catalog, engine, [told], [2 * NUM_TOKENS], acts_TF)
        yield _ended(catalog, engine, [name], 2 * NUM_TOKENS)
    steered = [
        hub_world.start(f"{engine}-{p.name}", 2, policy=p.name, interventions=p.interventions)
        for p in policies()
    ]
    rows_TF = np.repeat(np.eye(NUM_FEATURES)[:NUM_POLICIES], 4, axis=0)
    yield _frame(catalog, engine, steered, [4] * NUM_POLICIES, rows_TF, edits_TF=rows_TF)
    yield _ended(catalog, engine, [s.request_id for s in steered], 4)


def _frame(
    catalog: Catalog,
    engine: str,
    started: list[RequestStart],
    lengths: list[int],
    acts_TF: np.ndarray,
    edits_TF: np.ndarray | None = None,
) -> Frame:
    """A frame of whole requests; each token with any edit has dose 0.5."""
    acts, edits = acts_TF.astype(np.float32), edits_TF
    sites = []
    for i, layer in enumerate(LAYERS):
        columns = slice(i * PER_SITE, (i + 1) * PER_SITE)
        rows = np.zeros(0, np.int32)
        if edits is not None:
            rows = np.flatnonzero(edits[:, columns].any(axis=1)).astype(np.int32)
        deltas = (acts if edits is None else edits)[rows, columns].astype(np.float32)
        sites.append(
            SiteActivations(
                f"resid_post.{layer}",
                PER_SITE,
                np.ascontiguousarray(acts[:, columns]).tobytes(),
                rows.tobytes(),
                np.ascontiguousarray(deltas).tobytes(),
                np.full(len(rows), 0.5, np.float32).tobytes(),
            )
        )
    return msgspec.structs.replace(
        _empty(catalog, engine),
        started=tuple(started),
        request_ids=tuple(told.request_id for told in started),
        query_start_loc=(0, *np.cumsum(lengths, dtype=int).tolist()),
        positions=(0,) * len(started),
        sites=tuple(sites),
    )


def _ended(catalog: Catalog, engine: str, names: list[str], end: int) -> Frame:
    ends = tuple(RequestEnd(name, end) for name in names)
    return msgspec.structs.replace(_empty(catalog, engine), finished=ends)


def _empty(catalog: Catalog, engine: str) -> Frame:
    return Frame(
        version=FRAME_VERSION,
        catalog_digest=catalog.digest,
        model_name="demo",
        engine=engine,
        rank=0,
        step=0,
        monotonic_ns=time.monotonic_ns(),
        overhead_ns=(50_000,),
        dropped=0,
        dropped_tokens=0,
        started=(),
        finished=(),
        changed=(),
        request_ids=(),
        query_start_loc=(0,),
        positions=(),
        sites=(),
    )


class Filled:
    """Engines that counted for months, made directly: every series is there, with long numbers.

    ``edited`` are the features and operations that changed tokens.
    """

    def __init__(self, catalog: Catalog, names: tuple[EngineKey, ...], edited: BoolArray) -> None:
        self.engines = {key: self._engine(catalog, edited) for key in names}

    def _engine(self, catalog: Catalog, edited: BoolArray) -> EngineTotals:
        columns, chance = Columns(catalog), np.random.default_rng(7)
        drift = DriftWindow(catalog.document.baselines, columns, 1e5)
        totals = EngineTotals(columns, catalog.signals, bounds_for(catalog), drift)
        for histogram in (
            totals.activation,
            totals.score,
            totals.dose,
            totals.lag,
            totals.overhead,
        ):
            histogram.counts[:] = chance.integers(10**8, 10**9, histogram.counts.shape)
            histogram.sums[:] = chance.uniform(1e8, 1e9, histogram.sums.shape)
        for counts in (totals.active, totals.observed):
            counts[:] = chance.integers(10**9, 10**10, counts.shape)
        totals.steered[edited] = 10**9
        totals.cached = totals.frames = 10**9
        totals.last_seen_ns = time.monotonic_ns() - 10**9
        totals.unobserved.update(dict.fromkeys(Unobserved, 10**6))
        totals.frames_lost.update(dict.fromkeys(FrameLoss, 10**6))
        for signal in catalog.signals:
            totals.labels.update({(signal.name, name): 10**9 for name in signal_labels(signal)})
        everything = slice(0, len(columns.features))
        for phase in range(2):
            acts_nF = chance.normal(1.0, 2.0, (NUM_TOKENS, everything.stop)).astype(np.float32)
            drift.add(phase, everything, acts_nF, time.monotonic())
        return totals
