"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the bounds tests and part of the parity tests again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit.kernels.cpu._build import BuildError, build, compiler

HERE = Path(__file__).parent
FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",  # half the time to compile
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for a process with sanitized kernels."""
    try:
        command = compiler().split()
        printed = subprocess.run(
            [*command, "-print-file-name=libasan.so"], capture_output=True, text=True
        ).stdout.strip()
        if sys.platform != "linux" or not Path(printed).is_absolute():  # the name alone: not found
            pytest.skip(f"{command[0]} has no libasan.so")
        built = build(tmp_path_factory.mktemp("kernels") / "sanitized.so", FLAGS)
        library = (
            "-print-file-name=libstdc++.so.6"  # beside the sanitizer, or exceptions that torch throws end the process
        )
        runtime = subprocess.run([*command, library], capture_output=True, text=True).stdout.strip()
    except BuildError as error:
        pytest.skip(f"no sanitized build: {error}")
    return {
        **os.environ,
        "FOURBIT_CPU_LIBRARY": str(built),
        "LD_PRELOAD": f"{printed}:{runtime}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin take the cores from those that work
    }


@pytest.mark.slow
def test_the_kernels_run_clean_under_the_sanitizers(environment):
    names = "kernel_bounds", "kernel_rounding", "kernel_products", "cpu_convolve", "cpu_lstm", "round_tiles"
    tests = [str(HERE / f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
    found = [line for line in ran.stderr.splitlines() if "ERROR" in line or "runtime error" in line or "    #" in line]
    assert ran.returncode == 0, (ran.stderr[:3000], found[:8], ran.stdout[-2000:])


FUZZED = int(os.environ.get("FOURBIT_FUZZ_CALLS", "20000"))
"""Calls with odd arguments; so many take about two minutes."""


@pytest.mark.slow
def test_odd_arguments_make_no_kernel_leave_its_tensors(environment):
    half = FUZZED // 2
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE / "fuzz_arguments.py"), str(half), str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 10**7)
    ]
    for process in running:
        printed, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        assert printed.splitlines()[-1] == f"calls {half}"


@pytest.mark.slow
def test_the_sanitizer_would_find_an_output_that_is_too_short(environment):
    """Otherwise the test above would prove nothing."""
    code = (
        "import ctypes, torch\n"
        "from fourbit.kernels.cpu import _structures as c, library\n"
        "x, out = torch.ones(128), torch.empty(127, dtype=torch.int8)\n"
        "library().clip(ctypes.byref(c.Clip(x=x.data_ptr(), n=128, inv_scale=1, low=-7, high=7, codes=out.data_ptr())))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode != 0 and "AddressSanitizer" in ran.stderr
