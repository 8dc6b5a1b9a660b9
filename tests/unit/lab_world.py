"""Small worlds for the lab's tests: captured streams, catalogs on disk, and edits through the tap.

Shapes: N cases, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from steerscope.catalog import authoring
from steerscope.catalog.model import (
    SCHEMA,
    Activation,
    CatalogDocument,
    Feature,
    FeatureKind,
    Fingerprint,
    Site,
)
from steerscope.catalog.store import Catalog, FeatureVectors, SiteKey
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.lab.candidates import Sides
from steerscope.lab.cases import Case
from steerscope.lab.harvest import Harvested
from steerscope.lab.judging import Outcome
from steerscope.steering.interventions import SteeringSpec

WIDTH = 8
KEY = SiteKey(1, Site.RESID_POST)
CPU = torch.device("cpu")


def harvested(
    stream_D: Sequence[float],
    name: str = "Ada Lovelace",
    outcome: Outcome = Outcome.CORRECT,
    before: Sequence[Sequence[float]] = (),
    last_D: Sequence[float] | None = None,
) -> Harvested:
    """A case whose entity's last token has this stream, and its earlier ones those ``before``."""
    span_nD = np.array([*before, stream_D], np.float32)
    last_1D = span_nD[-1:] if last_D is None else np.array([last_D], np.float32)
    return Harvested(
        Case(question=f"Who is {name}?", entity=name), "", outcome, {KEY: span_nD}, {KEY: last_1D}
    )


def sides(positive_ND: np.ndarray, negative_ND: np.ndarray) -> Sides:
    """One case for each stream, each about another name."""
    return Sides(
        [harvested(x_D, f"Positive {i}") for i, x_D in enumerate(positive_ND)],
        [harvested(x_D, f"Negative {i}") for i, x_D in enumerate(negative_ND)],
    )


def feature(name: str, activation: Activation = Activation.RELU, **more: object) -> Feature:
    told = {"kind": FeatureKind.SAE_LATENT, "site": KEY.site, "layer": KEY.layer} | more
    return Feature(name=name, activation=activation, **told)


def vectors(
    W_enc: Sequence[float], W_dec: Sequence[float] | None, b_enc: float = 0.0, threshold: float = 0
) -> FeatureVectors:
    written = None if W_dec is None else np.array(W_dec, np.float32)
    return FeatureVectors(np.array(W_enc, np.float32), b_enc, float(threshold), written)


def document(features: Sequence[Feature], width: int = WIDTH, **more: object) -> CatalogDocument:
    model = Fingerprint(
        architecture="LlamaForCausalLM", hidden_size=width, num_hidden_layers=4, vocab_size=16
    )
    return CatalogDocument(
        schema=SCHEMA, name="small", version="1", model=model, features=tuple(features), **more
    )


def write(
    folder: Path,
    features: Sequence[Feature],
    made: dict[str, FeatureVectors],
    width: int = WIDTH,
    **more: object,
) -> Catalog:
    """The catalog as written and read back, with all of the store's checks."""
    return authoring.write_catalog(folder, document(features, width, **more), made)


def steered(catalog: Catalog, spec: SteeringSpec, x_TD: np.ndarray) -> np.ndarray:
    """The stream [T, D] after the edit, through the tap that serves."""
    catalog.check(spec)
    step = StepRows(len(x_TD), CPU)
    tap = SiteTap(catalog, KEY, step, 2, CPU)
    tap.write_row(1, list(spec.interventions), spec.max_dose)
    step.stage(np.ones(len(x_TD), np.int64))
    edited_TD = torch.tensor(np.asarray(x_TD, np.float32))
    tap(edited_TD, None)
    return edited_TD.numpy()
