"""Speech as log-mel features, and batches of utterances padded to the longest.

    frames of 25 ms every 10 ms, Hann window, power spectrum, triangular bands that are equally wide on the mel scale
    mel(f) = 2595 log10(1 + f / 700), logarithm, and per band mean and deviation over the utterance taken out, which removes
    most of what microphone and voice add to every frame

Audio comes as WAV files: in the column `audio` of parquet files, as the hub stores it, or in folders CLASS/*.wav below
train and test.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fourbit.data._base import SPLITS, check_labels, num_batches
from fourbit.data._random import generator
from fourbit.errors import UserError, unknown

WINDOW_S, HOP_S = 0.025, 0.010
NUM_BANDS = 40
FLOOR = 1e-6
"""Added to the power before the logarithm: below the noise of 16-bit audio."""


@dataclass(frozen=True, eq=False)
class SpeechData:
    """Utterances in memory, one class each.

    Args:
        name: its name in the catalogue.
        train_x, test_x: features of each utterance, float32 [frames, bands].
        train_y, test_y: int64 [N], class numbers from 0.
        classes: name of each class.

    Raises:
        UserError: no utterances, features of another form, or a label without a class.
    """

    name: str
    train_x: tuple[Tensor, ...]
    train_y: Tensor
    test_x: tuple[Tensor, ...]
    test_y: Tensor
    classes: tuple[str, ...]
    examples: ClassVar[str] = "utterances"

    def __post_init__(self):
        for split in SPLITS:
            x, y = self.split(split)
            if (
                not x
                or len(x) != len(y)
                or any(t.ndim != 2 or not len(t) or t.shape[1] != self.num_features for t in x)
            ):
                raise UserError(
                    f"{split} of {self.name} must be as many features [frames, bands] as labels, not empty."
                )
            check_labels(y, len(self.classes), f"{split} of {self.name}")

    def split(self, name: str) -> tuple[tuple[Tensor, ...], Tensor]:
        """Features and labels of "train" or "test"; UserError for another name."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return (self.train_x, self.train_y) if name == "train" else (self.test_x, self.test_y)

    @property
    def num_features(self) -> int:
        """Bands."""
        return self.train_x[0].shape[1]


