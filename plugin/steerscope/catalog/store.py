"""Read a catalog folder: ``catalog.yaml`` + ``features.safetensors``.

Shapes: D model width, F features at a site. All tensors are float32:

    <feature>.W_enc      [D]   encoder column (b_dec is folded into b_enc)
    <feature>.b_enc      [1]
    <feature>.threshold  [1]   jumprelu only
    <feature>.W_dec      [D]   decoder row; absent for a feature that can only be read
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import yaml
from safetensors import SafetensorError, safe_open

from steerscope.catalog.model import (
    SCHEMA,
    Activation,
    CatalogDocument,
    Feature,
    Signal,
    Site,
)
from steerscope.errors import CatalogError, SpecError, UnknownFeatureError
from steerscope.steering.interventions import Policy, SteeringSpec, check_spec

CATALOG_FILE = "catalog.yaml"
TENSORS_FILE = "features.safetensors"

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FeatureVectors:
    """One feature's tensors, checked for shape and finiteness."""

    W_enc: FloatArray
    b_enc: float
    threshold: float
    W_dec: FloatArray | None


@dataclass(frozen=True, slots=True)
class SiteKey:
    """A tapped place: ``resid_post`` of layer 3, say. Sorts in the order of the forward pass."""

    layer: int
    site: Site

    def __lt__(self, other: SiteKey) -> bool:
        return (self.layer, self.site.order) < (other.layer, other.site.order)

    def __str__(self) -> str:
        return f"{self.site}.{self.layer}"


@dataclass(frozen=True, slots=True)
class FeatureAddress:
    """Where a feature sits: its site and its column there."""

    key: SiteKey
    index: int


