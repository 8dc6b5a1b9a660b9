"""Capturing the residual stream, through the very taps that serve.

A site is captured by a catalog whose features are the D unit vectors: each reads one coordinate,
exactly (a product with the identity adds only zeros), so that what production proves of activations
(attribution, coverage, every runner) holds for captured streams too, and no second path exists.

Shapes: N tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from steerscope.catalog import authoring
from steerscope.catalog.model import (
    SCHEMA,
    Activation,
    CatalogDocument,
    Feature,
    FeatureKind,
    Fingerprint,
    LayerIndex,
    Site,
)
from steerscope.catalog.store import FeatureVectors, SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.telemetry.tracks import RequestTrack


def write_capture_catalog(folder: Path, model: Fingerprint, keys: Sequence[SiteKey]) -> None:
    """A catalog that reads every coordinate at ``keys``; raise ``CatalogError`` if it cannot be."""
    width = model.hidden_size
    features = tuple(
        Feature(
            name=_name(key, d),
            kind=FeatureKind.DIRECTION,
            site=key.site,
            layer=key.layer,
            activation=Activation.IDENTITY,
        )
        for key in keys
        for d in range(width)
    )
    units = np.eye(width, dtype=np.float32)
    vectors = {
        _name(key, d): FeatureVectors(units[d], 0.0, 0.0, None)
        for key in keys
        for d in range(width)
    }
    document = CatalogDocument(
        schema=SCHEMA, name="capture", version="1", model=model, features=features
    )
    authoring.write_catalog(folder, document, vectors)


def captured(track: RequestTrack, keys: Sequence[SiteKey]) -> Mapping[SiteKey, FloatArray]:
    """The streams [N, D] at each site; N is every position whose activations there are."""
    acts_NF = track.activations()
    width = acts_NF.shape[1] // len(keys)
    return {key: acts_NF[:, i * width : (i + 1) * width] for i, key in enumerate(sorted(keys))}


def parse_site(text: str) -> SiteKey:
    """``resid_post.12`` as a key; ``ValueError`` says what it should look like."""
    site, _, layer = text.partition(".")
    try:
        return SiteKey(
            msgspec.convert(layer, LayerIndex, strict=False), msgspec.convert(site, Site)
        )
    except msgspec.ValidationError:
        raise ValueError(f"{text!r} is not a site; write resid_post.12, say") from None


def _name(key: SiteKey, coordinate: int) -> str:
    return f"{key.site.value}_{key.layer}_{coordinate}"
