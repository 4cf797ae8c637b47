"""Two processes that share every batch, started as a user would."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fourbit.cli import main

COMMAND = ("train", "--model", "digits_cnn", "--data", "digits", "--recipe", "fp32", "--epochs", "1", "--no-progress")
COMMAND += ("--batch-size", "128", "--eval-batch-size", "359", "--threads", "1", "--no-augment", "--no-tensorboard")


@pytest.fixture(autouse=True)
def small_data() -> None:
    """All digits: the other processes have no fewer."""


def final(out) -> dict:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if line["kind"] == "final")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed training")
def test_two_processes_train_as_one_does(tmp_path):
    """The last test batch has one image, so the second process gets none of it."""
    assert main([*COMMAND, "--out", str(tmp_path / "one")]) == 0
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fourbit")
    command = [sys.executable, "-m", *launcher, *COMMAND, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = (final(tmp_path / name) for name in ("one", "two"))
    assert one["step"] == two["step"] and two["stopped"] == "done"
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
    assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.006)
