"""The data sets that `load` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fourbit._registry import Registry

if TYPE_CHECKING:
    from fourbit.data._base import ImageData
    from fourbit.data._large_images import LargeImages
    from fourbit.data._speech import SpeechData
    from fourbit.data._text import TextData
    from fourbit.data._translation import TranslationData

Loader = Callable[..., "ImageData | LargeImages | TextData | SpeechData | TranslationData"]
"""Takes the user's folder or None; its further parameters are the options of `load` that it knows."""

DATASETS: Registry[Loader] = Registry("data set")
register = DATASETS.register


def names() -> list[str]:
    """Names that `load` knows.

    >>> {"digits", "cifar10", "ptb"} <= set(names())
    True
    """
    return list(DATASETS)
