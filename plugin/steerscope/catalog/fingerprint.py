"""Is this the model the catalog was made for? Compare before anything is served."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from steerscope.catalog.model import Fingerprint, ModelMatch
from steerscope.catalog.tensors import TensorFile
from steerscope.errors import CatalogError, ModelMismatchError


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``check`` found: ``differences`` only for a fine-tune."""

    match: ModelMatch
    differences: tuple[str, ...]
    unchecked: tuple[str, ...]
    """What could not be compared, as the model is not on local disk."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is known of the model being served. ``folder`` is None for one not on local disk."""

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    folder: Path | None


def check(expected: Fingerprint, served: ServedModel, allow_fine_tune: bool = False) -> Comparison:
    """Compare; raise ``ModelMismatchError`` listing what differs.

    With ``allow_fine_tune`` only the geometry must match; what else differs is returned.
    """
    geometry = _geometry_differences(expected, served)
    files: list[str] = []
    unchecked: tuple[str, ...] = ()
    if served.folder is None:
        unchecked = ("tokenizer", *expected.weights)
    else:
        files = _file_differences(expected, served.folder)
    if geometry or (files and not allow_fine_tune):
        told = "; ".join([*geometry, *files])
        hint = "" if geometry else " (a fine-tune? then set allow_fine_tune)"
        raise ModelMismatchError(f"catalog is for another model: {told}{hint}")
    match = ModelMatch.FINE_TUNE if files else ModelMatch.EXACT
    return Comparison(ModelMatch.UNVERIFIED if unchecked else match, tuple(files), unchecked)


def _geometry_differences(expected: Fingerprint, served: ServedModel) -> list[str]:
    return [
        f"{name} is {actual}, the catalog was made for {wanted}"
        for name, wanted, actual in (
            ("architecture", expected.architecture, served.architecture),
            ("hidden_size", expected.hidden_size, served.hidden_size),
            ("num_hidden_layers", expected.num_hidden_layers, served.num_hidden_layers),
            ("vocab_size", expected.vocab_size, served.vocab_size),
        )
        if wanted != actual
    ]


def _file_differences(expected: Fingerprint, folder: Path) -> list[str]:
    differences = []
    if expected.tokenizer_sha256 is not None:
        actual = _file_digest(folder / "tokenizer.json")
        if actual != expected.tokenizer_sha256:
            differences.append(f"tokenizer.json has sha256 {actual}")
    for name, wanted in expected.weights.items():
        actual = tensor_digest(folder, name)
        if actual != wanted:
            differences.append(f"weight {name} has sha256 {actual}")
    return differences


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "(unreadable)"


def tensor_digest(folder: Path, name: str) -> str:
    """SHA-256 of a tensor's bytes as stored, found in any ``*.safetensors`` there."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with TensorFile(path) as tensors:
                if name in tensors.entries:
                    return hashlib.sha256(tensors.raw(name)).hexdigest()
        except CatalogError:
            continue
    return "(not found)"
