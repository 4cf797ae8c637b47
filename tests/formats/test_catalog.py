"""Every format of the catalogue over all of its codes, against closed forms and independent libraries."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
from gfloat import decode_float

from fourbit import formats
from fourbit.errors import UserError

ALL = [formats.get(name) for name in formats.names()]
BY_ML_DTYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e3m4": ml_dtypes.float8_e3m4,
    "fp8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "bfloat16": ml_dtypes.bfloat16,
    "binary16": np.float16,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "int2": ml_dtypes.int2,
    "int8": np.int8,
}
BY_GFLOAT = {
    "fp4_e2m1": gf.format_info_ocp_e2m1,
    "fp6_e2m3": gf.format_info_ocp_e2m3,
    "fp6_e3m2": gf.format_info_ocp_e3m2,
    "fp8_e4m3fn": gf.format_info_ocp_e4m3,
    "fp8_e5m2": gf.format_info_ocp_e5m2,
    "e8m0": gf.format_info_ocp_e8m0,
    "binary16": gf.format_info_binary16,
    "bfloat16": gf.format_info_bfloat16,
}


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("format", ALL, ids=str)
def test_every_code_decodes_to_a_number_that_encodes_back_to_the_same_number(format):
    assert len(format.values) == 2**format.bits
    for value in format.values[:: 1 if format.bits <= 8 else 7]:
        if math.isfinite(value):
            assert format.round(value) == value
            assert format.values[format.encode(value)] == value
            assert math.copysign(1, format.round(value)) == 1 or value < 0  # no -0.0


@pytest.mark.parametrize("format", ALL, ids=str)
def test_the_grid_ascends_and_each_decision_point_lies_between_its_neighbors(format):
    grid, points = format.grid, format.decision_points
    assert list(grid) == sorted(set(grid))
    assert len(points) == len(grid) - 1 == len(format.ties_up)
    step = 1 if format.bits <= 8 else 5
    for i in range(0, len(points), step):
        low, point, high = grid[i], points[i], grid[i + 1]
        assert low < point < high
        assert format.round(math.nextafter(point, math.inf)) == high
        assert format.round(math.nextafter(point, -math.inf)) == low
        assert format.round(point) == (high if format.ties_up[i] else low)


@pytest.mark.parametrize("name", sorted(BY_ML_DTYPES))
def test_codes_agree_with_ml_dtypes(name):
    format, dtype = formats.get(name), BY_ML_DTYPES[name]
    codes = np.arange(2**format.bits, dtype=np.uint16 if format.bits == 16 else np.uint8)
    theirs = codes.view(dtype) if codes.dtype.itemsize == np.dtype(dtype).itemsize else codes
    for code, value in zip(codes, theirs.astype(np.float64), strict=True):
        assert same(format.decode(int(code)), float(value)), code


@pytest.mark.parametrize("name", sorted(BY_GFLOAT))
def test_codes_agree_with_gfloat(name):
    format, info = formats.get(name), BY_GFLOAT[name]
    for code in range(0, 2**format.bits, 1 if format.bits <= 8 else 11):
        assert same(format.decode(code), decode_float(info, code).fval), code


@pytest.mark.parametrize(
    "name", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e3m4", "fp8_e4m3fn", "fp8_e5m2", "bfloat16", "binary16"]
)
def test_rounding_agrees_with_ml_dtypes_over_all_bfloat16_inputs_in_range(name):
    format, dtype = formats.get(name), BY_ML_DTYPES[name]
    inputs = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    inputs = inputs[np.abs(inputs) <= format.max]
    theirs = inputs.astype(dtype).astype(np.float64)
    for x, expected in zip(inputs.tolist(), theirs.tolist(), strict=True):
        assert format.round(x) == expected, x


def test_radix_4_has_the_values_and_thresholds_of_the_paper():
    even = formats.FP4_R4_EVEN
    magnitudes = [4.0**n for n in range(-3, 4)]
    assert even.grid == (*(-m for m in reversed(magnitudes)), 0.0, *magnitudes)
    positive = [p for p in even.decision_points if p > 0]
    assert positive == [0.009765625, 0.0390625, 0.15625, 0.625, 2.5, 10.0, 40.0]
    assert positive == [float(Fraction(4) ** n / Fraction(8, 5)) for n in range(-3, 4)]


def test_radix_4_rounds_like_the_procedure_of_fig_2c():
    def procedure(x: float) -> float:
        ebit = math.floor(math.log(1.6 * abs(x), 4) + 1e-12)
        return 0.0 if ebit < -3 else math.copysign(64.0 if ebit >= 3 else 4.0**ebit, x)

    for i in range(1, 4000):
        for x in (i * 0.02, -i * 0.0007):
            assert formats.FP4_R4_EVEN.round(x) == procedure(x), x


def test_the_odd_phase_is_half_the_even_phase_of_twice_the_number():
    even, odd = formats.FP4_R4_EVEN, formats.FP4_R4_ODD
    assert [p for p in odd.decision_points if p > 0][:2] == [0.0048828125, 0.01953125]
    points = [p * k for p in odd.decision_points for k in (0.999, 1.0, 1.001)]
    for x in (*points, 0.0, 1e-9, 1e9, *odd.grid, *even.grid):
        assert odd.round(x) == 0.5 * even.round(2 * x), x


def test_ranges_are_those_that_the_paper_states():
    ranges = {"fp4_r4_even": 12, "fp4_r2": 6, "fp4_121": 3}
    for name, log2_range in ranges.items():
        assert math.log2(formats.get(name).max / formats.get(name).smallest) == log2_range


def test_8_bit_and_16_bit_ranges_are_as_published():
    assert formats.FP8_143.max == 30 and formats.FP8_143.smallest == 1.125 * 2**-11
    assert formats.FP16_169.max == 2.0**33 - 2.0**24 and formats.FP16_169.smallest == 2.0**-31 * (1 + 1 / 512)
    assert formats.FP8_E5M2.max == 57344 and formats.FP8_E4M3FN.max == 448
    assert len(formats.INT4_SYM.grid) == 15 and len(formats.INT4.grid) == len(formats.INT4_MIDRISE.grid) == 16


def test_scale_formats_are_as_published():
    ue5m3, ue6m2 = formats.UE5M3, formats.UE6M2
    assert (ue5m3.smallest, ue5m3.max, ue5m3.encode(1.0)) == (2.0**-17, 1.75 * 2.0**16, 15 << 3)
    assert [code for code, value in enumerate(ue5m3.values) if not math.isfinite(value)] == [0xFF]
    assert (ue6m2.min, ue6m2.max, ue6m2.encode(1.0), ue6m2.round(0.0)) == (2.0**-48, 1.5 * 2.0**15, 48 << 2, 2.0**-48)
    assert [code for code, value in enumerate(ue6m2.values) if not math.isfinite(value)] == [0xFF]


def test_ue5m3_is_e4m3_with_one_more_exponent_bit():
    """Codes with the same fields differ by the biases: the positive E4M3 codes lie 8 binades up."""
    for code in range(8, 127):
        assert formats.UE5M3.decode(code + (8 << 3)) == formats.FP8_E4M3FN.decode(code)


def test_e1m2_is_int4_in_quarters():
    assert formats.FP4_E1M2.grid == tuple(v / 4 for v in formats.INT4_SYM.grid)
    for x in (0.0, 0.1, 0.125, 0.375, -0.625, 0.875, 1.624, 1.7, 9.0):
        assert formats.FP4_E1M2.round(x) == formats.INT4_SYM.round(4 * x) / 4


def test_a_user_format_takes_one_line():
    radix16 = formats.FloatFormat("r16", exponent_bits=3, mantissa_bits=0, exponent_bias=4, radix=16, subnormals=False)
    assert radix16.grid[-3:] == (16.0, 256.0, 4096.0)
    nf = formats.Codebook("nf", table=(-1, -0.5, 0, 0.25, 1))
    assert nf.round(0.6) == 0.25 and nf.round(0.63) == 1.0 and nf.bits == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: formats.FloatFormat("bad", exponent_bits=0),
        lambda: formats.FloatFormat("bad", exponent_bits=9, mantissa_bits=9),
        lambda: formats.FloatFormat("bad", radix=1),
        lambda: formats.FloatFormat("bad", mantissa_bits=2, multiplier=Fraction(8, 5)),
        lambda: formats.IntFormat("bad", width=2, low=-7, high=7),
        lambda: formats.IntFormat("bad", width=4, low=-1, high=14),
        lambda: formats.IntFormat("bad", width=3, low=3, high=10),
        lambda: formats.Codebook("bad", table=(1.0,)),
        lambda: formats.FloatFormat("bad", exponent_bias=100000),
        lambda: formats.FP4_R4_EVEN.encode(math.nan),
    ],
)
def test_an_impossible_format_is_refused_in_one_sentence(make):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'fp4_r4_even'"):
        formats.get("fp4_r4_evn")


def test_formats_need_no_torch():
    code = "import sys, fourbit.formats; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