@dataclass(frozen=True, slots=True)
class Catalog:
    """A validated catalog. ``digest`` covers the bytes of both files."""

    document: CatalogDocument
    digest: str
    vectors: dict[str, FeatureVectors]
    sites: dict[SiteKey, tuple[Feature, ...]]
    addresses: dict[str, FeatureAddress]

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The signals declared over this catalog's features."""
        return self.document.signals

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies that ship with the catalog."""
        return tuple(
            Policy(
                name=p.name,
                interventions=p.interventions,
                max_dose=p.max_dose,
                description=p.description,
            )
            for p in self.document.policies
        )

    def feature(self, name: str) -> Feature:
        """The feature of that name, or ``UnknownFeatureError``."""
        address = self.addresses.get(name)
        if address is None:
            raise UnknownFeatureError("feature", f"no feature {name!r} in the catalog")
        return self.sites[address.key][address.index]

    def check(self, spec: SteeringSpec) -> None:
        """Raise ``SpecError`` unless every feature named exists and can do what is asked."""
        check_spec(spec)
        for i, intervention in enumerate(spec.interventions):
            try:
                self._check_target(intervention.feature)
                if intervention.when is not None:
                    self._check_gate(intervention.feature, intervention.when.feature)
            except SpecError as error:
                raise error.under(f"interventions[{i}]") from None

    def _check_target(self, name: str) -> None:
        self.feature(name)
        if self.vectors[name].W_dec is None:
            raise SpecError("feature", f"{name!r} is read-only: it has no decoder vector")

    def _check_gate(self, target: str, gate: str) -> None:
        if gate not in self.addresses:
            raise UnknownFeatureError("when.feature", f"no feature {gate!r} in the catalog")
        here, there = self.addresses[target].key, self.addresses[gate].key
        if here != there:
            raise SpecError("when.feature", f"{gate!r} is at {there}, {target!r} is at {here}")


def load(folder: Path, pinned: str | None = None) -> Catalog:
    """Read and validate the catalog in ``folder``; raise ``CatalogError`` naming what is wrong.

    With ``pinned``, the digest of the one catalog that is wanted, any other is refused.
    """
    text = _read(folder / CATALOG_FILE)
    tensors = _read(folder / TENSORS_FILE)
    document = _decode(text, folder / CATALOG_FILE)
    vectors = _read_vectors(folder / TENSORS_FILE, document)
    digest = hashlib.sha256(hashlib.sha256(text).digest() + hashlib.sha256(tensors).digest())
    catalog = _assemble(document, vectors, digest.hexdigest())
    if pinned not in (None, catalog.digest):
        raise CatalogError(f"{folder}: digest is {catalog.digest}, pinned to {pinned}")
    _check_signals(catalog)
    _check_policies(catalog)
    return catalog


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror or error}") from None


def _decode(text: bytes, path: Path) -> CatalogDocument:
    try:
        document = msgspec.yaml.decode(text, type=CatalogDocument)
    except (msgspec.MsgspecError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: {error}") from None
    if document.schema != SCHEMA:
        raise CatalogError(f"{path}: schema is {document.schema!r}, expected {SCHEMA!r}")
    _check_features(document, path)
    return document


def _check_features(document: CatalogDocument, path: Path) -> None:
    if not document.features:
        raise CatalogError(f"{path}: features: must not be empty")
    for kind, names in (
        ("feature", [f.name for f in document.features]),
        ("signal", [s.name for s in document.signals]),
        ("policy", [p.name for p in document.policies]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                raise CatalogError(f"{path}: {kind} {name!r} is declared {count} times")
    for feature in document.features:
        if feature.layer >= document.model.num_hidden_layers:
            raise CatalogError(
                f"{path}: feature {feature.name!r}: layer {feature.layer} does not exist "
                f"in a model of {document.model.num_hidden_layers} layers"
            )


def _read_vectors(path: Path, document: CatalogDocument) -> dict[str, FeatureVectors]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = set(tensors.keys())
            reader = {name: tensors.get_tensor(name) for name in names}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise CatalogError(f"{path}: {error}") from None
    used: set[str] = set()
    vectors = {
        feature.name: _feature_vectors(reader, used, feature, document.model.hidden_size, path)
        for feature in document.features
    }
    if unused := sorted(names - used):
        raise CatalogError(f"{path}: tensor {unused[0]!r} belongs to no feature")
    return vectors


def _feature_vectors(
    tensors: dict[str, FloatArray], used: set[str], feature: Feature, d_model: int, path: Path
) -> FeatureVectors:
    def take(part: str, size: int) -> FloatArray:
        name = f"{feature.name}.{part}"
        if name not in tensors:
            raise CatalogError(f"{path}: tensor {name!r} is missing")
        used.add(name)
        return _checked(tensors[name], name, size, path)

    jump = feature.activation is Activation.JUMPRELU
    can_steer = f"{feature.name}.W_dec" in tensors
    return FeatureVectors(
        W_enc=take("W_enc", d_model),
        b_enc=float(take("b_enc", 1)[0]),
        threshold=float(take("threshold", 1)[0]) if jump else 0.0,
        W_dec=take("W_dec", d_model) if can_steer else None,
    )


def _checked(tensor: FloatArray, name: str, size: int, path: Path) -> FloatArray:
    if tensor.dtype != np.float32 or tensor.shape != (size,):
        raise CatalogError(
            f"{path}: {name!r} is {tensor.dtype}{list(tensor.shape)}, expected float32[{size}]"
        )
    if not np.isfinite(tensor).all():
        raise CatalogError(f"{path}: {name!r} holds NaN or infinity")
    return tensor


def _assemble(
    document: CatalogDocument, vectors: dict[str, FeatureVectors], digest: str
) -> Catalog:
    keys = sorted({SiteKey(f.layer, f.site) for f in document.features})
    sites = {
        key: tuple(f for f in document.features if SiteKey(f.layer, f.site) == key) for key in keys
    }
    addresses = {
        feature.name: FeatureAddress(key, index)
        for key, features in sites.items()
        for index, feature in enumerate(features)
    }
    return Catalog(document, digest, vectors, sites, addresses)


def _check_signals(catalog: Catalog) -> None:
    for signal in catalog.signals:
        where = f"signal {signal.name!r}"
        for number in _numbers(signal):
            if not math.isfinite(number):
                raise CatalogError(f"{where}: {number} is not a finite number")
        for term in signal.terms:
            if term.feature not in catalog.addresses:
                raise CatalogError(f"{where}: no feature {term.feature!r} in the catalog")
        _check_labels(where, signal)


def _numbers(signal: Signal) -> Iterator[float]:
    yield signal.bias
    yield from (term.weight for term in signal.terms)
    yield from (label.below for label in signal.labels if label.below is not None)


def _check_labels(where: str, signal: Signal) -> None:
    if not signal.labels:
        raise CatalogError(f"{where}: labels: must not be empty")
    bounds = [label.below for label in signal.labels]
    if bounds[-1] is not None or None in bounds[:-1]:
        raise CatalogError(f"{where}: labels: all but the last need 'below', the last has none")
    ascending = [b for b in bounds if b is not None]
    if ascending != sorted(set(ascending)):
        raise CatalogError(f"{where}: labels: bounds must ascend")


def _check_policies(catalog: Catalog) -> None:
    for policy in catalog.policies:
        try:
            catalog.check(policy.spec)
        except SpecError as error:
            raise CatalogError(f"policy {policy.name!r}: {error}") from None
