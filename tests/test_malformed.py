"""Nothing that a user can type, or have in a file, ends in a traceback or hangs: one sentence, and exit code 2."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
import torch

from fourbit import data, models
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.train import CompareConfig, TrainConfig, compare, train
from malformed_input import command_lines, damaged_folders, fields

SECONDS = 60
EVERY = 47
"""Of the cases, so many go into one that is not slow."""

TINY = {"model": "digits_cnn", "data": "digits", "recipe": "fp32", "epochs": 1, "max_steps": 1, "batch_size": 16}
TINY |= {"log_to": (), "progress": False, "max_test_batches": 1}


def sampled(cases: list, ids: list[str]) -> list:
    return [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if number % EVERY else [])
        for number, (case, name) in enumerate(zip(cases, ids, strict=True))
    ]


def named(words: object) -> str:
    return re.sub(" at 0x[0-9a-f]+", "", ascii(str(words)))[1:60]


COMMANDS = list(command_lines())
FIELDS = list(fields())
FOLDERS = [(kind, name) for kind in ("text", "images", "speech", "translation") for name in damaged_folders()]


@pytest.fixture(autouse=True)
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    whole, load = data.load("digits"), data.load
    few = dataclasses.replace(
        whole,
        train_x=whole.train_x[:64],
        train_y=whole.train_y[:64],
        test_x=whole.test_x[:32],
        test_y=whole.test_y[:32],
    )
    monkeypatch.setattr(
        data, "load", lambda n, f=None, **o: few if n == "digits" and f is None and not o else load(n, f, **o)
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    threads, before = torch.get_num_threads(), signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    torch.set_num_threads(threads)


def complete(words: list[str]) -> list[str]:
    """The command with what else it needs, and small."""
    name, flag = words
    given = {"--model": "digits_cnn", "--data": "digits", "--epochs": "1", "--max-steps": "1", "--batch-size": "16"}
    given |= {"--max-test-batches": "1"}
    needed = {
        "train": given | {"--recipe": "fp32", "--out": "run"},
        "compare": given | {"--recipes": "fp32", "--seeds": "0", "--out": "runs"},
        "explain": {"--model": "digits_cnn", "--input": "1x8x8"},
        "memory": {"--model": "digits_cnn", "--input": "1x8x8", "--batch-size": "2"},
        "fidelity": {"--run": "nowhere"},
        "export": {"--folder": "nowhere"},
        "evaluate": {"--run": "nowhere"},
        "reproduce": {"--what": "questions", "--row": "radix", "--scale": "smoke", "--columns": "nothing"},
        "conform": {"--name": "nothing:nothing"},
        "report": {"--paths": "nowhere"},
    }.get(name, {})
    return [name, flag, *(f"{k}={v}" for k, v in needed.items() if k != flag.partition("=")[0])]


def check(code: int, error: str, sure: bool) -> None:
    assert code in ((2,) if sure else (0, 2)), error
    if code:
        lines = error.splitlines()
        told = [line for line in lines if line.startswith("fourbit: ") and not line.startswith("fourbit: warning")]
        assert len(told) == 1 and told[0] == lines[-1], error
        assert "Traceback" not in error


@pytest.mark.parametrize("case", sampled(COMMANDS, [named(" ".join(words)) for words, _ in COMMANDS]))
def test_a_bad_value_of_any_flag(capsys, case):
    words, sure = case
    code = main(complete(words))
    check(code, capsys.readouterr().err, sure)


@pytest.mark.parametrize("case", sampled(FIELDS, [f"{f}-{named(repr(v))}" for _, f, v, _ in FIELDS]))
def test_a_bad_value_of_any_field(case, tmp_path):
    cls, field, value, sure = case
    tiny = {k: v for k, v in TINY.items() if k in {f.name for f in dataclasses.fields(cls)}}
    tiny |= {"out": tmp_path / "run"} | ({"recipes": ("fp32",), "seeds": (0,)} if cls is CompareConfig else {})
    act = train if cls is TrainConfig else compare
    with pytest.raises(UserError) if sure else suppress(UserError):
        act(cls(**(tiny | {field: value})))


@pytest.mark.parametrize("case", sampled(FOLDERS, [f"{kind}-{name}" for kind, name in FOLDERS]))
def test_damaged_data(capsys, tmp_path, case):
    kind, name = case
    (tmp_path / "data").mkdir()
    damaged_folders()[name](tmp_path / "data")
    flags = [
        "--epochs=1",
        "--max-steps=1",
        "--batch-size=2",
        "--no-progress",
        "--log-to=none",
        "--max-test-batches=1",
    ]
    flags += ["--observe-every=0", "--threads=1", "--out=run"]
    model = models.names(kind.removesuffix("s"))[0]
    code = main(["train", f"--model={model}", f"--data={kind}", "--data-dir=data", "--recipe=fp32", *flags])
    check(code, capsys.readouterr().err, False)


def test_there_are_as_many_cases_as_is_said():
    assert len(COMMANDS) > 300 and len(FIELDS) > 300 and len(FOLDERS) > 100
