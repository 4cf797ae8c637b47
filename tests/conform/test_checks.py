"""The conformance checks: right quantizers pass all of them, and each mistake is found by the check that is about it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fourbit import conform
from fourbit.conform import _linear
from fourbit.errors import UserError
from fourbit.formats import BLOCKS, FP4_E2M1, MXFP4, NVFP4, NVFP4_4OVER6, BlockFormat
from fourbit.quantizers import random_words, stream_key


def exact(format):
    """A quantizer by definition."""
    return lambda x: torch.tensor(format.round(x.tolist()), dtype=torch.float32).view(x.shape)


def failed(report):
    return {result.name for result in report if result.status == "fail"}


@pytest.mark.parametrize(
    "format",
    [pytest.param(f, id=name, marks=() if name == "nvfp4" else pytest.mark.slow) for name, f in BLOCKS.items()],
)
def test_the_definition_passes_all_checks(format):
    report = conform.check(exact(format), format)
    assert report.passed and not failed(report)
    assert all(result.status in ("pass", "open") for result in report)
    assert sum(result.compared for result in report) > 20000


@pytest.mark.parametrize("order", ["encode_folded", "encode", "decode"])
def test_the_order_of_operations_is_found_out(order):
    report = conform.check(exact(dataclasses.replace(NVFP4, order=order)), "nvfp4")
    assert report.passed
    words = {"encode_folded": "TransformerEngine", "encode": "four over six", "decode": "torchao"}
    assert words[order] in report.arithmetic


def test_the_error_that_chooses_between_four_and_six_is_found_out():
    report = conform.check(exact(dataclasses.replace(NVFP4_4OVER6, error="absolute")), "nvfp4_4over6")
    assert report.passed and "absolute" in report.arithmetic


def tie_away(x):
    up = torch.nextafter(x, x.sign() * math.inf)
    return exact(MXFP4)(torch.where(x.abs() == x.abs().amax(), x, up))


def truncated(x):
    y = exact(MXFP4)(x)
    return torch.where(y.abs() > x.abs(), exact(MXFP4)(x * 0.75), y)


def padded_with_the_last(x):
    pad = -x.shape[1] % 32
    return exact(MXFP4)(F.pad(x, (0, pad), value=8.0))[:, : x.shape[1]]


def by_memory(x):
    return exact(MXFP4)(torch.as_strided(x, x.shape, (x.shape[1], 1), x.storage_offset()))


def in_place(x):
    y = exact(MXFP4)(x)
    x.copy_(y)
    return y


def zeros_divided(x):
    return torch.where((x == 0).all(), math.nan, exact(MXFP4)(x))


def other_blocks_spoilt(x):
    return exact(MXFP4)(x) + x.sum() * 0


def halved_when_small(x):
    y = exact(MXFP4)(x)
    return torch.where(x.abs() < 2.0**-122, y / 2, y)


def bfloat16_by_bits(x):
    return exact(MXFP4)(x.float() * (1.25 if x.dtype == torch.bfloat16 else 1.0))


class Unsteady:
    """Rounds every second time to another block size."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        return exact(dataclasses.replace(MXFP4, block=32 if self.calls % 2 else 16))(x)


def limited(x):
    return exact(MXFP4)(x).clamp(-65504, 65504)


NEAREST = [
    (tie_away, "ties", "mxfp4"),
    (truncated, "ties", "mxfp4"),
    (truncated, "random", "mxfp4"),
    (exact(dataclasses.replace(MXFP4, rule="ceil")), "saturation", "mxfp4"),
    (exact(dataclasses.replace(MXFP4, rule="ceil")), "scales", "mxfp4"),
    (exact(dataclasses.replace(MXFP4, block=16)), "random", "mxfp4"),
    (lambda x: exact(MXFP4)(x.t()).t(), "random", "mxfp4"),
    (padded_with_the_last, "ragged ends", "mxfp4"),
    (by_memory, "layout", "mxfp4"),
    (in_place, "layout", "mxfp4"),
    (zeros_divided, "zeros", "mxfp4"),
    (lambda x: exact(MXFP4)(x.nan_to_num(0.0)), "NaN", "mxfp4"),
    (other_blocks_spoilt, "NaN", "mxfp4"),
    (other_blocks_spoilt, "infinity", "mxfp4"),
    (lambda x: exact(MXFP4)(torch.where(x.isinf(), 0.75, x)), "infinity", "mxfp4"),
    (halved_when_small, "small scales", "mxfp4"),
    (bfloat16_by_bits, "bfloat16", "mxfp4"),
    (Unsteady(), "repeated", "mxfp4"),
    (limited, "large numbers", "mxfp4"),
    (lambda x: x, "random", "mxfp4"),
    (exact(dataclasses.replace(MXFP4, element=BLOCKS["mxint4"].element)), "grid", "mxfp4"),
    (exact(dataclasses.replace(NVFP4, least_scale=2.0**-6)), "small scales", "nvfp4"),
    (lambda x: torch.cat([exact(NVFP4)(row[None]) for row in x]), "tensor scale", "nvfp4"),
    (exact(dataclasses.replace(NVFP4, tensor_bound=0.0)), "tensor scale", "nvfp4"),
    (exact(NVFP4), "random", "nvfp4_4over6"),
]


