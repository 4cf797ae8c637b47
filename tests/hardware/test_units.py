"""Every unit's circuit against exact arithmetic."""

from __future__ import annotations

import importlib.util
import inspect
import random
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest

pytest.importorskip("amaranth")
if importlib.util.find_spec("pyosys") is None:
    pytest.skip("pyosys is not installed", allow_module_level=True)

from fourbit.hardware import (
    FLOATS,
    UNITS,
    Converter,
    Design,
    InnerProduct,
    Quantizer,
    mismatch,
    simulate,
    simulate_netlist,
)

# Of each kind of circuit one, or two, is simulated in the fast suite.
QUICK = [
    "fma_fp16",
    "fma_bf16",
    "int4_fp4",
    "uint4_int4",
    "int4_fp8",
    "mxfp4",
    "int4_fp4_fixed",
    "converter",
    "quantize_fp4",
    "quantize_luq",
    "hadamard",
]
EVERY_CIRCUIT = [(name, 500) for name in QUICK]
EVERY_CIRCUIT += [pytest.param(name, 10_000, marks=pytest.mark.slow) for name in UNITS]


@pytest.mark.parametrize(("name", "num"), EVERY_CIRCUIT)
def test_the_circuit_equals_exact_arithmetic(name, num, tmp_path):
    unit = UNITS[name]
    vectors = unit.vectors(random.Random(0), num)
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
MULTIPLIERS = [u for u in MULTIPLIERS if u.ways <= 4 or u.style != "exact"]  # which would be the same with one way


@pytest.mark.parametrize(
    "unit",
    [
        pytest.param(u, id=u.name, marks=() if u.name in ("int4_int4", "int4_fp4", "uint4_fp4") else pytest.mark.slow)
        for u in MULTIPLIERS
    ],
)
def test_every_pair_of_codes_is_multiplied_exactly(unit, tmp_path):
    one = replace(unit, ways=1) if unit.style == "exact" else unit
    a, b = one.operands
    codes = product(range(2**a.bits), range(2**b.bits))
    pairs = [(i, j) for i, j in codes if a.values[i] == a.values[i] and b.values[j] == b.values[j]]
    vectors = [{"a": i, "b": j, "c": 0} for i, j in pairs]
    assert mismatch(one, vectors, simulate_netlist(Design(one, tmp_path).gates(), one, vectors)) is None


WRONG = {
    "a tie goes up": ("up_positive = guard & (live.some | sticky | odd)", "up_positive = guard"),
    "nothing goes up": ("up_positive = guard & (live.some | sticky | odd)", "up_positive = guard & 0"),
    "places below are forgotten": ("guard & (live.some | sticky | odd)", "guard & (live.some | odd)"),
    "half of the smallest goes up": ("Mux(tiny, just_below & more,", "Mux(tiny, just_below,"),
    "the smallest is lost": ("Mux(code == 0, 1, body)", "body"),
}


@pytest.fixture(scope="module")
def many_vectors() -> list[dict[str, int]]:
    return UNITS["fma_fp16"].vectors(random.Random(0), 10_000)


@pytest.mark.parametrize("fault", list(WRONG))
def test_a_wrong_rounding_bit_is_caught(fault, many_vectors, tmp_path, monkeypatch):
    """Single faults of the rounder, in the source of the circuit, under the vectors of every test of a unit."""
    from fourbit.hardware.units import _inner, _round

    source, (right, wrong) = inspect.getsource(_round), WRONG[fault]
    assert source.count(right) == 1
    module = dict(vars(_round))
    exec(compile(source.replace(right, wrong), _round.__file__, "exec", dont_inherit=True), module)
    unit, vectors = UNITS["fma_fp16"], many_vectors
    monkeypatch.setattr(_inner, "normalise_and_round", module["normalise_and_round"])
    assert mismatch(unit, vectors, simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)) is not None


@pytest.mark.parametrize("name", ["fp16_169", "binary16", "fp8_143", "fp8_152", "fp8_e4m3fn", "fp8_e5m2"])
def test_rounding_is_that_of_the_formats(name):

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


QUANTIZERS = [u for u in UNITS.values() if isinstance(u, Quantizer) and not u.stochastic]


@pytest.mark.parametrize(
    "unit",
    [
        pytest.param(u, id=u.name, marks=() if u.name in ("quantize_fp4", "quantize_int4") else pytest.mark.slow)
        for u in QUANTIZERS
    ],
)
def test_every_code_is_quantized_as_the_format_says(unit, tmp_path):
    """Also against `Format.round` in floating point, which is exact for these numbers."""
    scale = 3 if unit.scale == "power" else unit.float.encode(Fraction(2.375))
    vectors = [{"x": x, "s": scale} for x in range(2**unit.float.bits)]
    found = simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)
    assert mismatch(unit, vectors[::7], found[::7]) is None
    factor = 8.0 if unit.scale == "power" else 2.375
    for v, got in zip(vectors, found, strict=True):
        if unit.float.is_finite(v["x"]):
            x = float(unit.float.value(v["x"])) * factor
            for f in unit.targets:
                assert got[f.name] == f.encode(f.round(x)), (v, f.name)


def test_every_number_of_a_short_register_is_converted_exactly(tmp_path):
    unit = Converter("short", width=15, lsb=-6)
    vectors = [{"x": x} for x in range(2**15)]
    assert mismatch(unit, vectors, simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)) is None


@pytest.mark.parametrize(
    ("name", "num"),
    [
        ("int4_fp4", 500),
        *(
            pytest.param(name, 5000, marks=pytest.mark.slow)
            for name in ("fma_fp16", "fma_binary16", "fma_bf16", "int4_fp4", "mxfp4")
        ),
    ],
)
@pytest.mark.parametrize("cuts", [(), ("multiply",)])
def test_anticipated_zeros_change_no_sum(name, cuts, num, tmp_path):
    unit = replace(UNITS[name], anticipate=True, cuts=cuts)
    vectors = unit.vectors(random.Random(3), num)
    assert mismatch(unit, vectors, simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)) is None


def test_powers_of_two_in_the_lowest_binade_are_not_flushed(tmp_path):
    """The sum -2^-126 is all ones where negative sums are inverted, one binade lower."""
    unit = UNITS["fma_bf16"]
    vectors = [{"a": 17599, "b": 1714, "c": 2349125121}, {"a": 9823, "b": 9554, "c": 2352410113}]
    assert [unit.reference(v)["y"] for v in vectors] == [0x80800000] * 2
    assert mismatch(unit, vectors, simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)) is None


def test_random_bits_are_those_of_xorshift():
    state, seen = 1, set()
    for _ in range(1000):
        state = UNITS["random"].reference({"state": state})["next"]
        seen.add(state)
    assert len(seen) == 1000 and next(iter({UNITS["random"].reference({"state": 1})["next"]})) == 270369


def test_a_stochastic_quantizer_is_right_on_average(tmp_path):
    """1.25 becomes 2 in a quarter of the cases, and 1 else; 0.25 becomes 1 in a quarter."""
    unit = UNITS["quantize_luq"]
    one = unit.float.encode(Fraction(1))
    for x in (Fraction(5, 4), Fraction(1, 4)):
        vectors = [{"x": unit.float.encode(x), "s": one, "random": word} for word in range(4096)]
        found = simulate_netlist(Design(unit, tmp_path).gates(), unit, vectors)
        mean = sum(unit.targets[0].values[v["fp4_r2"]] for v in found) / 4096
        assert mean == float(x)
