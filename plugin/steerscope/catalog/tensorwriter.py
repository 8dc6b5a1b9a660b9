"""Write a safetensors file tensor by tensor, large ones in blocks of rows.

The library wants every tensor as one array in memory; the encoder of a TopK dictionary of 65,536
latents is copied from file to file without ever being there as a whole. The format is simple: the
length of a header, the header (JSON: type, shape and place of each tensor), the bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from steerscope.catalog.tensors import FloatArray
from steerscope.errors import CatalogError

ALIGNMENT = 8
"""The data begin at a multiple of this many bytes, as the library has it."""


class TensorWriter:
    """Float32 tensors, given in the order of ``shapes``. Use as a context manager."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._left = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        self._file = path.open("wb")
        self._file.write(_header(shapes))

    def write(self, name: str, block: FloatArray) -> None:
        """The next rows of a tensor, or all of it; ``CatalogError`` if they do not fit."""
        data = np.ascontiguousarray(block, "<f4")
        current = next((key for key, left in self._left.items() if left), None)
        if name != current or block.shape[1:] != self._shapes[name][1:] or self._over(name, data):
            shape = list(self._shapes.get(name, ()))
            raise CatalogError(f"{name!r}: a block of {list(block.shape)} does not fit {shape}")
        if not np.isfinite(data).all():
            raise CatalogError(f"{name!r} holds NaN or infinity")
        self._file.write(data.data)
        self._left[name] -= data.nbytes

    def _over(self, name: str, data: FloatArray) -> bool:
        return data.nbytes > self._left[name]

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; without an error, every tensor must have been given."""
        self._file.close()
        short = [name for name, left in self._left.items() if left]
        if short and error is None:
            raise CatalogError(f"{short[0]!r}: fewer rows were given than its shape has")


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    tree, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        tree[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
