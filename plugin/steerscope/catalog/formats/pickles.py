"""Pickled checkpoints run code when they are read, so they are not read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from steerscope.errors import CatalogError

SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})

_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_ZIP = b"PK\x03\x04"


def refuse(path: Path) -> None:
    """Raise ``CatalogError`` if the file, or all there is in the folder, is pickled."""
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.is_file()]
        if any(p.suffix in {".safetensors", ".npz", ".gguf"} for p in files):
            return
    else:
        files = [path]
    for file in files:
        if _is_pickled(file):
            raise CatalogError(
                f"{file}: is pickled and would run code when read; convert it where you trust it: "
                f"safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), "
                f"{file.stem + '.safetensors'!r})"
            )


def _is_pickled(path: Path) -> bool:
    if path.suffix in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            magic = file.read(9)
        if magic.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    # A safetensors file may start so too, with the size of its header; then the header begins.
    return magic.startswith(_PICKLE) and not magic.endswith(b"{")
