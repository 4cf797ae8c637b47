"""The programs of `examples/` run as they are, and reach what they say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "hf_trainer.py": "transformers",
    "lightning_module.py": "lightning",
    "export.py": "onnxruntime",
    "own_loop.py": "sklearn",
}

pytestmark = pytest.mark.slow


def printed(name: str, *arguments: str) -> str:
    pytest.importorskip(NEEDS[name])
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout


@pytest.mark.parametrize("recipe", ["ibm2020", "luq"])
def test_the_model_that_was_loaded_has_the_loss_of_the_one_that_was_trained(recipe):
    mine, loaded = map(
        float, re.search(r"trained model (\S+), of the loaded one (\S+)", printed("hf_trainer.py", recipe)).groups()
    )
    assert mine == loaded < 3  # 61 numbers by chance: 4.1


@pytest.mark.parametrize("recipe", ["ibm2020", "mxfp4-ceil-sr-g"])
def test_lightning_tells_two_arms_apart(recipe):
    assert float(printed("lightning_module.py", recipe).split()[-1]) > 0.9


def last_line(text: str) -> tuple[float, float]:
    """Loss and test accuracy of the last epoch."""
    loss, accuracy = re.findall(r"last loss (\S+), test accuracy (\S+)%", text)[-1]
    return float(loss), float(accuracy)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_sharded_processes_start_again_when_one_is_killed_and_another_number_goes_on(tmp_path):
    pytest.importorskip("sklearn")

    def launched(world: int, folder: str, *arguments: str) -> list[str]:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
            "--max-restarts",
            "3",
        ]
        return [sys.executable, *launcher, str(EXAMPLES / "fsdp2.py"), str(tmp_path / folder), *arguments]

    alone = subprocess.run(launched(1, "alone"), capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr[-1500:]
    agent = subprocess.Popen(
        launched(2, "killed", "--epochs", "4"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "1" / ".metadata").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    out, err = agent.communicate(timeout=200)
    assert agent.returncode == 0, err[-8000:]
    assert "with 2 processes" in out
    after = subprocess.run(launched(1, "killed"), capture_output=True, text=True, timeout=300)
    assert "goes on from epoch 4 with 1 processes" in after.stdout, after.stderr[-1500:]
    (loss, accuracy), (expected, as_well) = last_line(after.stdout), last_line(alone.stdout)
    assert accuracy == pytest.approx(as_well, abs=1.5) and accuracy > 90
    assert loss == pytest.approx(expected, abs=0.1)


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_in_one_sentence(tmp_path):
    pytest.importorskip("sklearn")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(EXAMPLES / "fsdp2.py")]
    done = subprocess.run([sys.executable, *launcher, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "3 processes cannot share a batch of 64 equally: start a number that divides it." in done.stderr


def test_a_loop_of_ones_own_learns_digits():
    assert float(re.findall(r"test accuracy (\S+)%", printed("own_loop.py"))[-1]) > 85


def test_the_export_has_the_accuracy_of_the_model(tmp_path):
    pytest.importorskip("onnx")
    said = re.search(
        r"model (\S+)%, of the export (\S+)%; logits differ by (\S+) ", printed("export.py", str(tmp_path / "e"))
    )
    mine, exported, far = map(float, said.groups())
    assert mine > 85 and abs(mine - exported) < 1 and (tmp_path / "e" / "README.md").exists()
    assert far < 0.3  # one number beside a decision point may fall to its other side
