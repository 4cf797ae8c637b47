"""Telling a watcher who computes: which layer's products, forward and backward, which chain.

A report about memory must know whose tensors autograd is given to keep. Hooks on modules cannot tell: a fused chain does not
call its modules, and runs unfused where somebody watches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from fourbit.ops._state import LayerState


class Watcher(Protocol):
    """Somebody who wants to know."""

    def computing(self, who: LayerState | str, num_elements: int) -> AbstractContextManager[None]:
        """Entered while `who`, a layer or another part by name, computes from an input of so many elements."""
        ...

    def owns(self, who: LayerState, tensors: Iterable[Tensor | None]) -> None:
        """What a node keeps of these is the layer's, whoever saves it."""
        ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` while the block runs, in this thread."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def owns(who: LayerState, tensors: Iterable[Tensor | None]) -> None:
    """To be called by a node with several layers in it."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.owns(who, tensors)


def computing(who: LayerState | str, num_elements: int) -> AbstractContextManager[None]:
    """To be entered by who computes."""
    watcher = _watcher.get()
    return _NOBODY if watcher is None else watcher.computing(who, num_elements)


_NOBODY = nullcontext()
