"""Is this the model the catalog was made for? Compare before anything is served."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from steerscope.catalog.model import Fingerprint
from steerscope.errors import ModelMismatchError

MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is known of the model being served. ``folder`` is None for one not on local disk."""

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    folder: Path | None


def check(expected: Fingerprint, served: ServedModel) -> tuple[str, ...]:
    """Raise ``ModelMismatchError`` listing what differs; return what could not be compared."""
    differences = [
        f"{name} is {actual}, the catalog was made for {wanted}"
        for name, wanted, actual in (
            ("architecture", expected.architecture, served.architecture),
            ("hidden_size", expected.hidden_size, served.hidden_size),
            ("num_hidden_layers", expected.num_hidden_layers, served.num_hidden_layers),
            ("vocab_size", expected.vocab_size, served.vocab_size),
        )
        if wanted != actual
    ]
    unchecked: list[str] = []
    if served.folder is None:
        unchecked = ["tokenizer", *expected.weights]
    else:
        differences += _file_differences(expected, served.folder)
    if differences:
        raise ModelMismatchError("catalog is for another model: " + "; ".join(differences))
    return tuple(unchecked)


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
            stored = _stored_bytes(path, name)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            continue
        if stored is not None:
            return hashlib.sha256(stored).hexdigest()
    return "(not found)"


def _stored_bytes(path: Path, name: str) -> bytes | None:
    """By the file's own header: numpy, which the library reads with here, has no bfloat16."""
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > MAX_HEADER_BYTES:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(header_size))
        if name not in header:
            return None
        begin, end = header[name]["data_offsets"]
        file.seek(8 + header_size + begin)
        return file.read(end - begin)
