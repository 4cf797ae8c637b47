"""Telling who asks where chains end, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fourbit.chains._link import Link
from fourbit.ops import LayerState

ChainWatcher = Callable[[Link, "LayerState | str"], None]
"""Called with the last step of a chain, and what it ends at: the layer that takes its result as codes, or an operation."""

_watcher: ContextVar[ChainWatcher | None] = ContextVar("chain_watcher", default=None)


@contextmanager
def watch_chains(watcher: ChainWatcher) -> Iterator[None]:
    """Tell `watcher` of every chain that ends while the block runs, in this thread."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def is_watched() -> bool:
    """Whether somebody asks."""
    return _watcher.get() is not None


def chain_ended(link: Link, end: LayerState | str) -> None:
    """To be called where a chain ends."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(link, end)
