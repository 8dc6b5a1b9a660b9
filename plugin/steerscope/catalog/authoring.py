"""Write a catalog: both files or neither, and what is written can be read."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from steerscope.catalog import store
from steerscope.catalog.fingerprint import tensor_digest
from steerscope.catalog.model import Activation, CatalogDocument, Fingerprint
from steerscope.catalog.modelfolder import ModelFolder
from steerscope.catalog.store import (
    CATALOG_FILE,
    TENSORS_FILE,
    Catalog,
    DictionaryVectors,
    FeatureVectors,
)
from steerscope.catalog.tensors import FloatArray, TensorFile
from steerscope.catalog.tensorwriter import TensorWriter
from steerscope.errors import CatalogError

YAML_WIDTH = 100

BLOCK_LATENTS = 2048
"""How many of a dictionary's latents are held at a time while it is copied."""

ODD_BREAKS = frozenset("\x85\u2028\u2029")
"""Line breaks to YAML, which PyYAML would write as they are and read as others."""

Encoders = Mapping[str, Iterable[DictionaryVectors]]
"""Each dictionary's encoder in blocks of latents, in order."""


def write_catalog(
    folder: Path,
    document: CatalogDocument,
    vectors: Mapping[str, FeatureVectors],
    dictionaries: Encoders | None = None,
    *,
    overwrite: bool = False,
) -> Catalog:
    """Write the catalog and return it as read back; on any error nothing is changed.

    It is built beside ``folder``, loaded with all checks of ``store.load``, then moved. With
    ``overwrite``, what else lies in an existing folder stays.
    """
    if folder.exists() and not overwrite:
        raise CatalogError(f"{folder}: exists already")
    if folder.exists() and not folder.is_dir():
        raise CatalogError(f"{folder}: is not a folder")
    _check_names(document, vectors, dictionaries or {})
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            built = Path(beside) / "catalog"
            built.mkdir()
            (built / CATALOG_FILE).write_text(to_yaml(document), encoding="utf-8")
            _write_tensors(built / TENSORS_FILE, document, vectors, dictionaries or {})
            catalog = store.load(built)
            _move(built, folder, Path(beside))
    except OSError as error:
        raise CatalogError(f"{folder}: {error.strerror or error}") from None
    return dataclasses.replace(catalog, folder=folder)


def fingerprint_of(model_dir: Path) -> Fingerprint:
    """What a catalog made for the model in this folder says of it: sizes, tokenizer, weights."""
    model = ModelFolder.read(model_dir)
    weights = {name: tensor_digest(model_dir, name) for name in model.telling_tensors()}
    return Fingerprint(
        architecture=model.architecture,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        vocab_size=model.vocab_size,
        tokenizer_sha256=model.tokenizer_sha256(),
        weights=weights,
    )


