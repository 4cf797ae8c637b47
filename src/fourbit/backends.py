"""Backends: interchangeable kernels behind definitions that are slow, plain and always there.

An `Operation` is declared once, beside its reference in plain PyTorch, which defines the numbers; or it says why it has none.
A backend registers kernels that compute the same faster, on the tensors for which it can.

A kernel answers before it works. It is a function that is given the arguments, looks at their formats, shapes, dtypes and
layouts only, and returns its plan: a function without arguments that does the work, or a sentence that says why it declines.
So nothing is allocated, read or unpacked in vain, and one can ask why a layer is slow:

    ROUND: Operation[[Request, Tensor], Rounded] = Operation("round", reference="quantizers.run")

    @ROUND.kernel("cpu")
    def plan_round(request, scale):
        if not request.x.is_cpu:
            return "the tensor is on another device"
        return lambda: ...

    rounded = ROUND(request, scale) or reference(request, scale)      the first kernel that takes the call; None: none does
    ROUND.answers(request, scale)                                     {"cpu": "", "cuda": "the tensor is on ..."}
    with backends.watching() as calls: ...                            how often which kernel did what, and why others did not

A plan that depends on the description of the call alone (formats, shapes, dtypes, layouts) is `Reusable`: it is given the
arguments again, and a layer keeps it in its `Plans`, so that the next step does not ask.

Kernels are found at the first use of an operation, never at import. `fourbit doctor` lists the backends of this machine.
"""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar

from fourbit._registry import Registry
from fourbit.errors import unknown

P = ParamSpec("P")
R = TypeVar("R")
Result = TypeVar("Result", covariant=True)


class Reusable(Generic[Result]):
    """A plan for every call with the same description. `work` gets the arguments of the call; it holds no tensor of any."""

    __slots__ = ("work",)

    def __init__(self, work: Callable[..., Result]):
        self.work = work


Plan: TypeAlias = Callable[[], R] | Reusable[R] | str
"""What a kernel answers: the work, or why it declines."""

_KERNEL_PACKAGES = ("fourbit.kernels",)
"""Imported at first use; they register what they have."""


