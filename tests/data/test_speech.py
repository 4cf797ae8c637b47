"""Speech as log-mel features: known spectra, normalisation, batches, and audio that is not what it should be."""

from __future__ import annotations

import io
import math
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fourbit import data
from fourbit.data import SpeechData, num_batches, utterances
from fourbit.data._speech import decode_wav, log_mel, mel_bands
from fourbit.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "fsdd"


def wav(samples: np.ndarray, rate: int = 8000, width: int = 2, channels: int = 1) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return content.getvalue()


def tone(hertz: float, seconds: float = 0.5, rate: int = 8000) -> np.ndarray:
    return (np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate) * 16000).astype("<i2")


def write_folder(folder: Path, **changes) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for digit in range(10):
            target = folder / split / str(digit)
            target.mkdir(parents=True)
            for i in range(count):
                (target / f"{i}.wav").write_bytes(wav(tone(200 + 150 * digit + 5 * i, 0.2 + 0.05 * i), **changes))
    return folder


@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_a_tone_is_loudest_in_the_band_around_it(hertz):
    features = log_mel(decode_wav(wav(tone(hertz)), "x", 8000), 8000)
    assert features.shape == (48, 40)  # 1 + (4000 - 200) // 80
    low, high = (2595 * math.log10(1 + f / 700) for f in (20, 4000))
    place = (2595 * math.log10(1 + hertz / 700) - low) / (high - low) * 41 - 1
    assert (features.mean(0).argmax() - place).abs() <= 1


def test_bands_are_triangles_that_sum_to_one_between_the_outer_centres():
    bands = mel_bands(8000, 4097)
    assert bands.min() >= 0 and bands.max() <= 1
    inside = bands.sum(1)[200:3500]
    torch.testing.assert_close(inside, torch.ones_like(inside))


def test_features_are_those_of_an_independent_computation():
    samples = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() * 0.1
    n = torch.arange(200).double()
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / 200)
    k = torch.arange(129).double().unsqueeze(1)
    rows = []
    for begin in range(0, 801, 80):
        frame = samples[begin : begin + 200] * window
        angle = 2 * math.pi * k * n / 256
        power = (frame * torch.cos(angle)).sum(1) ** 2 + (frame * torch.sin(angle)).sum(1) ** 2
        rows.append(torch.log(power @ mel_bands(8000, 129).double() + 1e-6))
    torch.testing.assert_close(log_mel(samples.float(), 8000), torch.stack(rows).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "dtype", "scale"), [(1, "u1", None), (2, "<i2", 2**15), (4, "<i4", 2**31)])
def test_samples_of_every_width_and_several_channels_are_read(width, dtype, scale):
    values = np.array([[0.5, 0.25], [-0.5, 0.0]])
    raw = (values * 128 + 128 if scale is None else values * scale).astype(dtype)
    samples = decode_wav(wav(raw, width=width, channels=2), "x", 8000)
    torch.testing.assert_close(samples, torch.tensor([0.375, -0.25]), rtol=0, atol=1e-6)


def test_folders_become_normalised_utterances_and_padded_batches(tmp_path):
    speech = data.load("spoken_digits", write_folder(tmp_path))
    assert isinstance(speech, SpeechData)
    assert (len(speech.train_x), len(speech.test_x), speech.num_features) == (30, 20, 40)
    for t in speech.train_x:
        torch.testing.assert_close(t.mean(0), torch.zeros(40), rtol=0, atol=5e-3)  # bands of a steady tone hardly vary
    assert num_batches(speech, "train", 8) == 3 and num_batches(speech, "test", 8) == 3
    seen = []
    for x, lengths, y in utterances(speech, "train", 8, seed=1):
        assert x.shape == (int(lengths.max()), 8, 40) and y.shape == (8,)
        for i, n in enumerate(lengths.tolist()):
            assert not x[n:, i].any()
        seen += y.tolist()
    again = [y.tolist() for *_, y in utterances(speech, "train", 8, seed=1, start=1)]
    assert [n for batch in again for n in batch] == seen[8:]
    assert next(y.tolist() for *_, y in utterances(speech, "train", 8, seed=2)) != seen[:8]
    assert torch.cat([y for *_, y in utterances(speech, "test", 8)]).tolist() == speech.test_y.tolist()


