"""Training an acoustic model: it learns in 4 bits, and is judged by the word error rate."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from fourbit.errors import UserError
from fourbit.train import TrainConfig, train


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten words, each a tone of its own with some noise."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for digit in range(10):
            target = tmp_path / "data" / split / str(digit)
            target.mkdir(parents=True)
            for i in range(count):
                time = np.arange(int(8000 * generator.uniform(0.1, 0.2))) / 8000
                rising = np.sin(2 * np.pi * (200 + 300 * digit) * time) * (time > 0.03)
                samples = 12000 * rising + generator.normal(0, 300, len(time))
                with wave.open(str(target / f"{i}.wav"), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(8000)
                    file.writeframes(samples.astype("<i2").tobytes())
    return tmp_path / "data"


def config(folder: Path, out: Path, **changes) -> TrainConfig:
    values = {
        "model": "bilstm_speech", "data": "spoken_digits", "data_dir": folder, "batch_size": 20, "epochs": 8,
        "optimizer": "adam", "lr": 0.003, "weight_decay": 0.0, "log_to": (), "threads": 1,
        "out": out,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "ibm2020"])
def test_it_learns_words(folder, tmp_path, recipe):
    result = train(config(folder, tmp_path / "run", recipe=recipe))
    assert result.test_accuracy >= 0.7  # 0.1 by guessing


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020"])
def test_it_reports_the_word_error_rate(folder, tmp_path, recipe, capsys):
    result = train(config(folder, tmp_path / "run", recipe=recipe, epochs=1))
    assert result.test_score == pytest.approx(1 - result.test_accuracy)  # words are whole utterances here
    assert "word error rate" in capsys.readouterr().out
    table = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert table["columns"] == ["said", "heard", "times"] and all(said != heard for said, heard, _ in table["rows"])
    assert 0 < sum(int(times) for *_, times in table["rows"]) <= round(30 * result.test_score)


def test_a_network_for_images_is_refused(folder, tmp_path):
    with pytest.raises(
        UserError, match="resnet20 reads images, but spoken_digits has speech: choose one of bilstm_speech"
    ):
        train(config(folder, tmp_path / "run", model="resnet20"))
