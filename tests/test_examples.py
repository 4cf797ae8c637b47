"""The programs of `examples/` run as they are, and reach what they say."""

from __future__ import annotations

import re
import subprocess
import sys
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


DIES = """
import os, runpy, signal, sys
import torch.distributed.checkpoint as checkpoint

save = checkpoint.save

def saved(*arguments, **named):
    save(*arguments, **named)  # returns in all processes when the checkpoint is whole
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save = saved
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A program whose second process is killed behind the first checkpoint, the first time that it runs."""


def launched(world: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    """By torchrun. The limit of time is against a standstill: on a busy machine the programs may take minutes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "--max-restarts", "3"]
    return subprocess.run([sys.executable, *launcher, *map(str, program)], capture_output=True, text=True, timeout=900)


def test_sharded_processes_start_again_when_one_is_killed_and_another_number_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    example, dies = EXAMPLES / "fsdp2.py", tmp_path / "dies.py"
    dies.write_text(DIES)
    whole = launched(2, example, tmp_path / "whole", "--epochs", "4")
    assert whole.returncode == 0, whole.stderr[-8000:]
    killed = launched(2, dies, example, tmp_path / "killed", "--epochs", "4")
    assert killed.returncode == 0, killed.stderr[-8000:]
    assert "goes on from epoch 1 with 2 processes" in killed.stdout
    epochs = [line for line in killed.stdout.splitlines() if line.startswith("epoch")]
    assert epochs == whole.stdout.splitlines() and len(epochs) == 4
    after = launched(1, example, tmp_path / "killed")
    found = re.search("goes on from epoch 4 with 1 processes, test accuracy (.*)%", after.stdout)
    assert found, after.stderr[-8000:]
    (before, *_), last = (re.findall("test accuracy (.*)%", text) for text in (epochs[-1], after.stdout))
    assert float(found[1]) == pytest.approx(float(before), abs=0.3)  # one of 360 digits, by another order of sums
    assert float(last[-1]) > 90


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_in_one_sentence(tmp_path):
    pytest.importorskip("sklearn")
    done = launched(3, EXAMPLES / "fsdp2.py", tmp_path)
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
