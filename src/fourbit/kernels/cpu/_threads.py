"""The OpenMP runtime that torch has loaded, found among the libraries that torch's own depends on: both share its threads."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from pathlib import Path

import torch

_RUNTIME = ("GOMP_parallel", "omp_get_thread_num", "omp_get_max_threads", "omp_get_num_threads", "omp_in_parallel")
"""What `fourbit_set_threads` takes, in its order."""


def openmp_entries() -> list[c_void_p] | None:
    """The addresses of the runtime's functions; None where there is none, and everything runs on the calling thread."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            runtime = ctypes.CDLL(str(folder / name))
            try:
                return [ctypes.cast(getattr(runtime, symbol), c_void_p) for symbol in _RUNTIME]
            except AttributeError:
                return None
    return None
