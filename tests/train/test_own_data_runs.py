"""Runs on data of one's own: they train, go on to the bit, and only with the same data and options."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_files import metrics, tensors

from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.train import TrainConfig, load, train

NUM_CLASSES = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURBIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shapes(tmp_path) -> Path:
    """Twelve classes, each a bright cell of its own in a dark picture, easy to learn."""
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label in range(NUM_CLASSES):
            folder = tmp_path / "shapes" / split / f"cell {label:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 60, (12, 12), dtype=np.uint8)
                row, column = 4 * (label // 4), 3 * (label % 4)
                pixels[row : row + 4, column : column + 3] = 250
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "shapes"


@pytest.fixture
def config(make_config, shapes):
    return make_config("run", data="images", data_dir=shapes, recipe="ibm2020", augment=False)


def test_a_run_on_twelve_classes_of_ones_own_learns_is_continued_and_is_loaded(config, signal_after, make_config):
    whole = dataclasses.replace(config, out=config.out.with_name("whole"), epochs=4)
    result = train(whole)
    first = metrics(whole.out)[0]
    assert result.test_accuracy is not None and result.test_loss < first["loss"]
    signal_after(7)
    interrupted = dataclasses.replace(whole, out=config.out)
    assert train(interrupted).stopped == "interrupted"
    assert train(interrupted, resume=True).stopped == "done"
    assert tensors(interrupted.out) == tensors(whole.out)
    trained = load(whole.out)
    assert trained.model.fc.out_features == NUM_CLASSES  # type: ignore[union-attr]
    assert trained.config == dataclasses.replace(trained.config, data="images", columns=())
    assert json.loads((whole.out / "config.json").read_text())["image_size"] is None


def test_a_run_goes_on_with_its_data_and_options_alone(config, shapes):
    train(dataclasses.replace(config, max_steps=1))
    with pytest.raises(UserError, match="was made with image_size none, not 16"):
        train(dataclasses.replace(config, image_size=16), resume=True)
    picture = shapes / "train" / "cell 00" / "0.png"
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    with pytest.raises(UserError, match="was made with other examples, labels or vocabulary of images"):
        train(dataclasses.replace(config, max_steps=1), resume=True)


def test_text_of_ones_own_trains_and_counts_unknown_characters(make_config, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("abcdefgh\n" * 40)
    (tmp_path / "text" / "test.txt").write_text("abcd?\n" * 10)
    config = make_config(
        model="lstm_200",
        data="text",
        data_dir=tmp_path / "text",
        epochs=1,
        batch_size=4,
        sequence_length=8,
        max_steps=2,
    )
    assert train(config).test_loss is not None
    assert load(config.out).model.classifier.out_features == 10  # type: ignore[union-attr]


def test_from_the_command_line_errors_are_one_line_and_exit_2(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--model", "digits_cnn", "--data", "images", "--log-to=none", "--data-dir"]
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "empty")], "empty has no images: need a folder for each class"),
        ([str(shapes), "--tokenizer", "bytes"], "images has no option tokenizer, only image_size, mirror, columns"),
        (
            [str(shapes), "--columns", "a,b"],
            "has neither parquet files nor a list such as metadata.csv: leave out --col",
        ),
        ([str(shapes), "--image-size", "0"], "image_size is 0, but must be at least 1"),
        ([str(shapes), "--image-size", "4"], "image_size is 4, too small for digits_cnn"),
    ):
        assert main([*command, *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_hf_names_may_stand_for_a_folder_and_name_the_run(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--model",
        "digits_cnn",
        "--recipe",
        "fp32",
        "--data",
        "hf:./shapes",
        "--max-steps",
        "1",
        "--log-to=none",
    ]
    assert main(["train", *words]) == 0
    assert "data: 192 training and 48 test images of 12 classes, 12x12 grey" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits_cnn-hf_._shapes-fp32-seed0" / "config.json").is_file()


def test_options_are_part_of_the_command_that_repeats_a_run():
    config = TrainConfig(data="images", columns=("img", "fine"), image_size=32, mirror=True)
    assert config.command() == "fourbit train --data images --columns img,fine --image-size 32 --mirror"
    assert config.data_options() == {"columns": ("img", "fine"), "image_size": 32, "mirror": True}
    assert TrainConfig().data_options() == {}
