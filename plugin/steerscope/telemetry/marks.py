"""How far a hub came with each worker, so that the next hub knows what died with it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import struct
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Self

from steerscope.telemetry.frames import Frame
from steerscope.telemetry.tracks import EngineKey

_RECORD = struct.Struct("<16sI4Q")
"""An engine, by digest; a rank; a mark."""


class Mark(NamedTuple):
    """What a worker had told, and lost, when its newest frame was counted; that one included."""

    num_frames: int = 0
    num_tokens: int = 0
    dropped: int = 0
    dropped_tokens: int = 0

    @classmethod
    def after(cls, frame: Frame) -> Self:
        """The mark of a worker whose newest frame this is."""
        num_tokens = frame.told_tokens + frame.query_start_loc[-1]
        told = frame.step - frame.dropped + 1
        return cls(max(told, 0), num_tokens, frame.dropped, frame.dropped_tokens)


class Marks:
    """One for each worker. In the file ``path`` they outlive the hub, however it ends.

    They are written, not synced: it is the hub that may be gone, not the machine.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._marks: dict[tuple[bytes, int], Mark] = {}
        self._places: dict[tuple[bytes, int], int] = {}
        self._file: FileIO | None = None
        if path is not None:
            self._file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
            kept = self._file.readall()
            whole = len(kept) // _RECORD.size * _RECORD.size
            for engine, rank, *mark in _RECORD.iter_unpack(kept[:whole]):
                self._keep((engine, rank), Mark(*mark))

    def of(self, key: EngineKey, rank: int) -> Mark:
        """The newest of that worker, or of the hub before."""
        return self._marks.get((_digest(key), rank), Mark())

    def ranks(self, key: EngineKey) -> set[int]:
        """The workers of that engine."""
        engine = _digest(key)
        return {rank for known, rank in self._marks if known == engine}

    def note(self, key: EngineKey, rank: int, mark: Mark) -> None:
        """From now on this is that worker's."""
        worker = (_digest(key), rank)
        place = self._keep(worker, mark)
        if self._file is not None:
            with contextlib.suppress(OSError, struct.error):
                os.pwrite(self._file.fileno(), _RECORD.pack(*worker, *mark), place * _RECORD.size)

    def _keep(self, worker: tuple[bytes, int], mark: Mark) -> int:
        self._marks[worker] = mark
        return self._places.setdefault(worker, len(self._places))


@functools.lru_cache(maxsize=4096)
def _digest(key: EngineKey) -> bytes:
    named = f"{key.model_name}\0{key.engine}".encode()
    return hashlib.blake2b(named, digest_size=16).digest()
