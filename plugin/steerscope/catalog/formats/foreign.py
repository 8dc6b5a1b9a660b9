"""Read the small files beside the weights: JSON and YAML that others wrote.

Only the keys we know are decoded, strictly; others are ignored, for they are theirs to add.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from steerscope import yamltext
from steerscope.errors import CatalogError

_T = TypeVar("_T")


def read(path: Path, kind: type[_T]) -> _T:
    """Decode the file, YAML by its name or else JSON; ``CatalogError`` names file and field."""
    try:
        text = path.read_bytes()
        if path.suffix in {".yaml", ".yml"}:
            return msgspec.convert(yamltext.read(text), kind)
        return msgspec.json.decode(text, type=kind)
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror or error}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CatalogError(f"{path}: {error}") from None
