"""Whether a data set is the one that a run was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sized
from typing import Any

from torch import Tensor


def identity(data: Any) -> str:
    """16 hex digits that other examples, labels, classes or another vocabulary change, and another machine does not.

    Pixels, labels and token numbers count as they are; features of audio, which are computed, by their sizes; photographs,
    which stay on disk, by their number.

    Args:
        data: what `load` returns.

    >>> from fourbit.data import load
    >>> identity(load("digits")) == identity(load("digits"))
    True
    """
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, data)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        if not value.is_floating_point():
            digest.update(value.contiguous().numpy().data)
    elif isinstance(value, str):
        digest.update(value.encode() + b"\0")
    elif isinstance(value, tuple):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            _feed(digest, item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _feed(digest, getattr(value, field.name))
    elif hasattr(value, "get_vocab"):
        digest.update(repr(sorted(value.get_vocab().items())).encode())
    elif isinstance(value, Sized):
        digest.update(f"{len(value)}:".encode())
