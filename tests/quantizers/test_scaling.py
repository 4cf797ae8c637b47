"""Scales against their formulas: SAWB, PACT, amax, GradScale's votes."""

from __future__ import annotations

import math

import pytest
import torch

from fourbit import backends, formats
from fourbit.errors import UserError
from fourbit.quantizers import (
    UNSET,
    Amax,
    ClipState,
    ClipValue,
    ExponentState,
    FixedScale,
    GradScale,
    QuantSpec,
    Sawb,
    amax_of,
    best_clip_value,
    quantize,
    round_to_format,
)


@pytest.mark.parametrize(
    ("format", "c1", "c2"),
    [
        (formats.INT4_SYM, 12.035, 12.03),
        (formats.INT4_MIDRISE, 12.68, 12.80),
        (formats.INT2_MIDRISE, 3.12, 2.064),
        (formats.INT2_SYM, 2.6, 1.71),
        (formats.INT3_MIDRISE, 7.509, 6.892),
        (formats.INT8_SYM, 31.76, 35.04),
    ],
    ids=str,
)
def test_sawb_follows_its_formula_and_published_coefficients(format, c1, c2):
    w = torch.tensor([0.1, -0.4, 0.25, 0.05, -0.15, 0.6, -0.02, 0.3], dtype=torch.float64)
    mean_square = sum(v * v for v in w.tolist()) / len(w)
    mean_abs = sum(abs(v) for v in w.tolist()) / len(w)
    alpha = c1 * math.sqrt(mean_square) - c2 * mean_abs
    assert alpha > 0
    scale = float(quantize(w.float(), QuantSpec(format, Sawb())).scale)
    assert scale == pytest.approx(alpha / format.max, rel=1e-5)


def test_sawb_on_gaussian_weights_clips_near_the_optimum():
    w = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    alpha = float(quantize(w, QuantSpec(formats.INT4_SYM, Sawb())).scale) * 7
    assert alpha == pytest.approx(12.035 - 12.03 * math.sqrt(2 / math.pi), rel=0.02)
    assert alpha == pytest.approx(best_clip_value(w, formats.INT4_SYM), rel=0.12)


def relative_error(w: torch.Tensor, alpha: float) -> float:
    """Of rounding w to 15 levels up to alpha, in float64."""
    step = alpha / 7
    rounded = (w.double() / step).round().clamp(-7, 7) * step
    return float((rounded - w.double()).norm() / w.double().norm())


def sawb_alpha(w: torch.Tensor, format=formats.INT4_SYM) -> float:
    return float(quantize(w, QuantSpec(format, Sawb())).scale) * format.max


