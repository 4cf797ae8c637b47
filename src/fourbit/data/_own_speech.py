"""Sounds of one's own as a data set: one class per word, or whatever the labels are, at the rate that the files have."""

from __future__ import annotations

from pathlib import Path

from fourbit.data._base import SPLITS
from fourbit.data._examples import Examples, Kind
from fourbit.data._speech import SpeechData, make_speech, rate_of

SOUNDS = Kind("WAV files", (".wav",), ("audio", "wav", "file"))


def make_own_speech(name: str, examples: Examples) -> SpeechData:
    """The data set of the examples. Their rate is that of the first training file.

    Raises:
        UserError: a file that is no WAV file, or has another rate.
    """

    def content(split: str, index: int) -> bytes:
        source = examples.files[split][index]
        return source.read_bytes() if isinstance(source, Path) else source

    rate = rate_of(content("train", 0), examples.where("train", 0))
    rows = {
        split: [
            (content(split, index), examples.where(split, index), label)
            for index, label in enumerate(examples.labels[split].tolist())
        ]
        for split in SPLITS
    }
    return make_speech(name, rows, examples.classes, rate)
