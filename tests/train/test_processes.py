"""Two processes that share every batch, started as a user would."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

OPTIONS = ("--model", "digits_cnn", "--data", "digits", "--recipe", "fp32", "--epochs", "1", "--no-progress")
OPTIONS += ("--batch-size", "128", "--eval-batch-size", "359", "--threads", "1", "--no-augment")


def final(out) -> dict:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if line["kind"] == "final")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed training")
def test_two_processes_train_as_one_does(tmp_path):
    """The last test batch has one image, so the second process gets none of it."""
    started = {}
    for name, launcher in (
        ("one", ()),
        ("two", ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")),
    ):
        command = [sys.executable, "-m", *launcher, "fourbit", "train", *OPTIONS, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        started[name] = final(tmp_path / name)
    one, two = started["one"], started["two"]
    assert one["step"] == two["step"] and two["stopped"] == "done"
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
    assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.006)
