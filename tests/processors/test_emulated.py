"""Processors without AVX-512, and without AVX: small tests, all in one emulated process.

There torch and the kernels choose by what the emulated processor says it has; an instruction that it lacks ends the process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import isas

from fourbit.kernels.cpu._library import ISAS

EMULATOR = "qemu-x86_64"
PROCESSORS = {"Haswell": "avx2", "Nehalem": "portable"}
"""By the emulator's names, with the widest instruction set of the kernels there."""
ROOT = Path(__file__).parents[2]
FILES = ("tests/processors/test_training.py", "tests/kernels/test_kernel_bounds.py")
CHOSEN = "test_training or 129 or test_a_matrix_product or test_a_convolution"
"""Of the second file, one size around blocks for each function."""
WIDER = {  # a function that moves a register of 512 or 256 bits to itself, and returns
    "Haswell": "62 f1 7c 48 10 c0 c3",
    "Nehalem": "c5 fc 10 c0 c3",
}

pytestmark = [
    pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"no {EMULATOR}: apt-get install qemu-user"),
    pytest.mark.skipif("avx2" not in isas(), reason="no kernels for x86 processors to emulate"),
]


def emulated(processor: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("FOURBIT_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    return subprocess.run(
        [EMULATOR, "-cpu", processor, sys.executable, *arguments],
        env=environment | {"OMP_NUM_THREADS": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_training_and_kernels_run_where_instructions_are_missing(processor):
    plain = ("-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider", "-v")
    ran = emulated(processor, "-m", "pytest", *plain, *FILES, "-k", CHOSEN)
    assert ran.returncode == 0, (ran.returncode, ran.stdout[-3000:], ran.stderr[-3000:])
    passed = re.findall(r"::(\w+)\[(\S+)\] PASSED", ran.stdout)
    there = set(ISAS[: ISAS.index(PROCESSORS[processor]) + 1])
    for name in ("test_steps_agree_with_the_reference", "test_clip_keeps_to_its_codes_packed_codes_and_mask"):
        assert {isa for found, key in passed for isa in ISAS if found == name and isa in key.split("-")} == there


@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_instruction_that_the_processor_lacks_would_end_the_process(processor):
    code = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex(sys.argv[1]))
print("before", flush=True)
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
print("after", flush=True)
"""
    assert emulated(processor, "-c", code, "c3").stdout.split() == ["before", "after"]
    ran = emulated(processor, "-c", code, WIDER[processor])
    assert ran.returncode != 0 and ran.stdout.split() == ["before"], ran