@pytest.mark.parametrize(("quantizer", "check", "format"), NEAREST, ids=[f"{n}-{c[1]}" for n, c in enumerate(NEAREST)])
def test_each_mistake_fails_its_check(quantizer, check, format):
    report = conform.check(quantizer, format)
    assert check in failed(report)
    assert not report.passed
    assert report[check].detail


def test_what_raises_on_unusual_input_refuses_and_passes():
    def strict(x):
        assert x.is_contiguous() and x.shape[1] % 32 == 0 and x.dtype == torch.float32 and len(x)
        return exact(MXFP4)(x)

    report = conform.check(strict, "mxfp4")
    assert report.passed
    refused = {result.name for result in report if result.status == "refuses"}
    assert refused == {"ragged ends", "layout", "bfloat16", "sizes"}
    assert all("AssertionError" in report[name].detail for name in refused)


def test_subnormal_float32_numbers_may_be_flushed():
    def flushed(x):
        y = exact(MXFP4)(x)
        return torch.where(y.abs() < 2.0**-126, 0.0, y)

    report = conform.check(flushed, "mxfp4")
    assert report.passed and report["small scales"].status == "open"


# Stochastic rounding, fast enough for millions of roundings: MXFP4 in torch, its words given.


def uniform_of(generator):
    """Stochastic MXFP4 with random numbers in [0, 1) from `generator(shape, seed)`."""

    def quantize(x, seed):
        blocks = x.contiguous().reshape(len(x), -1, 32)
        amax = blocks.abs().amax(dim=-1, keepdim=True)
        s = torch.where(amax > 0, torch.exp2(torch.frexp(amax).exponent.float() - 3), 1.0)
        s = torch.where(amax.isfinite(), s, math.nan)
        grid = torch.tensor(FP4_E2M1.grid)
        v = (blocks / s).clamp(-6, 6).reshape(x.shape).contiguous()
        low = grid[(torch.bucketize(v, grid, right=True) - 1).clamp(0, 13)]
        high = grid[torch.bucketize(v, grid, right=True).clamp(1, 14)]
        up = generator(x.shape, seed) < (v - low) / (high - low)
        y = torch.where(up, high, low).reshape(blocks.shape) * s
        return torch.where(v.isnan(), v, y.reshape(x.shape))

    return quantize


def index(shape):
    return torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)


def good(shape, seed):
    return ((random_words(stream_key(seed), tuple(shape)) >> 8) & 0xFFFFFF).double() / 2**24


