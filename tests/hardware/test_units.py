"""Every unit's circuit against exact arithmetic."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest

pytest.importorskip("amaranth")
if importlib.util.find_spec("pyosys") is None:
    pytest.skip("pyosys is not installed", allow_module_level=True)

from fourbit.hardware import FLOATS, UNITS, Design, InnerProduct, mismatch, simulate, simulate_netlist


@pytest.mark.parametrize("name", UNITS)
def test_the_circuit_equals_exact_arithmetic(name, tmp_path):
    unit = UNITS[name]
    vectors = unit.vectors(random.Random(0), 10_000)
    assert mismatch(unit, vectors, simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)) is None


@pytest.mark.parametrize("name", ["fma_fp16", "int4_fp4", "mxfp4"])
def test_pipelined_it_computes_the_same(name, tmp_path):
    unit = replace(UNITS[name], cuts=UNITS[name].stages)
    vectors = unit.vectors(random.Random(1), 1000)
    assert mismatch(unit, vectors, simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)) is None


@pytest.mark.parametrize("name", ["fma_fp16", "fp8"])
def test_amaranth_s_own_simulator_agrees(name):
    unit = UNITS[name]
    vectors = unit.vectors(random.Random(2), 60)
    assert mismatch(unit, vectors, simulate(unit, vectors)) is None
    cut = replace(unit, cuts=("multiply", "add"))
    assert mismatch(cut, vectors, simulate(cut, vectors)) is None


MULTIPLIERS = [u for u in UNITS.values() if isinstance(u, InnerProduct) and u.ways > 1 and u.scale is None]


@pytest.mark.parametrize("unit", MULTIPLIERS, ids=lambda u: u.name)
def test_every_pair_of_codes_is_multiplied_exactly(unit, tmp_path):
    one = replace(unit, ways=1) if unit.style == "exact" else unit
    a, b = one.operands
    codes = product(range(2**a.bits), range(2**b.bits))
    pairs = [(i, j) for i, j in codes if a.values[i] == a.values[i] and b.values[j] == b.values[j]]
    vectors = [{"a": i, "b": j, "c": 0} for i, j in pairs]
    assert mismatch(one, vectors, simulate_netlist(Design(one, tmp_path).gates(), one, vectors)) is None


def test_a_wrong_rounding_bit_is_caught(tmp_path, monkeypatch):
    from fourbit.hardware.units import _inner, _round

    def wrong(*arguments):
        code = _round.normalise_and_round(*arguments)
        return code ^ 1

    monkeypatch.setattr(_inner, "normalise_and_round", wrong)
    unit = UNITS["int4_fp4"]
    vectors = unit.vectors(random.Random(0), 20)
    assert mismatch(unit, vectors, simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)) is not None


@pytest.mark.parametrize("name", ["fp16_169", "binary16", "fp8_143", "fp8_152", "fp8_e4m3fn", "fp8_e5m2"])
def test_rounding_is_that_of_the_formats(name):
    from fractions import Fraction

    from fourbit import formats

    f, format = FLOATS[name], formats.get(name)
    for code in range(2**f.bits):
        if f.is_finite(code):
            assert float(f.value(code)) == format.values[code]
    rng = random.Random(0)
    grid = format.grid
    for _ in range(3000):
        k = rng.randrange(len(grid) - 1)
        middle = (Fraction(grid[k]) + Fraction(grid[k + 1])) / 2
        x = rng.choice(
            [middle, middle + Fraction(rng.randint(-9, 9), 2**40), middle * rng.choice([1, 3, Fraction(1, 3)])]
        )
        value = format.round(float(x)) if Fraction(float(x)) == x else None
        if value is not None and abs(value) != float("inf"):
            assert float(f.value(f.encode(x))) == value, (x, value)


def test_yosys_leaves_the_way_libraries_are_loaded_alone():
    """Otherwise kernels that torch.compile makes afterwards call one another."""
    code = (
        "import sys\n"
        "before = sys.getdlopenflags()\n"
        "from fourbit.hardware._synthesis import require_yosys\n"
        "require_yosys()\n"
        "assert 'pyosys' in sys.modules and sys.getdlopenflags() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
