"""What the paper's data sets have at least: the scale `paper` takes no part of one, and no stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fourbit.errors import UserError

SIZES: dict[str, tuple[Callable[[Any], int], int, str]] = {
    "cifar10": (lambda data: len(data.train_y), 50_000, "training images"),
    "imagenet": (lambda data: data.num_classes, 1000, "classes"),
    "ptb": (lambda data: len(data.vocabulary), 10_000, "words"),
    "wmt14": (lambda data: len(data.train[0]), 4_000_000, "training pairs"),
}


def require_whole(data: Any) -> None:
    """Raise a UserError for a part of a data set, or another one in its place."""
    if data.name in SIZES:
        count, least, what = SIZES[data.name]
        if count(data) < least:
            raise UserError(
                f"the scale paper needs all of {data.name}, at least {least:,} {what}, but the data has {count(data):,}: "
                "give the folder of the whole set (--data-dir), or choose --scale small."
            )
