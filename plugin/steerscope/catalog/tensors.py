"""A safetensors file, mapped: what is not looked at is not read.

The library reads with numpy too, but has no bfloat16 there and copies whole tensors; a dictionary
of 65,536 latents, of which sixteen are wanted, must stay on disk. The file's own header says where
everything is; it is checked against the file's size before anything else is believed.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from steerscope.errors import CatalogError

MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 1 << 56
"""Of arrays: what numpy can address."""

ROW_BLOCK_BYTES = 16 << 20
"""How much of a matrix is looked at before its pages are given back."""

FloatArray = npt.NDArray[np.float32]

_FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}
_BFLOAT16 = "BF16"
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
          "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}  # fmt: skip
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
              struct.error)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """What the header says of one tensor; ``begin`` and ``end`` are offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A mapped safetensors file. Use as a context manager, or ``close`` it."""

    kind = "a safetensors file"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CatalogError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            self.entries, self.metadata = self._header(self._map)
        except _MALFORMED as error:
            self._map.close()
            raise CatalogError(f"{path}: not {self.kind}, or truncated: {error}") from None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file; nothing returned before refers to it.

        Where a profiler still holds a frame that does, it is unmapped when that is let go.
        """
        with contextlib.suppress(BufferError):
            self._map.close()

    def entry(self, name: str) -> Entry:
        """The tensor's header; ``CatalogError`` if there is none."""
        if name not in self.entries:
            raise CatalogError(f"{self.path}: tensor {name!r} is missing")
        return self.entries[name]

    def raw(self, name: str) -> bytes:
        """The tensor's bytes as stored."""
        entry = self.entry(name)
        return self._map[entry.begin : entry.end]

    def read(self, name: str) -> FloatArray:
        """The whole tensor as float32."""
        entry = self._float_entry(name)
        return self._floats(entry, entry.begin, entry.end).reshape(entry.shape)

    def rows(self, name: str, indices: Sequence[int]) -> FloatArray:
        """The chosen rows of a matrix as float32 [n, columns]."""
        entry, width = self._matrix(name)
        size = width * _SIZES[entry.dtype]
        starts = [entry.begin + self._checked(name, i, entry.shape[0]) * size for i in indices]
        rows = [self._floats(entry, start, start + size) for start in starts]
        self._give_back()
        return np.stack(rows) if rows else np.zeros((0, width), np.float32)

    def columns(self, name: str, indices: Sequence[int]) -> FloatArray:
        """The chosen columns of a matrix as float32 [n, rows], a block of rows at a time."""
        entry, width = self._matrix(name)
        chosen = [self._checked(name, i, width) for i in indices]
        num_rows, size = entry.shape[0], width * _SIZES[entry.dtype]
        taken = np.empty((len(chosen), num_rows), np.float32)
        step = max(ROW_BLOCK_BYTES // max(size, 1), 1)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            start = entry.begin + first * size
            stored = np.frombuffer(self._map, _stored(entry), (last - first) * width, start)
            taken[:, first:last] = _float32(stored.reshape(last - first, width)[:, chosen], entry).T
            del stored
            self._give_back()
        return taken

    def is_finite(self, name: str) -> bool:
        """Whether no element is NaN or infinite, looked at a block at a time."""
        entry = self._float_entry(name)
        step = ROW_BLOCK_BYTES // _SIZES[entry.dtype] * _SIZES[entry.dtype]
        for begin in range(entry.begin, entry.end, step):
            if not np.isfinite(self._floats(entry, begin, min(begin + step, entry.end))).all():
                return False
            self._give_back()
        return True

    def _give_back(self) -> None:
        """Let the pages go that were looked at: they count as this process' memory."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _header(self, mapped: mmap.mmap) -> tuple[dict[str, Entry], dict[str, str]]:
        return _header(mapped)

    def _float_entry(self, name: str) -> Entry:
        entry = self.entry(name)
        if entry.dtype != _BFLOAT16 and entry.dtype not in _FLOATS:
            raise CatalogError(f"{self.path}: {name!r} is {entry.dtype}, expected floats")
        return entry

    def _matrix(self, name: str) -> tuple[Entry, int]:
        entry = self._float_entry(name)
        if len(entry.shape) != 2:
            raise CatalogError(f"{self.path}: {name!r} is {list(entry.shape)}, expected a matrix")
        return entry, entry.shape[1]

    def _checked(self, name: str, index: int, size: int) -> int:
        if not 0 <= index < size:
            raise CatalogError(f"{self.path}: {name!r} has no index {index}, only 0 to {size - 1}")
        return index

    def _floats(self, entry: Entry, begin: int, end: int) -> FloatArray:
        count = (end - begin) // _SIZES[entry.dtype]
        return _float32(np.frombuffer(self._map, _stored(entry), count, begin), entry)


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless an array can have the shape, an empty one too."""
    if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise ValueError(f"{name!r} has a shape that no array can have")


def _stored(entry: Entry) -> np.dtype[Any]:
    return np.dtype("<u2") if entry.dtype == _BFLOAT16 else _FLOATS[entry.dtype]


def _float32(stored: npt.NDArray[Any], entry: Entry) -> FloatArray:
    if entry.dtype == _BFLOAT16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # it becomes infinite, and what is not finite is refused
        return stored.astype(np.float32)


def _header(mapped: mmap.mmap) -> tuple[dict[str, Entry], dict[str, str]]:
    (size,) = struct.unpack("<Q", mapped[:8])
    if size > min(MAX_HEADER_BYTES, len(mapped) - 8):
        raise ValueError("its header does not end")
    tree = json.loads(mapped[8 : 8 + size])
    metadata = dict(tree.pop("__metadata__", {}))
    entries = {name: _entry(name, told, 8 + size, len(mapped)) for name, told in tree.items()}
    return entries, metadata


def _entry(name: str, told: dict[str, Any], data: int, length: int) -> Entry:
    begin, end = (data + int(offset) for offset in told["data_offsets"])
    entry = Entry(str(told["dtype"]), tuple(int(n) for n in told["shape"]), begin, end)
    check_shape(name, entry.shape)
    size = math.prod(entry.shape) * _SIZES[entry.dtype]
    negative = min(entry.shape, default=0) < 0
    if negative or not data <= begin <= end <= length or end - begin != size:
        raise ValueError(f"{name!r} lies outside the file or has another size than its shape")
    return entry
