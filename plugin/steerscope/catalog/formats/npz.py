"""A ``.npz`` file, mapped where it lies: ``numpy.savez`` stores its arrays uncompressed.

A compressed member cannot be mapped and is refused; ``numpy.load`` would read all of it, and
pickled objects with it if asked to.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zipfile

from steerscope.catalog.tensors import Entry, TensorFile, check_shape

MAGIC = b"PK\x03\x04"

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip member: its magic, and at the end the lengths of the name and of extra fields."""

MAX_ARRAY_HEADER_BYTES = 65536

LENGTHS = {1: struct.Struct("<H"), 2: struct.Struct("<I")}
"""How the two versions of the array format give the length of their header."""

ARRAY_HEADER = re.compile(
    rb"\{'descr': '([<>|=]\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \}\s*"
)

DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}


class NpzFile(TensorFile):
    """Its arrays by name, as those of a safetensors file."""

    kind = "a .npz file"

    def _header(self, mapped: mmap.mmap) -> tuple[dict[str, Entry], dict[str, str]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise ValueError(str(error)) from None
        return {m.filename.removesuffix(".npy"): _entry(mapped, m) for m in members}, {}


def _entry(mapped: mmap.mmap, member: zipfile.ZipInfo) -> Entry:
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{name!r} is compressed (numpy.savez does not)")
    magic, name_size, extra_size = LOCAL_HEADER.unpack_from(mapped, member.header_offset)
    if magic != MAGIC:
        raise ValueError(f"{name!r} has no header")
    start = member.header_offset + LOCAL_HEADER.size + name_size + extra_size
    dtype, fortran, shape, begin = _array_header(mapped, start)
    if fortran and len(shape) > 1:
        raise ValueError(f"{name!r} is in Fortran order")
    end = start + member.file_size
    size = math.prod(shape) * int(dtype[2:]) if dtype[2:].isdecimal() else -1
    check_shape(name, shape)
    if not 0 <= member.header_offset < begin <= end <= len(mapped) or end - begin != size:
        raise ValueError(f"{name!r} lies outside the file or has another size than its shape")
    return Entry(DTYPES.get(dtype, dtype), shape, begin, end)


def _array_header(mapped: mmap.mmap, start: int) -> tuple[str, bool, tuple[int, ...], int]:
    """Type, order, shape, and where the data begin. numpy's own reader evaluates a literal."""
    magic, major = struct.unpack_from("<6sBx", mapped, start)
    length = LENGTHS.get(major)
    if magic != b"\x93NUMPY" or length is None:
        raise ValueError("a member is no array of a version that is known")
    (size,) = length.unpack_from(mapped, start + 8)
    begin = start + 8 + length.size + size
    text = mapped[start + 8 + length.size : min(begin, start + MAX_ARRAY_HEADER_BYTES)]
    found = ARRAY_HEADER.fullmatch(text)
    if found is None:
        raise ValueError("an array's header is not as numpy writes it for numbers")
    dtype, fortran, shape = (part.decode("ascii") for part in found.groups())
    return dtype, fortran == "True", tuple(int(n) for n in shape.split(",") if n.strip()), begin
