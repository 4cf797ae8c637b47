"""The programs of `examples/` run as they are, and reach what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"hf_trainer.py": "transformers", "lightning_module.py": "lightning"}

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
