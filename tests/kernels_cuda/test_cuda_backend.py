"""What importing costs, and what the backend says of a machine without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fourbit import backends, formats
from fourbit.kernels.cuda import _grids
from fourbit.quantizers import Binary, grid_of


def test_the_backend_is_known_by_name_and_its_absence_is_no_fault():
    found = {status.name: status for status in backends.statuses()}["cuda"]
    assert found.available or not found.needed
    if torch.version.cuda is None:
        assert "without CUDA" in found.detail


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_no_kernel_is_imported_or_registered():
    code = (
        "import sys; from fourbit import backends; found = {k.backend for k in backends.kernels()};"
        "assert 'cuda' not in found, found; assert 'triton' not in sys.modules;"
        "assert not any(m.startswith('fourbit.kernels.cuda._quant') for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_grid_whose_quanta_overflow_when_added_is_not_rounded_by_adding():
    wide = formats.FloatFormat("wide", exponent_bits=7, mantissa_bits=4, exponent_bias=12)
    assert wide.max > 2.0**110 and isinstance(grid_of(wide), Binary)
    assert _grids.parameters(wide) is None
    assert _grids.parameters(formats.FP16_169) is not None


def test_every_catalogued_format_of_eight_bits_has_a_kernel():
    for format in formats.CATALOG.values():
        if format.bits <= 8:
            assert _grids.parameters(format) is not None
            assert _grids.parameters(format, stochastic=True) is not None


def test_tables_hold_the_levels_after_their_boundaries():
    grid = _grids.parameters(formats.INT4_MIDRISE)
    assert grid is not None and grid[:2] == ("table", 4)
    table = _grids.table(formats.INT4_MIDRISE, torch.device("cpu"))
    assert table.numel() == 33 and table[16:32].tolist() == list(formats.INT4_MIDRISE.grid)
    assert bool(table[15].isinf()) and bool((table[:15].diff() > 0).all())


CHECK = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_in_one_sentence_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1 and "NVIDIA GPU" in done.stdout


def test_gpu_check_fails_when_a_parity_check_did_and_reports_what_it_found(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    good = {
        "parity": {"checks": {"a": "ok", "b": "not run"}, "seconds": 1.0},
        "products": {"error": "x", "seconds": 1.0},
    }
    bad = {"parity": {"checks": {"a": "wrong by far"}, "seconds": 1.0}}
    broken = {"layers": {"error": "stopped", "seconds": 1.0}}
    assert [module.failed(sections) for sections in (good, bad, broken)] == [False, True, True]
    rows = [{"what": "copy", "GB/s": 3000.4}, {"what": "PACT", "GB/s": 2.5}, {"kernel": "k", "ms": 1.0}]
    text = module.report(
        {"device": "d", "torch": "t", "triton": "v", "sections": {**bad, "rows": {"rows": rows, "seconds": 1}}}
    )
    assert "wrong by far" in text and "| copy | 3000 |" in text and "| kernel | ms |" in text
