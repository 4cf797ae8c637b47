"""Backends: interchangeable kernels behind definitions that are slow, plain and always there.

Each operation below has a reference in plain PyTorch, which defines the numbers. A backend registers functions that
compute the same faster, on the tensors for which it can; the first one that takes a call gets it, otherwise the
reference runs.

    operation     arguments                                      result
    moments       x                                              means of x^2 and |x|, and max|x|
    round         quantizers.Request, scale                      quantizers.Rounded
    round_pair    two Requests of one tensor, scale              two Rounded
    round_tiles   a Request with tiles, not yet rotated          quantizers.TilesRounded
    unpack        quantizers.Packed, dtype                       tensor
    unpack_tiles  likewise, with scales of blocks                tensor
    gemm          ops.Gemm without accumulation                  ops.Raw
    accumulate    [G, M, K], [G, K, N], ops.Accumulation, key    float32 [G, M, N] (see ops.accumulate)
    epilogue      ops.Raw, ops.Finish                            tensor, sum of what was clipped
    product       ops.Gemm, ops.Finish                           both at once, where that is faster

and, without a reference, because the modules themselves are one:

    norm_supported   a tensor, format to round to or None      True, or None
    norm_statistics  ops.NormStatistics                        ops.Normalized
    norm_apply       ops.NormApply                             o, its codes, where the activation passes
    norm_backward    ops.NormBackward                          gradients
    lstm_forward     gates_x, gates_h, c, kept                 h', c'
    lstm_backward    dh, dc, gates, c, c', out                 gradient of c
    lstm_run         ops.LstmForward                           Rounded of each step's hidden state
    lstm_run_back    ops.LstmBackward                          max|g| of each step, gradient of the clip value

Kernels are found at the first use of an operation, never at import. `fourbit doctor` lists the backends of this machine.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fourbit.errors import unknown

OPERATIONS = (
    "moments",
    "round",
    "round_pair",
    "round_tiles",
    "unpack",
    "unpack_tiles",
    "gemm",
    "accumulate",
    "epilogue",
    "product",
    "norm_supported",
    "norm_statistics",
    "norm_apply",
    "norm_backward",
    "lstm_forward",
    "lstm_backward",
    "lstm_run",
    "lstm_run_back",
)

_KERNEL_PACKAGES = ("fourbit.kernels",)
"""Imported at first use; they register what they have."""


@dataclass(frozen=True)
class Kernel:
    """One function of a backend. It returns None for a call that it does not take."""

    operation: str
    backend: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Status:
    """What a backend is on this machine: whether it can run, in words what it is or why not, and whether it should run."""

    name: str
    available: bool
    detail: str
    needed: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.available else f"{self.name}: not available, {self.detail}"


_kernels: dict[str, list[Kernel]] = {operation: [] for operation in OPERATIONS}
_statuses: dict[str, Callable[[], Status]] = {}
_disabled: set[str] = set()
_active: dict[str, tuple[Callable[..., Any], ...]] = {}
_loaded = False
_loading = threading.RLock()


def register(operation: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function computes `operation` on behalf of `backend`, or returns None."""
    if operation not in _kernels:
        raise unknown("operation", operation, OPERATIONS)

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _kernels[operation].append(Kernel(operation, backend, function))
        _active.clear()
        return function

    return enter


def register_backend(status: Callable[[], Status], name: str) -> None:
    """Announce a backend, available or not; `status` is asked when somebody wants to know."""
    _statuses[name] = status


def _load() -> None:
    global _loaded
    with _loading:  # another thread must not see half of the kernels
        if not _loaded:
            for package in _KERNEL_PACKAGES:
                importlib.import_module(package)
            _loaded = True


def kernels() -> list[Kernel]:
    """Every registered kernel; the parity tests iterate over them."""
    _load()
    return [kernel for found in _kernels.values() for kernel in found]


def statuses() -> list[Status]:
    """The backends that announced themselves."""
    _load()
    return [status() for status in _statuses.values()]


def dispatch(operation: str, *arguments: Any) -> Any:
    """The result of the first enabled kernel that takes the call; None: use the reference."""
    functions = _active.get(operation)
    if functions is None:
        _load()
        functions = tuple(k.function for k in _kernels[operation] if k.backend not in _disabled)
        _active[operation] = functions
    for function in functions:
        result = function(*arguments)
        if result is not None:
            return result
    return None


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Do not use these backends while the block runs (process-wide); without names: use the reference only.

    >>> with without("cpu"):
    ...     pass
    """
    _load()
    unknown_names = [name for name in names if name not in _statuses]
    if unknown_names:
        raise unknown("backend", unknown_names[0], _statuses)
    before = set(_disabled)
    _disabled.update(names or _statuses)
    _active.clear()
    try:
        yield
    finally:
        _disabled.clear()
        _disabled.update(before)
        _active.clear()
