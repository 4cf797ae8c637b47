"""The tensor roundings against the pure-Python formats: every code, every decision point, all bfloat16 inputs."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourbit import formats
from fourbit.errors import UserError
from fourbit.formats import get
from fourbit.quantizers import Rounding, random_words, round_to_format

ALL = [formats.get(name) for name in formats.names()]
EXTRA = [
    formats.FloatFormat("r4_m185", exponent_bits=3, radix=4, subnormals=False, multiplier=Fraction(185, 100)),
    formats.FloatFormat("r16", exponent_bits=3, radix=16, subnormals=False, multiplier=formats.midpoint_multiplier(16)),
    formats.FloatFormat("r3_m2", exponent_bits=3, mantissa_bits=1, exponent_bias=3, radix=3),
    formats.FloatFormat("e8m3", exponent_bits=8, mantissa_bits=3, exponent_bias=127, specials="ieee"),
    formats.FloatFormat(
        "e4m3_inf", exponent_bits=4, mantissa_bits=3, exponent_bias=7, specials="ieee", overflow="infinity"
    ),
    dataclasses.replace(formats.FP4_R4_EVEN, name="r4_inf", overflow="infinity"),
    dataclasses.replace(formats.BFLOAT16, name="bfloat16_saturating", overflow="saturate"),
    formats.Codebook("odd codes first", table=(1, 0, 3, 2)),
    formats.FloatFormat("e3m1", exponent_bits=3, mantissa_bits=1, exponent_bias=3),
]
ALL_BFLOAT16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def interesting(format: formats.Format) -> torch.Tensor:
    """All bfloat16 numbers, the grid, and the neighbourhood of every decision point."""
    step = 1 if format.bits <= 8 else 41
    points = torch.tensor(format.decision_points[::step], dtype=torch.float64).float()
    grid = torch.tensor(format.grid[::step], dtype=torch.float64).float()
    inf = torch.tensor(math.inf)
    return torch.cat([ALL_BFLOAT16, points, points.nextafter(inf), points.nextafter(-inf), grid])


def assert_same(actual: torch.Tensor, expected: list[float], x: torch.Tensor) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).float()
    wrong = ~((actual == wanted) | (actual.isnan() & wanted.isnan()))
    assert not wrong.any(), (x[wrong][:5], actual[wrong][:5], wanted[wrong][:5])
    assert not ((actual == 0) & torch.signbit(actual)).any(), "negative zero"


@pytest.mark.parametrize("format", ALL + EXTRA, ids=str)
def test_nearest_equals_the_definition(format):
    x = interesting(format)
    assert_same(round_to_format(x, format), [format.round(v) for v in x.tolist()], x)


@pytest.mark.parametrize("format", ALL + EXTRA, ids=str)
def test_truncation_equals_the_definition(format):
    x = interesting(format)
    actual = round_to_format(x, format, Rounding.TRUNCATE)
    assert_same(actual, [format.truncate(v) for v in x.tolist()], x)


@pytest.mark.parametrize("format", [f for f in ALL + EXTRA if f.bits <= 8], ids=str)
def test_stochastic_rounding_goes_up_for_exactly_the_words_below_the_fraction(format):
    """Enumerated, not sampled: with words 0, 1/n, 2/n ... the share that goes up is the fraction, to 1/n."""
    n = 256
    words = (torch.arange(n, dtype=torch.int64) << 24).to(torch.int32)
    grid = format.grid
    for i in range(0, len(grid) - 1, max(1, len(grid) // 20)):
        low, high = torch.tensor([grid[i], grid[i + 1]], dtype=torch.float64).float().tolist()
        for fraction in (0.0, 0.25, 0.5, 0.75):
            x = torch.full((n,), low + fraction * (high - low))
            y = round_to_format(x, format, Rounding.STOCHASTIC, words)
            assert set(y.tolist()) <= {low, high}
            exact = (float(x[0]) - low) / (high - low)
            assert abs(float((y == high).float().mean()) - exact) <= 1 / n + 1e-6


def test_stochastic_rounding_is_unbiased_below_the_smallest_number_too():
    n = 1 << 12
    words = (torch.arange(n, dtype=torch.int64) << 20).to(torch.int32)
    for format in (formats.FP4_R2, formats.FP4_R4_EVEN, formats.FP4_E2M1):
        for x in (format.smallest / 8, -format.smallest * 0.375):
            y = round_to_format(torch.full((n,), x), format, Rounding.STOCHASTIC, words)
            assert float(y.double().mean()) == pytest.approx(x, rel=1e-3)


@pytest.mark.parametrize("name", ["fp4_r2_139", "fp4_r4_even", "fp4_e2m1", "int4_sym", "fp8_152"])
def test_underflow_draws_below_the_smallest_number_and_nowhere_else(name):
    format = get(name)
    x = torch.cat((torch.linspace(-1.2, 1.2, 4001) * format.smallest, torch.linspace(-1.2, 1.2, 4001) * format.max))
    words = random_words(7, x.shape)
    found = round_to_format(x, format, Rounding.UNDERFLOW, words)
    small = x.abs() < format.smallest
    assert torch.equal(found[small], round_to_format(x, format, Rounding.STOCHASTIC, words)[small])
    assert torch.equal(found[~small], round_to_format(x, format)[~small])
    assert 1500 < int(small.sum()) < 5000


def test_the_two_decision_points_of_radix_2_move_the_mean_of_log_uniform_numbers():
    """Within one octave, for numbers of density 1/x: E[q] = ln t + 2 (ln 2 - ln t) where E[x] = 1, deciding at t."""
    x = 2.0 ** torch.linspace(0, 6, 600_001)[:-1]
    kept = {name: float(round_to_format(x, get(name)).sum() / x.sum()) for name in ("fp4_r2", "fp4_r2_139")}
    assert kept["fp4_r2"] == pytest.approx(2 * math.log(2) - math.log(1.5), abs=5e-3)
    assert kept["fp4_r2_139"] == pytest.approx(2 * math.log(2) - math.log(23 / 16), abs=5e-3)


def test_stochastic_rounding_needs_words_of_the_same_shape():
    for words in (None, torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(UserError, match="one random word per element"):
            round_to_format(torch.ones(2), formats.INT4, Rounding.STOCHASTIC, words)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.TRUNCATE])
def test_nan_stays_and_infinity_saturates(rounding):
    x = torch.tensor([math.nan, math.inf, -math.inf])
    for format in ALL:
        y = round_to_format(x, format, rounding)
        top, bottom = format.max, format.min
        if rounding is Rounding.NEAREST and format.overflow == "infinity":
            top, bottom = math.inf, -math.inf
        assert y[0].isnan()
        assert y[1:].tolist() == torch.tensor([top, bottom], dtype=torch.float64).float().tolist()


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False), st.sampled_from(ALL))
def test_any_float32_rounds_as_defined(x, format):
    assert round_to_format(torch.tensor([x]), format).item() == pytest.approx(format.round(x), rel=1e-7, abs=0)


@pytest.mark.parametrize("shape", [(0,), (), (3, 0, 2), (2, 3, 4, 5)])
def test_any_shape_and_layout(shape):
    x = torch.randn(shape)
    for format in (formats.INT4_SYM, formats.FP4_R4_EVEN, formats.FP16_169, formats.FP4_R8):
        y = round_to_format(x, format)
        assert y.shape == x.shape
        if x.dim() == 4:
            swapped = x.transpose(1, 3)
            assert torch.equal(round_to_format(swapped, format), y.transpose(1, 3))
            permuted = x.to(memory_format=torch.channels_last)
            assert torch.equal(round_to_format(permuted, format), y)
