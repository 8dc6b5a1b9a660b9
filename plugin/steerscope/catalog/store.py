"""Read a catalog folder: ``catalog.yaml`` + ``features.safetensors``.

Shapes: D model width, F features at a site. All tensors are float32:

    <feature>.W_enc      [D]   encoder column (b_dec is folded into b_enc)
    <feature>.b_enc      [1]
    <feature>.threshold  [1]   jumprelu only
    <feature>.W_dec      [D]   decoder row; absent for a feature that can only be read

A topk feature has only ``W_dec`` there: its encoder is a row of its dictionary's.

    <dictionary>.W_enc   [d_sae, D]   a whole TopK dictionary's encoder, on disk until asked for
    <dictionary>.b_enc   [d_sae]      b_dec folded in
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from steerscope import yamltext
from steerscope.catalog import signals
from steerscope.catalog.model import (
    SCHEMA,
    Activation,
    CatalogDocument,
    Dictionary,
    Feature,
    Signal,
    Site,
)
from steerscope.catalog.tensors import FloatArray, TensorFile
from steerscope.errors import CatalogError, SpecError, UnknownFeatureError
from steerscope.steering.interventions import Policy, SteeringSpec, check_spec

CATALOG_FILE = "catalog.yaml"
TENSORS_FILE = "features.safetensors"

HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FeatureVectors:
    """One feature's tensors, checked for shape and finiteness."""

    W_enc: FloatArray
    b_enc: float
    threshold: float
    W_dec: FloatArray | None


@dataclass(frozen=True, slots=True)
class DictionaryVectors:
    """A whole TopK dictionary's encoder: [d_sae, D] and [d_sae]."""

    W_enc: FloatArray
    b_enc: FloatArray


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

    folder: Path
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

    def dictionary_vectors(self, name: str) -> DictionaryVectors:
        """Read a TopK dictionary's encoder, which is not kept."""
        path = self.folder / TENSORS_FILE
        (dictionary,) = (d for d in self.document.dictionaries if d.name == name)
        with TensorFile(path) as tensors:
            return _dictionary_vectors(tensors, dictionary, self.document.model.hidden_size)

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
    text = _read(_inside(folder, CATALOG_FILE))
    path = _inside(folder, TENSORS_FILE)
    document = _decode(text, folder / CATALOG_FILE)
    digest = hashlib.sha256(hashlib.sha256(text).digest() + _file_digest(path)).hexdigest()
    if pinned not in (None, digest):
        raise CatalogError(f"{folder}: digest is {digest}, pinned to {pinned}")
    with TensorFile(path) as tensors:
        vectors = _read_vectors(tensors, document)
    catalog = _assemble(folder, document, vectors, digest)
    signals.check(catalog.document)
    _check_policies(catalog)
    return catalog


def _inside(folder: Path, name: str) -> Path:
    """The file's path; ``CatalogError`` if a link leads out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CatalogError(f"{path}: leads out of the catalog's folder")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror or error}") from None


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror or error}") from None
    return digest.digest()


def _decode(text: bytes, path: Path) -> CatalogDocument:
    try:
        document = msgspec.convert(yamltext.read(text), CatalogDocument)
    except (ValueError, msgspec.ValidationError) as error:
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
        ("dictionary", [d.name for d in document.dictionaries]),
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
        _check_dictionary(feature, document, path)


def _check_dictionary(feature: Feature, document: CatalogDocument, path: Path) -> None:
    """A topk feature needs its dictionary; any other has none."""
    where = f"{path}: feature {feature.name!r}"
    if feature.activation is not Activation.TOPK:
        if feature.dictionary is not None or feature.latent is not None:
            raise CatalogError(f"{where}: dictionary and latent are for topk features only")
        return
    known = {d.name: d for d in document.dictionaries}
    dictionary = known.get(feature.dictionary or "")
    if dictionary is None or feature.latent is None:
        raise CatalogError(f"{where}: a topk feature needs a declared dictionary and its latent")
    if (dictionary.site, dictionary.layer) != (feature.site, feature.layer):
        raise CatalogError(f"{where}: its dictionary {dictionary.name!r} is at another site")
    if feature.latent >= dictionary.d_sae or dictionary.k > dictionary.d_sae:
        raise CatalogError(f"{where}: latent or k exceed d_sae of {dictionary.name!r}")


def _read_vectors(tensors: TensorFile, document: CatalogDocument) -> dict[str, FeatureVectors]:
    d_model = document.model.hidden_size
    used: set[str] = set()
    for dictionary in document.dictionaries:
        for part, shape in _encoder_shapes(dictionary, d_model):
            _check_stored(tensors, part, shape)
            used.add(part)
    vectors = {
        feature.name: _feature_vectors(tensors, used, feature, d_model)
        for feature in document.features
    }
    if unused := sorted(tensors.entries.keys() - used):
        raise CatalogError(f"{tensors.path}: tensor {unused[0]!r} belongs to no feature")
    return vectors


def _dictionary_vectors(
    tensors: TensorFile, dictionary: Dictionary, d_model: int
) -> DictionaryVectors:
    parts = _encoder_shapes(dictionary, d_model)
    return DictionaryVectors(*(_checked(tensors, part, shape) for part, shape in parts))


def _encoder_shapes(
    dictionary: Dictionary, d_model: int
) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    name, d_sae = dictionary.name, dictionary.d_sae
    return (f"{name}.W_enc", (d_sae, d_model)), (f"{name}.b_enc", (d_sae,))


def _feature_vectors(
    tensors: TensorFile, used: set[str], feature: Feature, d_model: int
) -> FeatureVectors:
    def take(part: str, size: int) -> FloatArray:
        name = f"{feature.name}.{part}"
        used.add(name)
        return _checked(tensors, name, (size,))

    can_steer = f"{feature.name}.W_dec" in tensors.entries
    W_dec = take("W_dec", d_model) if can_steer else None
    if feature.dictionary is not None:
        latent = feature.latent or 0
        W_enc = tensors.rows(f"{feature.dictionary}.W_enc", [latent])[0]
        b_enc = tensors.read(f"{feature.dictionary}.b_enc")[latent]
        return FeatureVectors(W_enc, float(b_enc), 0.0, W_dec)
    jump = feature.activation is Activation.JUMPRELU
    return FeatureVectors(
        W_enc=take("W_enc", d_model),
        b_enc=float(take("b_enc", 1)[0]),
        threshold=float(take("threshold", 1)[0]) if jump else 0.0,
        W_dec=W_dec,
    )


def _checked(tensors: TensorFile, name: str, shape: tuple[int, ...]) -> FloatArray:
    _check_stored(tensors, name, shape)
    return tensors.read(name)


def _check_stored(tensors: TensorFile, name: str, shape: tuple[int, ...]) -> None:
    """Shape, type and finiteness, a block at a time: a dictionary's encoder stays on disk."""
    entry = tensors.entry(name)
    if entry.dtype != "F32" or entry.shape != shape:
        raise CatalogError(
            f"{tensors.path}: {name!r} is {entry.dtype}{list(entry.shape)}, "
            f"expected F32{list(shape)}"
        )
    if not tensors.is_finite(name):
        raise CatalogError(f"{tensors.path}: {name!r} holds NaN or infinity")


def _assemble(
    folder: Path, document: CatalogDocument, vectors: dict[str, FeatureVectors], digest: str
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
    return Catalog(folder, document, digest, vectors, sites, addresses)


def _check_policies(catalog: Catalog) -> None:
    for policy in catalog.policies:
        try:
            catalog.check(policy.spec)
        except SpecError as error:
            raise CatalogError(f"policy {policy.name!r}: {error}") from None