@dataclass(frozen=True)
class Kernel(Generic[P, R]):
    """One kernel of a backend: its plans, and called, the result, or None where it declines."""

    operation: str
    backend: str
    plan: Callable[P, Plan[R]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R | None:  # noqa: D102
        work = self.plan(*args, **kwargs)
        if isinstance(work, Reusable):
            return work.work(*args, **kwargs)
        return None if isinstance(work, str) else work()


class Operation(Generic[P, R]):
    """Something that kernels may do.

    Args:
        name: for lists and tests.
        reference: the function of this package that defines it; or, in parentheses, why there is none.
    """

    def __init__(self, name: str, reference: str):
        self.name, self.reference = name, reference
        self.kernels: list[Kernel[P, R]] = []
        self._kernels: list[Kernel[P, R]] | None = None
        OPERATIONS.add(name, self)

    def kernel(self, backend: str) -> Callable[[Callable[P, Plan[R]]], Kernel[P, R]]:
        """Decorator: the function plans this operation on behalf of `backend`."""

        def enter(plan: Callable[P, Plan[R]]) -> Kernel[P, R]:
            found = Kernel(self.name, backend, plan)
            self.kernels.append(found)
            forget_plans()
            return found

        return enter

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The result of the first enabled kernel that takes the call; None: use the reference."""
        found = self.taken(*args, **kwargs)
        if found is None:
            return None
        return found.work(*args, **kwargs) if isinstance(found, Reusable) else found()

    def plan(self, *args: P.args, **kwargs: P.kwargs) -> Callable[[], R] | None:
        """What will do the call; None: use the reference."""
        found = self.taken(*args, **kwargs)
        return partial(found.work, *args, **kwargs) if type(found) is Reusable else found  # type: ignore[return-value]

    def taken(self, *args: P.args, **kwargs: P.kwargs) -> Callable[[], R] | Reusable[R] | None:
        """The plan of the first enabled kernel that takes the call, as it answers; None: none does."""
        for kernel in self._among_enabled() if self._kernels is None else self._kernels:
            work = kernel.plan(*args, **kwargs)
            declined = isinstance(work, str)
            if _watched is not None:
                _watched[Call(self.name, kernel.backend, work if isinstance(work, str) else "")] += 1
            if not declined:
                return work  # type: ignore[return-value]
        return None

    def answers(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str]:
        """What each enabled backend says to a call: "" where it would do it, otherwise why not. Nothing is computed."""
        found: dict[str, str] = {}
        for kernel in self._among_enabled():
            work = kernel.plan(*args, **kwargs)
            found[kernel.backend] = work if isinstance(work, str) else ""
        return found

    def _among_enabled(self) -> list[Kernel[P, R]]:
        _load()
        self._kernels = [kernel for kernel in self.kernels if kernel.backend not in _disabled]
        return self._kernels


class Plans:
    """Plans that somebody keeps from call to call: of each kind of call the last one, as long as its description is the same
    and nobody has switched kernels. A copy and a pickle begin without any.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Any, ...]] = {}

    def work(self, operation: Operation[..., R], kind: Any, description: tuple[Any, ...], *args: Any) -> Any:
        """What does a call: it is given the arguments; None: no kernel takes it.

        Args:
            operation, args: of the call.
            kind: which of its calls.
            description: all that kernels may look at to answer.
        """
        kept = self._kept.get((operation, kind))
        if kept is not None and kept[0] is _era and kept[1] == description and _watched is None:
            return kept[2]
        plan = operation.taken(*args)
        if plan is not None and type(plan) is not Reusable:
            return lambda *args: plan()  # type: ignore[operator]
        work = None if plan is None else plan.work  # type: ignore[union-attr]
        self._kept[operation, kind] = _era, description, work
        return work

    def __reduce__(self) -> Any:
        return Plans, ()

    def __deepcopy__(self, memo: Any) -> Plans:
        return Plans()


OPERATIONS: Registry[Operation[..., Any]] = Registry("operation")
"""By name, as they are declared."""


class Call(NamedTuple):
    """What a kernel answered: `declined` is empty where it did the work, otherwise why it did not."""

    operation: str
    backend: str
    declined: str


@dataclass(frozen=True)
class Status:
    """What a backend is on this machine: whether it can run, in words what it is or why not, and whether it should run."""

    name: str
    available: bool
    detail: str
    needed: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.available else f"{self.name}: not available, {self.detail}"


_statuses: dict[str, Callable[[], Status]] = {}
_disabled: set[str] = set()
_watched: Counter[Call] | None = None
_era = object()
"""Another one whenever kernels may answer otherwise: plans of an earlier one are not used."""
_loaded = False
_loading = threading.RLock()


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


def kernels() -> list[Kernel[..., Any]]:
    """Every registered kernel; the parity tests iterate over them."""
    _load()
    return [kernel for operation in OPERATIONS.values() for kernel in operation.kernels]


def statuses() -> list[Status]:
    """The backends that announced themselves."""
    _load()
    return [status() for status in _statuses.values()]


@contextmanager
def watching() -> Iterator[Counter[Call]]:
    """Count what kernels answer while the block runs (process-wide): which did the work, and why others did not.

    >>> import torch
    >>> with watching() as calls:
    ...     pass
    >>> sorted(calls)
    []
    """
    global _watched
    before, _watched = _watched, Counter()
    try:
        yield _watched
    finally:
        _watched = before


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
    forget_plans()
    try:
        yield
    finally:
        _disabled.clear()
        _disabled.update(before)
        forget_plans()


def forget_plans() -> None:
    """To be called where kernels may answer otherwise from now on: they were switched, or another instruction set is used."""
    global _era
    _era = object()
    for operation in OPERATIONS.values():
        operation._kernels = None
