"""Tiny runs: the five-layer network on 96 digits, three steps an epoch."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import BATCH_SIZE, NUM_TEST, NUM_TRAIN

from fourbit import data
from fourbit.train import TrainConfig
from fourbit.train._loop import Loop


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def few_digits() -> data.ImageData:
    whole = data.load("digits")
    return dataclasses.replace(
        whole,
        train_x=whole.train_x[:NUM_TRAIN],
        train_y=whole.train_y[:NUM_TRAIN],
        test_x=whole.test_x[:NUM_TEST],
        test_y=whole.test_y[:NUM_TEST],
    )


@pytest.fixture(autouse=True)
def small_data(few_digits: data.ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    load = data.load

    def load_few(name: str, folder: Path | None = None, **options: Any) -> Any:
        return few_digits if name == "digits" else load(name, folder, **options)

    monkeypatch.setattr(data, "load", load_few)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """`make_config(name, **fields)`: a run of two epochs in the folder `name`."""

    def make(name: str = "run", **fields: Any) -> TrainConfig:
        small = {"model": "digits_cnn", "data": "digits", "recipe": "fp32", "epochs": 2, "batch_size": BATCH_SIZE}
        quick = {"log_every": 1, "observe_every": 2, "log_to": (), "progress": False}
        return TrainConfig(**{**small, **quick, "out": tmp_path / name, **fields})

    return make


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`signal_after(n)`: Ctrl-C during the n-th optimizer step from now on, once."""

    def arrange(steps: int, number: signal.Signals = signal.SIGINT) -> None:
        step, seen = Loop._step, 0

        def counted(self: Loop, *args: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == steps:
                signal.raise_signal(number)
            step(self, *args)

        monkeypatch.setattr(Loop, "_step", counted)

    return arrange