def utterances(
    data: SpeechData,
    split: str,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    augment: bool = True,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features [T, B, bands] with zeros behind the shorter ones, frames of each [B], and classes [B].

    Training utterances are shuffled by (seed, epoch), and with `augment` varied as by SpecAugment (Park et al., arXiv
    1904.08779): two masks of up to 8 bands and one of up to a fifth of the frames, filled with the mean. An incomplete last
    batch is left out. Test utterances come in order and unchanged.
    """
    x, y = data.split(split)
    order = (
        torch.randperm(len(y), generator=generator("order", seed, epoch)) if split == "train" else torch.arange(len(y))
    )
    for k in range(start, num_batches(data, split, batch_size)):
        picked = order[k * batch_size : (k + 1) * batch_size]
        features = [x[i] for i in picked.tolist()]
        if split == "train" and augment:
            random = generator("augment", seed, epoch, k)
            features = [_masked(t, random) for t in features]
        yield torch.nn.utils.rnn.pad_sequence(features), torch.tensor([len(t) for t in features]), y[picked]


def _masked(t: Tensor, random: torch.Generator) -> Tensor:
    t = t.clone()
    for axis, largest in ((1, 8), (1, 8), (0, len(t) // 5)):
        width = int(torch.randint(largest + 1, (), generator=random))
        begin = int(torch.randint(max(t.shape[axis] - width, 0) + 1, (), generator=random))
        t.narrow(axis, begin, min(width, t.shape[axis] - begin)).zero_()
    return t


def mel_bands(rate: int, num_bins: int, num_bands: int = NUM_BANDS, low: float = 20.0) -> Tensor:
    """Weights [num_bins, num_bands] of power spectrum bins from 0 to rate / 2: triangles, each from the centre of the band
    below to that of the band above."""

    def mel(f: float) -> float:
        return 2595.0 * math.log10(1.0 + f / 700.0)

    edges = torch.linspace(mel(low), mel(rate / 2), num_bands + 2, dtype=torch.float64)
    hertz = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    bins = torch.linspace(0.0, rate / 2, num_bins, dtype=torch.float64).unsqueeze(1)
    rising = (bins - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    falling = (hertz[2:] - bins) / (hertz[2:] - hertz[1:-1])
    return torch.minimum(rising, falling).clamp_min(0.0).float()


def log_mel(samples: Tensor, rate: int, num_bands: int = NUM_BANDS) -> Tensor:
    """Logarithm of the power in mel bands, float32 [frames, bands]; audio shorter than a window is one frame.

    Args:
        samples: float32 [N], from -1 to 1.
        rate: samples per second.

    >>> log_mel(torch.zeros(8000), 8000).shape
    torch.Size([98, 40])
    """
    window, hop = round(WINDOW_S * rate), round(HOP_S * rate)
    size = 2 ** math.ceil(math.log2(window))
    if len(samples) < window:
        samples = torch.nn.functional.pad(samples, (0, window - len(samples)))
    frames = samples.unfold(0, window, hop) * torch.hann_window(window)
    power = torch.fft.rfft(frames, size).abs().square()
    return torch.log(power @ mel_bands(rate, size // 2 + 1, num_bands) + FLOOR)


def rate_of(content: bytes, where: str) -> int:
    """Samples per second of a WAV file. Raises UserError where it is none."""
    with _opened(content, where) as file:
        return file.getframerate()


@contextmanager
def _opened(content: bytes, where: str) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(io.BytesIO(content)) as file:
            yield file
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: of a chunk longer than the file
        why = str(error) or "it is damaged"
        raise UserError(f"{where} is not a WAV file that can be read ({why}): convert it to 16-bit PCM.") from error


def decode_wav(content: bytes, where: str, rate: int) -> Tensor:
    """Samples of a WAV file with that many per second; several channels are averaged.

    Raises:
        UserError: not a WAV file, another rate, no samples, or part of one at the end.
    """
    with _opened(content, where) as file:
        found, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
        raw = file.readframes(file.getnframes())
    if found != rate:
        raise UserError(f"{where} has {found} samples per second, but {rate} are needed: resample it.")
    if not raw:
        raise UserError(f"{where} has no samples: remove it.")
    if len(raw) % (width * channels):
        raise UserError(f"{where} is cut off in the middle of a sample: replace the file.")
    if width == 1:
        samples = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128.0) / 128.0
    elif width in (2, 4):
        samples = np.frombuffer(raw, np.dtype(f"<i{width}")).astype(np.float32) / 2.0 ** (8 * width - 1)
    else:
        raise UserError(f"{where} has {8 * width} bits per sample: convert it to 16-bit PCM.")
    return torch.from_numpy(samples.reshape(-1, channels).mean(1))


def read_wav_folders(folder: Path, classes: Sequence[str]) -> dict[str, list[tuple[bytes, str, int]]]:
    """Content, path and class number of the files SPLIT/CLASS/*.wav.

    Raises:
        UserError: a split without files, or a folder that is no class.
    """
    found: dict[str, list[tuple[bytes, str, int]]] = {}
    for split in SPLITS:
        paths = sorted(path for path in (folder / split).glob("*/*.wav") if path.is_file())
        if not paths:
            raise UserError(
                f"no {split} files in {folder}: put them into {split}/CLASS/NAME.wav, or give parquet files."
            )
        for path in paths:
            if path.parent.name not in classes:
                raise UserError(
                    f"{path} lies in a folder that is no class: the classes are {', '.join(classes)} (for sounds of your own: "
                    "--data speech)."
                )
        found[split] = [(path.read_bytes(), str(path), classes.index(path.parent.name)) for path in paths]
    return found


def _normalised(t: Tensor) -> Tensor:
    return (t - t.mean(0)) / t.std(0, correction=0).clamp_min(1e-3)


def make_speech(
    name: str, rows: dict[str, list[tuple[bytes, str, int]]], classes: Sequence[str], rate: int
) -> SpeechData:
    """Decoded, as normalised features."""
    features = {s: [log_mel(decode_wav(content, where, rate), rate) for content, where, _ in rows[s]] for s in SPLITS}
    x = {split: tuple(_normalised(t) for t in found) for split, found in features.items()}
    y = {split: torch.tensor([label for *_, label in found]) for split, found in rows.items()}
    return SpeechData(name, x["train"], y["train"], x["test"], y["test"], tuple(classes))