def to_yaml(document: CatalogDocument) -> str:
    """The document as people read it: in the struct's order, without what is default anyway."""
    text: str = yaml.dump(
        _tree(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=YAML_WIDTH
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Escapes odd line breaks."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if ODD_BREAKS & set(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def _tree(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return _struct_tree(value)
    if isinstance(value, Mapping):
        return {str(key): _tree(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_tree(part) for part in value]
    return msgspec.to_builtins(value)


def _struct_tree(value: msgspec.Struct) -> dict[str, Any]:
    config = value.__struct_config__
    tree: dict[str, Any] = {config.tag_field: config.tag} if config.tag_field else {}
    for member in msgspec.structs.fields(value):
        told = getattr(value, member.name)
        if member.default_factory is not msgspec.NODEFAULT:
            default = member.default_factory()
        else:
            default = member.default
        if told != default:
            tree[member.encode_name] = _tree(told)
    return tree


def _check_names(
    document: CatalogDocument, vectors: Mapping[str, FeatureVectors], encoders: Encoders
) -> None:
    for what, declared, given in (
        ("feature", [f.name for f in document.features], vectors),
        ("dictionary", [d.name for d in document.dictionaries], encoders),
    ):
        if missing := sorted(set(declared) - set(given)):
            raise CatalogError(f"{what} {missing[0]!r} has no vectors")
        if stray := sorted(set(given) - set(declared)):
            raise CatalogError(f"vectors of {what} {stray[0]!r}, which the document does not have")


def _write_tensors(
    path: Path,
    document: CatalogDocument,
    vectors: Mapping[str, FeatureVectors],
    encoders: Encoders,
) -> None:
    width = document.model.hidden_size
    small = dict(_feature_tensors(document, vectors))
    shapes: dict[str, tuple[int, ...]] = {name: part.shape for name, part in small.items()}
    for dictionary in document.dictionaries:
        shapes[f"{dictionary.name}.W_enc"] = (dictionary.d_sae, width)
        shapes[f"{dictionary.name}.b_enc"] = (dictionary.d_sae,)
    with TensorWriter(path, shapes) as writer:
        for name, part in small.items():
            writer.write(name, part)
        for dictionary in document.dictionaries:
            biases = []
            for block in encoders[dictionary.name]:
                writer.write(f"{dictionary.name}.W_enc", block.W_enc)
                biases.append(block.b_enc)
            writer.write(
                f"{dictionary.name}.b_enc", np.concatenate(biases or [np.zeros(0, np.float32)])
            )


def _feature_tensors(
    document: CatalogDocument, vectors: Mapping[str, FeatureVectors]
) -> Iterator[tuple[str, FloatArray]]:
    for feature in document.features:
        own = vectors[feature.name]
        parts: dict[str, Any] = {}
        if feature.activation is not Activation.TOPK:
            parts |= {"W_enc": own.W_enc, "b_enc": [own.b_enc]}
        if feature.activation is Activation.JUMPRELU:
            parts["threshold"] = [own.threshold]
        if own.W_dec is not None:
            parts["W_dec"] = own.W_dec
        for part, numbers in parts.items():
            yield f"{feature.name}.{part}", np.asarray(numbers, np.float32)


def _move(built: Path, folder: Path, beside: Path) -> None:
    """Put the built catalog in place; a failure half way puts back what was there."""
    if not folder.exists():
        os.rename(built, folder)
        return
    kept = beside / "kept"
    kept.mkdir()
    names = [name for name in (TENSORS_FILE, CATALOG_FILE) if (folder / name).exists()]
    for name in names:
        shutil.copy2(folder / name, kept / name)
    try:
        for name in (TENSORS_FILE, CATALOG_FILE):
            os.replace(built / name, folder / name)
    except OSError:
        for name in names:
            os.replace(kept / name, folder / name)
        raise


def stored_encoder(catalog: Catalog, name: str) -> Iterator[DictionaryVectors]:
    """A dictionary of a catalog in blocks, as ``write_catalog`` takes it."""
    (dictionary,) = (d for d in catalog.document.dictionaries if d.name == name)
    with TensorFile(catalog.folder / TENSORS_FILE) as tensors:
        b_enc = tensors.read(f"{name}.b_enc")
        for first in range(0, dictionary.d_sae, BLOCK_LATENTS):
            rows = range(first, min(first + BLOCK_LATENTS, dictionary.d_sae))
            block = tensors.rows(f"{name}.W_enc", rows)
            yield DictionaryVectors(block, b_enc[rows.start : rows.stop])


def stored_encoders(catalog: Catalog) -> Encoders:
    """All dictionaries of a catalog, as ``write_catalog`` takes them."""
    names = [dictionary.name for dictionary in catalog.document.dictionaries]
    return {name: stored_encoder(catalog, name) for name in names}


def same_encoder(one: Iterable[DictionaryVectors], other: Iterable[DictionaryVectors]) -> bool:
    """Whether two encoders are equal to the bit, a block of each at a time."""
    return all(
        a is not None
        and b is not None
        and np.array_equal(a.W_enc, b.W_enc)
        and np.array_equal(a.b_enc, b.b_enc)
        for a, b in itertools.zip_longest(one, other)
    )


def merge(one: Catalog, other: Catalog, name: str) -> tuple[CatalogDocument, Encoders]:
    """Both catalogs' features, signals, policies as one document, with its dictionaries' encoders.

    They must be for the same model, and no name may be in both.
    """
    if one.document.model != other.document.model:
        raise CatalogError(f"{one.folder} and {other.folder} were made for different models")
    parts: dict[str, Any] = {}
    for kind in ("features", "dictionaries", "signals", "policies"):
        mine, theirs = getattr(one.document, kind), getattr(other.document, kind)
        if both := sorted({x.name for x in mine} & {x.name for x in theirs}):
            raise CatalogError(f"{kind}: {both[0]!r} is in both catalogs")
        parts[kind] = mine + theirs
    document = msgspec.structs.replace(
        one.document,
        name=name,
        description="\n".join(filter(None, (one.document.description, other.document.description))),
        baselines=one.document.baselines + other.document.baselines,
        **parts,
    )
    encoders = {
        d.name: stored_encoder(c, d.name) for c in (one, other) for d in c.document.dictionaries
    }
    return document, encoders
