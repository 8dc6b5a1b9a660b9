"""How many series catalogs of a few sizes make, counted by the exporter's own budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from steerscope.catalog.model import CatalogDocument
from steerscope.catalog.store import Catalog, FeatureVectors, SiteKey
from steerscope.config import Settings, TelemetrySettings
from steerscope.export import budget
from steerscope.export.budget import Budget
from steerscope.steering.interventions import Intervention, Op, Policy

SIZES: Final = (8, 64, 256)
"""Features of the catalogs."""
NUM_SIGNALS: Final = 4
NUM_POLICIES: Final = 50
LIMIT: Final = TelemetrySettings().max_series_per_engine


class Size(NamedTuple):
    """A catalog of so many features, as declared, and the most that can come of it."""

    num_features: int
    declared: Budget
    most: Budget


def sizes() -> Iterator[Size]:
    """A budget for each size."""
    for num_features in SIZES:
        catalog = _catalog(num_features)
        settings = Settings(catalog="", policies=tuple(_policies(catalog)))
        declared, most = budget.declared(catalog, settings), budget.most(catalog, settings)
        yield Size(num_features, declared, most)


def _catalog(num_features: int) -> Catalog:
    """Every feature can be written, and has a baseline of each phase; signals have three bands."""
    document = msgspec.convert(_tree(num_features), CatalogDocument)
    (key,) = {SiteKey(feature.layer, feature.site) for feature in document.features}
    vector = np.ones(1, np.float32)
    vectors = FeatureVectors(W_enc=vector, b_enc=0.0, threshold=0.0, W_dec=vector)
    return Catalog(
        folder=Path(),
        document=document,
        digest="",
        vectors={feature.name: vectors for feature in document.features},
        sites={key: document.features},
        addresses={},
    )


def _tree(num_features: int) -> dict[str, object]:
    names = [f"feature_{i}" for i in range(num_features)]
    kind = {"kind": "sae_latent", "site": "resid_post", "layer": 0, "activation": "relu"}
    bands = [{"label": "low", "below": 0.3}, {"label": "elevated", "below": 0.7}, {"label": "high"}]
    term = {"feature": names[0], "reduce": "max_prompt", "weight": 1.0}
    signal = {"terms": [term], "bias": 0.0, "labels": bands}
    baseline = {"edges": [0.5], "shares": [0.5, 0.5], "num_tokens": 1000}
    return {
        "schema": "",
        "name": "of a size",
        "version": "",
        "model": {
            "architecture": "",
            "hidden_size": 1,
            "num_hidden_layers": 1,
            "vocab_size": 1,
        },
        "features": [{"name": name, **kind} for name in names],
        "signals": [{"name": f"signal_{i}", **signal} for i in range(NUM_SIGNALS)],
        "baselines": [
            {"feature": name, "phase": phase, **baseline}
            for name in names
            for phase in ("prompt", "generation")
        ],
    }


def _policies(catalog: Catalog) -> Iterator[Policy]:
    """Each edits one feature in one way; they share features where there are fewer of them."""
    features = itertools.cycle(feature.name for feature in catalog.document.features)
    ways = itertools.cycle((Op.CLAMP, Op.SCALE))
    for number, feature, op in zip(range(NUM_POLICIES), features, ways, strict=False):
        edit = msgspec.convert({"feature": feature, op.value: 2.0}, Intervention)
        yield Policy(name=f"policy-{number}", interventions=(edit,))