def test_augmentation_masks_bands_and_frames_and_leaves_the_data_alone(tmp_path):
    speech = data.load("spoken_digits", write_folder(tmp_path))
    before = [t.clone() for t in speech.train_x]
    (varied, lengths, _), (again, *_) = (next(utterances(speech, "train", 30, seed=1)) for _ in range(2))
    plain, *_ = next(utterances(speech, "train", 30, seed=1, augment=False))
    assert torch.equal(varied, again) and all(torch.equal(a, b) for a, b in zip(before, speech.train_x, strict=True))
    changed = varied != plain
    assert not varied[changed].any()  # what is changed is zero
    for i, n in enumerate(lengths.tolist()):
        bands, frames = changed[:n, i].all(0).sum(), changed[:n, i].all(1).sum()
        assert bands <= 16 and frames <= n // 5
    assert 0.02 < changed.float().mean() < 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav(tone(300, rate=16000), rate=16000), "has 16000 samples per second, but 8000 are needed: resample it"),
        (wav(np.zeros(0, "<i2")), "has no samples: remove it"),
        (b"RIFF nonsense", "is not a WAV file that can be read"),
        (b"", "is not a WAV file that can be read"),
        (wav(tone(300))[:20] + b"\xff" * 30, "is not a WAV file that can be read"),
        (wav(tone(300))[:16] + b"\xff\xff\xff\x7f" + wav(tone(300))[20:], "is not a WAV file that can be read"),
        (wav(np.zeros(30, "u1"), width=3), "has 24 bits per sample"),
        (wav(tone(300))[: 44 + 101], "is cut off in the middle of a sample: replace the file"),
        (wav(tone(300), channels=2)[: 44 + 102], "is cut off in the middle of a sample: replace the file"),
    ],
)
def test_bad_audio_is_named(tmp_path, content, message):
    write_folder(tmp_path)
    (tmp_path / "train" / "3" / "1.wav").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        data.load("spoken_digits", tmp_path)
    assert "1.wav" in str(caught.value)


def write_tables(folder: Path, audio: list, labels: list) -> Path:
    for split in ("train", "test"):
        pq.write_table(pa.table({"audio": audio, "label": labels}), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("wrap", [lambda content: {"bytes": content, "path": "x.wav"}, lambda content: content])
def test_tables_hold_files_as_the_hub_does_or_as_bytes(tmp_path, wrap):
    write_tables(tmp_path, [wrap(wav(tone(300, 0.2))), wrap(wav(tone(900, 0.3)))], [3, 9])
    speech = data.load("spoken_digits", tmp_path)
    assert isinstance(speech, SpeechData)
    assert speech.train_y.tolist() == [3, 9] and [len(t) for t in speech.test_x] == [18, 28]


GOOD = {"bytes": wav(tone(300, 0.1)), "path": "x.wav"}


@pytest.mark.parametrize(
    ("audio", "labels", "message"),
    [
        ([GOOD, None], [0, 1], "row 1 of column audio.bytes of train of spoken_digits is empty: remove the row"),
        (
            [GOOD, {"bytes": None, "path": "y.wav"}],
            [0, 1],
            "row 1 of column audio.bytes of train of spoken_digits is e",
        ),
        (["a.wav"], [0], "column audio of train of spoken_digits must hold bytes of files, but holds string: give"),
        ([[0.1, 0.2]], [0], "column audio of train of spoken_digits must hold bytes of files, but holds list<"),
        ([{"array": [0.1]}], [0], "train of spoken_digits has no column audio.bytes or audio, only audio.array, label"),
        ([GOOD, GOOD], [0, None], "row 1 of column label of train of spoken_digits is empty"),
        ([GOOD], ["zero"], "column label of train of spoken_digits must hold whole numbers, but holds string"),
        ([GOOD], [0.0], "column label of train of spoken_digits must hold whole numbers, but holds double"),
        ([GOOD], [12], "label 12 in row 0 of train of spoken_digits is out of range"),
        ([{**GOOD, "bytes": GOOD["bytes"][:-1]}], [0], "row 0 of train of spoken_digits is cut off"),
    ],
)
def test_tables_of_another_layout_are_named(tmp_path, audio, labels, message):
    with pytest.raises(UserError, match=message):
        data.load("spoken_digits", write_tables(tmp_path, audio, labels))


def test_folders_of_another_layout_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no train files in .*: put them into train/CLASS/NAME.wav"):
        data.load("spoken_digits", tmp_path)
    (tmp_path / "train" / "3" / "folder.wav").mkdir(parents=True)
    with pytest.raises(UserError, match="no train files in"):
        data.load("spoken_digits", tmp_path)
    (tmp_path / "train" / "3" / "folder.wav").rmdir()
    (tmp_path / "train" / "3").rmdir()
    write_folder(tmp_path)
    (tmp_path / "test" / "9").rename(tmp_path / "test" / "nine")
    with pytest.raises(UserError, match="lies in a folder that is no class"):
        data.load("spoken_digits", tmp_path)
    with pytest.raises(UserError, match="--data-dir"):
        data.load("spoken_digits")


def test_too_large_batches_are_named(tmp_path):
    speech = data.load("spoken_digits", write_folder(tmp_path))
    with pytest.raises(UserError, match="batch size 31 is larger than spoken_digits's 30 training utterances"):
        num_batches(speech, "train", 31)


@pytest.mark.skipif(not REAL.is_dir(), reason="no spoken digits beside the repository")
@pytest.mark.slow
def test_the_spoken_digits_have_their_known_size():
    speech = data.load("spoken_digits", REAL)
    assert (len(speech.train_x), len(speech.test_x)) == (2000, 500)
