"""The Triton kernels on a machine without a GPU: in Triton's interpreter against the reference, and compiled for Hopper.

Each runs in a process of its own, because Triton decides at import whether it interprets. Triton is no dependency of a CPU
installation: without it these tests are skipped. On a GPU, `make gpu-check` runs the same checks.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton==3.6.0"),
]


def run(script: str, *arguments: str, interpret: bool) -> None:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_every_kernel_equals_the_reference_bit_for_bit():
    run("parity.py", "--device", "cpu", "--sizes", "small", "--quiet", interpret=True)


def test_layers_and_short_trainings_equal_the_reference():
    run("parity_layers.py", "--device", "cpu", "--quiet", interpret=True)


def test_every_kernel_compiles_for_hopper_to_code_that_rounds_as_written():
    run("parity_compiled.py", interpret=False)
