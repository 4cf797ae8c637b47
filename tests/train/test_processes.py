"""Two processes that share every batch, started as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fourbit as fb
from fourbit.cli import main
from fourbit.train._config import TrainConfig
from fourbit.train._session import _steps_per_epoch

COMMAND = ("train", "--model", "digits_cnn", "--data", "digits", "--recipe", "fp32", "--epochs", "1", "--no-progress")
COMMAND += ("--batch-size", "128", "--eval-batch-size", "359", "--threads", "1", "--no-augment", "--log-to=none")


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


def test_a_batch_that_processes_cannot_share_equally_is_refused_with_those_that_they_can():
    """The parts of a session that the refusal looks at."""
    for batch_size, number, choices in ((10, 4, "give 8 or 12"), (3, 4, "give 4.")):
        with pytest.raises(fb.UserError, match=choices):
            _steps_per_epoch(TrainConfig(batch_size=batch_size), None, number)


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


LONGER = [*("3" if word == "1" and COMMAND[n - 1] == "--epochs" else word for n, word in enumerate(COMMAND))]
LONGER += ["--observe-every", "0", "--log-every", "1"]


def kill_second_worker(out: Path, *command: str, restarts: int) -> tuple[subprocess.Popen, list[int]]:
    """A run in two processes, the second of which is killed behind the first checkpoint."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts))
    command = (sys.executable, "-m", *launcher, "-m", "fourbit", *command, "--out", str(out))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not (out / "checkpoint" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    return process, workers


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_worker_that_is_killed_ends_the_others_and_the_run_goes_on_with_another_number(tmp_path):
    assert main([*LONGER, "--out", str(tmp_path / "one")]) == 0
    process, workers = kill_second_worker(tmp_path / "two", *LONGER, restarts=0)
    killed = time.monotonic()
    process.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert main([*LONGER, "--out", str(tmp_path / "two"), "--resume"]) == 0
    one, two = (final(tmp_path / name) for name in ("one", "two"))
    assert one["step"] == two["step"] and two["stopped"] == "done"
    # Two processes normalize batches of half the size, so the first epoch is a little different.
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_run_that_torchrun_starts_again_ends_as_an_undisturbed_one(tmp_path):
    """Restarted processes found addresses of those before them, if they came first, and waited for half an hour."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fourbit")
    subprocess.run([*launcher, *LONGER, "--out", str(tmp_path / "whole")], check=True, capture_output=True, timeout=300)
    process, _ = kill_second_worker(tmp_path / "killed", *LONGER, restarts=3)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-4000:]
    whole, killed = (final(tmp_path / name) for name in ("whole", "killed"))
    for key in ("step", "stopped", "test_loss", "test_accuracy"):
        assert whole[key] == killed[key]
