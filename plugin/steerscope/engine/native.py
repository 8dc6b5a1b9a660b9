"""Builds and loads ``native.cpp``: a site's arithmetic on a CPU, called by the graph itself.

Compiled once for each machine and PyTorch, as inductor compiles what surrounds it, by the same
kind of compiler, and kept in the user's cache folder. Where that cannot be, sites take the path
of ``reference``, which is as exact and slower.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steerscope import config

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
"""No -ffast-math: not-a-number must stay what it is."""
BUILD_SECONDS = 300

_log = logging.getLogger(__name__)


class Step(ctypes.Structure):
    """``Step`` of ``native.cpp``: what the batch plan says of the step."""

    _fields_ = (
        ("first_row", ctypes.c_int64),
        ("num_steered", ctypes.c_int64),
        ("steered_E", ctypes.c_void_p),
        ("rows_T", ctypes.c_void_p),
    )


class Decoder(ctypes.Structure):
    """``Decoder`` of ``native.cpp``."""

    _fields_ = (("W_dec_FD", ctypes.c_void_p), ("mine_F", ctypes.c_void_p))


class Site(ctypes.Structure):
    """``Site`` of ``native.cpp``. ``made`` keeps what it points to."""

    _fields_ = (
        ("width", ctypes.c_int64),
        ("num_features", ctypes.c_int64),
        ("is_probed", ctypes.c_int64),
        ("panels", ctypes.c_void_p),
        ("b_enc_F", ctypes.c_void_p),
        ("threshold_F", ctypes.c_void_p),
        ("acts_NF", ctypes.c_void_p),
        ("deltas_NF", ctypes.c_void_p),
        ("doses_N", ctypes.c_void_p),
        ("probe_D", ctypes.c_void_p),
        ("edited_SF", ctypes.c_void_p),
        ("num_edited_S", ctypes.c_void_p),
        ("gate_index_SF", ctypes.c_void_p),
        ("parameters_SPF", ctypes.c_void_p),
        ("max_dose_S", ctypes.c_void_p),
        ("here", Decoder),
        ("there", Decoder),
        ("step", ctypes.POINTER(Step)),
    )

    @classmethod
    def made(cls, arrays: Mapping[str, npt.NDArray[Any]], **others: Any) -> Site:
        """With the addresses of arrays, by field, all contiguous."""
        assert all(array.flags.c_contiguous for array in arrays.values())
        site = cls(**{name: array.ctypes.data for name, array in arrays.items()}, **others)
        site.kept = (arrays, others)
        return site


def decoder(W_dec_FD: npt.NDArray[np.float32], mine_F: npt.NDArray[np.bool_]) -> Decoder:
    """The arrays must outlive it."""
    return Decoder(W_dec_FD.ctypes.data, mine_F.ctypes.data)


class Library:
    """The compiled library; the ops are there once it is made."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        self._functions = ctypes.CDLL(str(path))
        self._functions.steerscope_panel.restype = ctypes.c_int64
        self._sites: dict[str, Site] = {}
        """Kept, since the library only has their addresses."""

    def register(self, name: str, site: Site) -> None:
        """Make ``site`` the one that the ops find under ``name``."""
        self._sites[name] = site
        self._functions.steerscope_register(name.encode(), ctypes.byref(site))

    def panels(self, columns_KF: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[K, F] as the library reads it, by panels of features: [F / panel, K, panel]."""
        panel = self._functions.steerscope_panel()
        missing = -columns_KF.shape[1] % panel
        whole = np.pad(columns_KF, ((0, 0), (0, missing)))
        return np.ascontiguousarray(whole.reshape(len(whole), -1, panel).transpose(1, 0, 2))


@functools.cache
def start() -> Future[Library | None]:
    """Find or build the library, in a thread: some seconds where it has to be built."""
    return ThreadPoolExecutor(1, thread_name_prefix="steerscope-native").submit(_load)


def library() -> Library | None:
    """The library; None where there can be none. The first call waits for it."""
    return start().result()


def _load() -> Library | None:
    compiler = config.compiler()
    if compiler is None:
        _log.warning("steerscope: no C++ compiler: sites take the slower path on a CPU")
        return None
    try:
        return Library(_built(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("steerscope: %s: sites take the slower path on a CPU", _told(error))
        return None


def _told(error: Exception) -> str:
    output = getattr(error, "stderr", None)
    return f"{error}\n{output[-2000:]}" if output else str(error)


def _built(compiler: str) -> Path:
    """The library's file; processes that want it at once wait for the one that builds it."""
    folder = config.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="steerscope-"))
    path = folder / f"native-{_digest(compiler)}.so"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(compiler, path)
    return path


def _build(compiler: str, path: Path) -> None:
    unfinished = path.with_suffix(".part")
    command = _command(compiler, str(unfinished))
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _command(compiler: str, target: str) -> list[str]:
    root = Path(torch.__file__).parent
    return [
        compiler,
        *FLAGS,
        f"-I{root / 'include'}",
        str(SOURCE),
        "-o",
        target,
        f"-L{root / 'lib'}",
        "-ltorch_cpu",
    ]


def _digest(compiler: str) -> str:
    """Of all that decides what comes out."""
    h = hashlib.sha256()
    for part in (compiler, *FLAGS, torch.__version__, torch.__file__, _processor()):
        h.update(part.encode() + b"\0")
    h.update(SOURCE.read_bytes())
    return h.hexdigest()[:24]


def _processor() -> str:
    """Its model and what it can do: what is compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(told)))
