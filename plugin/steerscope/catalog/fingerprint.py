"""Is this the model the catalog was made for? Compare before anything is served."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from steerscope.catalog.model import Fingerprint
from steerscope.errors import ModelMismatchError


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
    """SHA-256 of a tensor's raw little-endian bytes, found in any ``*.safetensors`` there."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as tensors:
                if name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    return hashlib.sha256(tensors.get_tensor(name).tobytes()).hexdigest()
        except (SafetensorError, OSError, TypeError):
            continue
    return "(not found)"
