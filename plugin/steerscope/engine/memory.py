"""Host memory that is found before a step needs it."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterable
from typing import Any

import numpy.typing as npt

MADV_POPULATE_WRITE = 23
"""Linux 5.14: find the pages as a write would, and change nothing."""

CHUNK_BYTES = 8 << 20


def find_pages(arrays: Iterable[npt.NDArray[Any]]) -> threading.Thread:
    """Have the kernel find the pages of fresh arrays, in a thread that ends by itself.

    Else it does at the first write, 2 MiB at a time: .2 ms of some later step, and several where
    a virtual machine's host must find them too. Kernels that cannot are left to that.
    """
    thread = threading.Thread(
        target=_find_pages, args=(list(arrays),), name="steerscope-pages", daemon=True
    )
    thread.start()
    return thread


def _find_pages(arrays: list[npt.NDArray[Any]]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for array in arrays:
        # Whole pages inside the array.
        at = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        while at < end:
            if madvise(at, min(CHUNK_BYTES, end - at), MADV_POPULATE_WRITE):
                return
            at += CHUNK_BYTES