def of_torch(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def linear_counter(shape, seed):
    """seed + c * index modulo 2^32, what a counter becomes without a hash."""
    return ((index(shape) * 2654435761 + seed * 40503) % 2**32) / 2**32


def multiplied_counter(shape, seed):
    """One step of a linear congruential generator on the index."""
    return (((index(shape) + seed * 7919) * 1664525 + 1013904223) % 2**32) / 2**32


def short(period):
    def generator(shape, seed):
        words = torch.rand(period, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return words[(index(shape) % period).long()]

    return generator


def same_rows(shape, seed):
    return good((1, shape[1]), seed).expand(shape)


def same_columns(shape, seed):
    return good((shape[0], 1), seed).expand(shape)


def in_pairs(shape, seed):
    return good((shape[0], shape[1] // 2), seed).repeat_interleave(2, dim=1)


def coarse(shape, seed):
    return (good(shape, seed) * 16).floor() / 16


@pytest.mark.parametrize("generator", [good, of_torch])
def test_good_random_words_pass(generator):
    report = conform.check(uniform_of(generator), "mxfp4", rounding="stochastic", samples=2**18)
    assert report.passed, [result for result in report if result.status == "fail"]
    assert report["unbiased"].compared > 2**17


@pytest.mark.parametrize(
    ("generator", "checks"),
    [
        (linear_counter, {"variance", "spectrum"}),
        (multiplied_counter, {"variance", "spectrum"}),
        (short(256), {"spectrum", "correlation"}),
        (short(2048), {"spectrum", "correlation"}),
        (same_rows, {"variance", "spectrum", "fresh words"}),
        (same_columns, {"variance", "spectrum"}),
        (in_pairs, {"correlation"}),
        (lambda shape, seed: good(shape, 1), {"fresh words"}),
        (lambda shape, seed: good(shape, seed) * 0.98, {"unbiased"}),
        (coarse, {"unbiased", "small probabilities"}),
        (lambda shape, seed: torch.full(shape, 0.5), {"unbiased"}),
        (lambda shape, seed: good(shape, seed).clamp_min(0.01), {"small probabilities"}),
    ],
)
def test_bad_random_words_fail_the_check_that_is_about_them(generator, checks):
    report = conform.check(uniform_of(generator), "mxfp4", rounding="stochastic", samples=2**17)
    assert checks <= failed(report)


def test_a_dither_of_two_steps_is_found():
    def wide(x, seed):
        return exact(MXFP4)(x + (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 0.5) * x.abs())

    report = conform.check(wide, "mxfp4", rounding="stochastic", samples=2**14)
    assert {"grid", "neighbours", "unbiased"} <= failed(report)


def test_stochastic_nvfp4_passes_by_definition():
    f = NVFP4

    def stochastic(x, seed):
        u = good(x.shape, seed)
        amax = float(x.abs().max())
        rows = []
        for row, words in zip(x.tolist(), u.tolist(), strict=True):
            numbers = []
            for block in f.split(row):
                s = f.scale.values[f.choose(block, amax).scale] * f.tensor_scales(amax)[1]
                for v in block:
                    low, high = f.element.neighbors(v / s if s else 0.0)
                    p = (v / s - low) / (high - low) if high > low else 0.0
                    numbers.append(
                        math.nan if not math.isfinite(amax) else (high if words[len(numbers)] < p else low) * s
                    )
            rows.append(numbers)
        return torch.tensor(rows, dtype=torch.float32)

    report = conform.check(stochastic, f, rounding="stochastic", samples=2**14)
    assert report.passed, [result for result in report if result.status == "fail"]


# A linear layer.


def fast(x):
    """MXFP4 in torch."""
    return uniform_of(lambda shape, seed: torch.full(shape, 0.5))(x, 0)


class Layer(torch.nn.Linear):
    """Quantizes its operands by definition, in three products; `mistake` says what it does wrong."""

    mistake = ""

    def forward(self, x):
        return Products.apply(x, self.weight, self.bias, self.mistake)


class Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, mistake):
        q = fast
        ctx.save_for_backward(x, w)
        ctx.mistake = mistake
        y = q(x) @ q(w).t()
        return y if mistake == "no bias" else y + b

    @staticmethod
    def backward(ctx, g):
        q, (x, w) = fast, ctx.saved_tensors
        dx = q(g) @ q(w.t()).t()
        dw = q(g.t()) @ q(x.t()).t()
        db = g.sum(dim=0) if ctx.mistake != "bias gradient" else None
        if ctx.mistake == "zeros":
            dx = dx * 0
        if ctx.mistake == "transposed":
            dw = (x.t() @ g).reshape(dw.shape)
        return dx, dw, db, None


@pytest.mark.parametrize(
    ("mistake", "check"),
    [
        ("", None),
        ("no bias", "output"),
        ("bias gradient", "gradient of the bias"),
        ("zeros", "gradient of the input"),
        ("transposed", "gradient of the weight"),
    ],
)
def test_a_linear_layer_is_compared_with_float64(mistake, check):
    def make(inputs, outputs):
        layer = Layer(inputs, outputs)
        layer.mistake = mistake
        return layer

    results = _linear.run(make)
    assert [result.name.removeprefix("linear: ").split()[0] for result in results] == ["output", *["gradient"] * 3]
    assert failed(results) == ({f"linear: {check}"} if check else set())


def test_a_layer_that_rotates_its_operands_is_judged_by_its_error():
    rotation = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0))).Q

    class Rotated(torch.nn.Linear):
        def forward(self, x):
            return Products.apply(x @ rotation, self.weight @ rotation, self.bias, "")

    results = _linear.run(lambda inputs, outputs: Rotated(inputs, outputs))
    assert not failed(results)
    assert next(iter(results)).status == "open" and "relative error 0." in next(iter(results)).detail


@pytest.mark.parametrize(
    ("quantizer", "format", "options", "words"),
    [
        (exact(MXFP4), "mxfp5", {}, "did you mean 'mxfp4'"),
        (3, "mxfp4", {}, "is no function"),
        (lambda x: x[0], "mxfp4", {}, "of the same shape"),
        (lambda x: None, "mxfp4", {}, "returned NoneType"),
        (lambda x: x.int(), "mxfp4", {}, "floating-point"),
        (lambda x: x @ x, "mxfp4", {}, "failed on an ordinary float32 tensor"),
        (exact(MXFP4), "mxfp4", {"rounding": "up"}, "nearest"),
        (exact(MXFP4), "mxfp4", {"samples": 3}, "at least"),
        (exact(MXFP4), "nvfp4_4over6", {"rounding": "stochastic"}, "not defined"),
        (exact(MXFP4), "mxfp4", {"linear": lambda i, o: torch.nn.ReLU()}, "weight and bias"),
        (exact(MXFP4), "mxfp4", {"linear": lambda i: i}, "making the layer"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_sentence(quantizer, format, options, words):
    with pytest.raises(UserError, match=words) as error:
        conform.check(quantizer, format, **options)
    assert "\n" not in str(error.value)


def test_a_format_of_ones_own_is_checked_too():
    mine = BlockFormat("mine", FP4_E2M1, 8, BLOCKS["mxfp4"].scale, rule="ceil")
    assert conform.check(exact(mine), mine).passed
    assert not conform.check(exact(MXFP4), mine).passed
