import mmap
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from steerscope.engine import memory
from steerscope.engine.slots import SiteValues, SlotCache, Values

PAGES = 64


def resident(array):
    """Bytes of the mapping that holds the array's middle which are in memory."""
    middle, is_here = array.ctypes.data + array.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_here = int(found[1], 16) <= middle < int(found[2], 16)
        elif is_here and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such mapping")


def can_populate():
    with mmap.mmap(-1, mmap.PAGESIZE) as pages:
        try:
            pages.madvise(memory.MADV_POPULATE_WRITE)
        except OSError:
            return False
    return True


needs_populate = pytest.mark.skipif(not can_populate(), reason="needs Linux 5.14")


def test_pages_are_found_and_nothing_is_written(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_BYTES", 16 * mmap.PAGESIZE)
    array = np.arange(PAGES * mmap.PAGESIZE, dtype=np.uint8)
    before = array.copy()
    memory.find_pages([array]).join()
    assert np.array_equal(array, before)


@needs_populate
def test_fresh_arrays_are_in_memory_after(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_BYTES", 3 << 20)
    array = np.zeros(32 << 20, np.uint8)
    assert resident(array) < array.nbytes // 2
    memory.find_pages([array]).join()
    assert resident(array) >= array.nbytes - mmap.PAGESIZE * 2


def test_arrays_smaller_than_a_page_are_left_alone():
    memory.find_pages([np.zeros(3), np.zeros(0)]).join()


@needs_populate
def test_what_is_kept_of_edits_takes_memory_once_there_are_some():
    cache = SlotCache((64,), 100_000, 1 << 30)
    acts = np.ones((1, 64), np.float32)
    site = SiteValues(acts, acts, acts[:, 0])
    cache.write(np.array([0]), Values(np.zeros(0, np.int64), [site]))
    _wait()
    (kept,), (deltas,) = cache._acts, cache._deltas
    assert resident(kept) >= 0.9 * kept.nbytes
    assert resident(deltas) < 0.5 * deltas.nbytes
    cache.write(np.array([0]), Values(np.zeros(1, np.int64), [site]))
    _wait()
    assert resident(deltas) >= 0.9 * deltas.nbytes


def _wait():
    for thread in threading.enumerate():
        if thread.name == "steerscope-pages":
            thread.join()
