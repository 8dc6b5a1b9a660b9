"""A GGUF file, mapped where it lies: its header, of which only the texts are kept.

The layout is ggml's ``docs/gguf.md``. The gguf library maps a file too, but does not look where
it ends: a file of a hundred bytes that announces 2^60 values keeps it busy for ever.
"""

from __future__ import annotations

import math
import mmap
import struct
from typing import NamedTuple

from steerscope.catalog.tensors import Entry, TensorFile, check_shape

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each kind of number."""
DTYPES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "F64": 8, "BF16": 2}
MAX_DIMENSIONS = 4
ALIGNMENT = 32

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GgufFile(TensorFile):
    """Its tensors by name; ``metadata`` holds the values that are texts."""

    kind = "a GGUF file"

    def _header(self, mapped: mmap.mmap) -> tuple[dict[str, Entry], dict[str, str]]:
        return _Cursor(mapped).header()


class _Told(NamedTuple):
    """What the header says of a tensor; its shape has the slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Reads on from where it is; ``struct.error`` or ``ValueError`` at the file's end."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._at = 0

    def header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """The tensors and the texts."""
        if self._bytes(4) != MAGIC or self._number(_U32) not in VERSIONS:
            raise ValueError("it does not begin as one of a version that is known")
        num_tensors, num_values = self._number(_U64), self._number(_U64)
        texts: dict[str, str] = {}
        alignment = ALIGNMENT
        for _ in range(num_values):
            key, kind = self._text(), self._number(_U32)
            if kind == STRING:
                texts[key] = self._text()
            elif key == "general.alignment":
                alignment = self._number(_U32)
            else:
                self._skip(kind)
        if not alignment:
            raise ValueError("general.alignment is 0")
        told = [self._tensor() for _ in range(num_tensors)]
        data = -(-self._at // alignment) * alignment
        return {tensor.name: self._entry(tensor, data) for tensor in told}, texts

    def _tensor(self) -> _Told:
        name, num_dimensions = self._text(), self._number(_U32)
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{name!r} has {num_dimensions} dimensions")
        shape = tuple(self._number(_U64) for _ in range(num_dimensions))[::-1]
        return _Told(name, shape, self._number(_U32), self._number(_U64))

    def _entry(self, told: _Told, data: int) -> Entry:
        """Where a tensor is; of quantised ones only that they are there."""
        check_shape(told.name, told.shape)
        dtype, begin = DTYPES.get(told.kind, f"type {told.kind}"), data + told.offset
        size = math.prod(told.shape) * ITEM_BYTES.get(dtype, 0)
        if begin + size > len(self._mapped):
            raise ValueError(f"{told.name!r} lies outside the file")
        return Entry(dtype, told.shape, begin, begin + size)

    def _skip(self, kind: int) -> None:
        if kind != ARRAY:
            self._bytes(SIZES[kind])
            return
        of, length = self._number(_U32), self._number(_U64)
        if of in SIZES:
            self._bytes(SIZES[of] * length)
        elif of == STRING:
            for _ in range(length):
                self._bytes(self._number(_U64))
        else:
            raise ValueError("an array of arrays")

    def _text(self) -> str:
        return self._bytes(self._number(_U64)).decode("utf-8", "replace")

    def _number(self, kind: struct.Struct) -> int:
        (number,) = kind.unpack(self._bytes(kind.size))
        return int(number)

    def _bytes(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._mapped):
            raise ValueError("it ends before its header does")
        found, self._at = self._mapped[self._at : end], end
        return found
