"""A machine that runs out of something: one sentence, exit code 2, and the run goes on later as if nothing had been."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Iterator

import pytest
import torch
from run_files import metrics, tensors

from fourbit.cli import main
from fourbit.train import TrainConfig, train
from fourbit.train._loop import Loop

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def command(config: TrainConfig, *extra: str) -> list[str]:
    return shlex.split(config.command(*extra))[1:]


def fails(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fourbit: ")
    return error


@pytest.mark.parametrize("size", [300, 1500, 20_000])
def test_files_that_may_not_grow(make_config, capsys, size):
    whole, parts = make_config("whole"), make_config("parts")
    train(whole)
    with limited(resource.RLIMIT_FSIZE, size):
        assert "could not be written (File too large)" in fails(capsys, command(parts))
    begun = (parts.out / "config.json").exists()
    assert main(command(parts, *(["--resume"] if begun else []))) == 0
    assert tensors(parts.out) == tensors(whole.out)
    assert metrics(parts.out) == metrics(whole.out)


def test_files_that_may_not_be_opened(make_config, capsys):
    train(make_config("whole"))
    parts = make_config("parts")
    lowest = os.dup(0)
    os.close(lowest)
    with limited(resource.RLIMIT_NOFILE, lowest):
        assert "Too many open files" in fails(capsys, command(parts))
    assert main(command(parts)) == 0
    assert tensors(parts.out) == tensors(parts.out.parent / "whole")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_can_no_longer_be_written(make_config, capsys, monkeypatch, number):
    config = make_config()
    with monkeypatch.context() as patch:
        replace, calls = os.replace, []

        def refuse(*args: object) -> None:
            calls.append(args)
            if len(calls) > 1:
                raise OSError(number, os.strerror(number))
            replace(*args)

        patch.setattr(os, "replace", refuse)
        assert "could not be written" in fails(capsys, command(config))
    assert main(command(config, "--resume")) == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), marks=pytest.mark.slow),
        pytest.param(RuntimeError("could not create a primitive"), marks=pytest.mark.slow),
        pytest.param(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), marks=pytest.mark.slow),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_full(make_config, capsys, monkeypatch, error):
    whole, parts = make_config("whole"), make_config("parts")
    train(whole)
    with monkeypatch.context() as patch:
        step = Loop._step

        def full(self: Loop, *args: object) -> None:
            if self.state.step == 4:
                raise error
            step(self, *args)

        patch.setattr(Loop, "_step", full)
        assert "there was not enough memory" in fails(capsys, command(parts))
    assert main(command(parts, "--resume")) == 0
    assert tensors(parts.out) == tensors(whole.out)


def test_memory_that_no_machine_has(capsys):
    error = fails(capsys, ["explain", "--model", "digits_cnn", "--input", "1x9999999x9999999"])
    assert "cannot be made" in error and "take a smaller one" in error
