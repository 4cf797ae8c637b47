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