def signs(n: int) -> torch.Tensor:
    return torch.where(torch.rand(n, generator=torch.Generator().manual_seed(9)) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize(
    "format", [formats.INT4_SYM, formats.INT4_MIDRISE, formats.INT8_SYM, formats.INT2_SYM], ids=str
)
@pytest.mark.parametrize(
    "w", [torch.full((16,), 0.5), 0.3 * signs(50), torch.tensor([[0.7]])], ids=["one value", "+-", "one"]
)
def test_sawb_keeps_weights_of_one_magnitude(format, w):
    assert sawb_alpha(w, format) == pytest.approx(float(w.abs().max()), rel=1e-6)


@pytest.mark.parametrize("smaller", [0.95, 0.9, 0.8, 0.7, 0.65])
def test_sawb_keeps_weights_of_two_magnitudes_that_are_alike(smaller):
    w = torch.where(torch.arange(1000) % 2 == 0, 1.0, smaller) * signs(1000)
    assert sawb_alpha(w) == pytest.approx(1, rel=1e-6)


def test_sawb_is_never_much_worse_than_the_best_clip_value_from_binary_to_gaussian_and_sparse_weights():
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(20_000, generator=generator), torch.rand(20_000, generator=generator)
    family = [normal.abs() ** power * signs(20_000) for power in (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1)]
    family += [(low + (1 - low) * uniform) * signs(20_000) for low in (0.95, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0)]
    for share in (0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.001):
        family += [torch.where(uniform < share, w, 0.0) for w in (normal, signs(20_000))]
    family += [torch.cat([signs(20_000), torch.tensor([3.0])])]
    for w in family:
        best = min(relative_error(w, float(w.abs().max()) * i / 100) for i in range(2, 101))
        found = relative_error(w, sawb_alpha(w))
        assert found < 0.2
        assert found < best + 0.12 or sawb_alpha(w) > float(
            w.abs().max()
        )  # the published line, above the largest weight


def test_ordinary_weights_get_the_published_line():
    """From weights that are evenly spread, as torch starts layers, to heavier tails than Laplace's."""
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(5000, generator=generator), torch.rand(5000, generator=generator) * 2 - 1
    for w in (
        uniform,
        normal,
        normal * normal.abs(),
        (uniform + uniform.roll(1)),
        torch.where(uniform > 0, normal, 0.0),
    ):
        line = 12.035 * float(w.double().square().mean().sqrt()) - 12.03 * float(w.double().abs().mean())
        assert sawb_alpha(w) == pytest.approx(line, rel=1e-5)


@pytest.mark.parametrize(
    "w", [0.3 * signs(64), torch.eye(16) * 2, torch.linspace(0.9, 1.1, 32)], ids=["binary", "sparse", "flat"]
)
def test_sawb_is_the_same_per_tensor_per_channel_with_kernels_and_without(w):
    row = w.reshape(1, -1)
    per_channel = quantize(row, QuantSpec(formats.INT4_SYM, Sawb(), "row"))
    whole = quantize(row, QuantSpec(formats.INT4_SYM, Sawb()))
    with backends.without("cpu"):
        reference = quantize(row, QuantSpec(formats.INT4_SYM, Sawb()))
    assert torch.equal(whole.scale, reference.scale) and torch.equal(whole.q, reference.q)
    assert float(per_channel.scale) == float(whole.scale)


def test_sawb_refuses_a_format_without_published_coefficients_unless_told():
    with pytest.raises(UserError, match="no published coefficients"):
        quantize(torch.ones(3), QuantSpec(formats.INT4, Sawb()))
    assert quantize(torch.ones(3), QuantSpec(formats.INT4, Sawb(12.1, 12.2))).scale > 0


def test_amax_saturates_nothing_per_tensor_and_per_channel():
    x = torch.randn(6, 5, 4)
    for spec in (QuantSpec("int4_sym", Amax()), QuantSpec("int4_sym", Amax(), "channel")):
        result = quantize(x, spec, sums=(0, 2))
        assert result.q.abs().max() == 7
        assert (x - result.dequantize()).abs().max() <= result.scale.max() / 2 * (1 + 1e-6)
    assert result.scale.shape == (1, 5, 1)
    assert torch.allclose(result.scale.flatten() * 7, x.abs().amax((0, 2)))


@pytest.mark.parametrize("scaling", [Amax(), Sawb()])
def test_an_all_zero_tensor_gives_zeros_and_an_empty_one_gives_nothing(scaling):
    result = quantize(torch.zeros(4), QuantSpec("int4_sym", scaling))
    assert result.scale.isfinite() and torch.equal(result.dequantize(), torch.zeros(4))
    assert quantize(torch.zeros(0, 3), QuantSpec("int4_sym", scaling)).q.shape == (0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaling", [Amax(), Sawb(), FixedScale(), ClipValue(), GradScale()])
def test_bad_numbers_reach_the_output(scaling, bad):
    x = torch.tensor([1.0, bad, 2.0])
    stored = {ClipState: torch.tensor(1.0), ExponentState: torch.tensor(0, dtype=torch.int32)}.get(scaling.state_class)
    result = quantize(x, QuantSpec("int4_sym", scaling), stored=stored)
    assert result.dequantize().isnan().all()


def test_pact_clips_and_rounds_to_fifteen_steps():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2)) * 2
    alpha = torch.tensor(2.0)
    q = quantize(x, QuantSpec(formats.UINT4, ClipValue()), stored=alpha)
    expected = torch.round(x.clamp(0, 2.0) * 15 / 2.0) * 2.0 / 15
    assert torch.allclose(q.dequantize(), expected, atol=1e-6)


