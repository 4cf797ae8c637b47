"""A data set in a line, so that a person sees what was found."""

from __future__ import annotations

from fourbit.data._base import ImageData
from fourbit.data._large_images import LargeImages
from fourbit.data._speech import SpeechData
from fourbit.data._text import TextData
from fourbit.data._translation import TranslationData


def describe(data: ImageData | LargeImages | TextData | SpeechData | TranslationData) -> str:
    """What there is to train and to test with.

    >>> from fourbit.data import load
    >>> describe(load("digits"))
    '1,437 training and 360 test images of 10 classes, 8x8 grey'
    """
    if isinstance(data, TextData):
        size = len(data.vocabulary)
        return f"{len(data.train):,} training and {len(data.test):,} test tokens of a vocabulary of {size:,}"
    counts = f"{len(data.split('train')[1]):,} training and {len(data.split('test')[1]):,} test {data.examples}"
    if isinstance(data, TranslationData):
        direction = "" if data.languages is None else f" from {data.languages[0]} to {data.languages[1]}"
        return f"{counts} of sentences{direction}, a vocabulary of {data.num_tokens:,}"
    if isinstance(data, SpeechData):
        return f"{counts} of {len(data.classes):,} classes"
    colour = "grey" if data.channels == 1 else "colour"
    return f"{counts} of {data.num_classes:,} classes, {data.image_size}x{data.image_size} {colour}"