def test_best_clip_value_beats_every_coarse_alternative():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).relu()

    def error(alpha: float) -> float:
        scale = alpha / 15
        return float((round_to_format(x / scale, formats.UINT4) * scale - x).square().sum())

    best = best_clip_value(x, formats.UINT4)
    assert all(error(best) <= error(a) * 1.001 for a in torch.linspace(0.5, float(x.max()), 25).tolist())
    assert best_clip_value(torch.zeros(5), formats.UINT4) == 1.0


@pytest.mark.parametrize(
    ("amax", "vote"),
    [(0.0, 0), (1e-30, 1), (31.0, 1), (32.0, 1), (32.001, 0), (64.0, 0), (64.001, -1), (1e30, -1)]
    + [(math.inf, 0), (math.nan, 0)],
)
def test_votes_follow_the_table_of_fig_3a(amax, vote):
    assert int(GradScale().vote(torch.tensor(amax))) == vote


def test_the_first_exponent_puts_the_largest_gradient_into_the_band():
    scaling = GradScale()
    amax = torch.cat([torch.logspace(-25, 25, 400), 2.0 ** torch.arange(-80, 80.0)])
    scaled = amax.double() * 2.0 ** scaling.first_exponent(amax).double()
    assert ((scaled > 32) & (scaled <= 64)).all()
    assert (scaling.first_exponent(torch.tensor([0.0, math.nan, math.inf])) == UNSET).all()


def test_exponents_move_by_one_are_clamped_and_stay_unset():
    scaling = GradScale()
    exponent = torch.tensor([5, 5, 5, 100, -100, UNSET], dtype=torch.int32)
    votes = torch.tensor([3, -2, 0, 1, -1, 1], dtype=torch.int32)
    assert scaling.step(exponent, votes).tolist() == [6, 4, 5, 100, -100, UNSET]


def test_amax_of_any_layout_equals_the_plain_maximum():
    x = torch.randn(4, 3, 5, 6)
    views = (x, x.to(memory_format=torch.channels_last), x.transpose(0, 3), x[:, ::2], x[1:], x.expand(2, 4, 3, 5, 6))
    for view in (*views, x.to(memory_format=torch.channels_last)[2:]):
        assert float(amax_of(view)) == float(view.abs().max())


def test_misuse_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="floating-point"):
        quantize(torch.arange(3), QuantSpec("int4"))
    with pytest.raises(UserError, match="sums is 1, but the tensor has 1 axes"):
        quantize(torch.ones(3), QuantSpec("int4", Amax(), "channel"), sums=1)
    with pytest.raises(UserError, match="granularity"):
        QuantSpec("int4", Amax(), "column")
    with pytest.raises(UserError, match="one clip value"):
        QuantSpec("uint4", ClipValue(), "channel")
    with pytest.raises(UserError, match="positive"):
        ClipValue(init=0.0)
    with pytest.raises(UserError, match="samples"):
        QuantSpec("int4", samples=2)


def test_the_sample_for_the_first_clip_value_sees_the_whole_image():
    """A regular stride would meet the zero border of every row of a padded image."""
    x = torch.rand(128, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 0
    assert best_clip_value(x, formats.UINT4) == pytest.approx(
        best_clip_value(x, formats.UINT4, 64, x.numel()), rel=0.05
    )
    assert best_clip_value(x, formats.UINT4) == best_clip_value(x, formats.UINT4)


@pytest.mark.parametrize("format", [formats.FP4_E2M1, formats.FP4_R4_EVEN])
def test_sawb_refuses_grids_that_are_not_evenly_spaced(format):
    with pytest.raises(UserError, match="no published coefficients"):
        quantize(torch.ones(3), QuantSpec(format, Sawb()))


def test_a_clip_value_that_was_trained_below_zero_still_gives_finite_numbers():
    q = quantize(torch.randn(10), QuantSpec("uint4", ClipValue()), stored=torch.tensor(-0.5))
    assert q.dequantize().isfinite().all()


def test_channel_scales_of_empty_and_one_dimensional_tensors_keep_their_shape():
    assert amax_of(torch.zeros(0, 3, 2), (0, 2)).shape == (1, 3, 1)
    assert torch.equal(amax_of(torch.tensor([1.0, -2.0]), ()), torch.tensor([1.0, 2.0]))
