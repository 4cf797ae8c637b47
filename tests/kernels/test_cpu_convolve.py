"""Our own convolutions, against sums in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from instruction_sets import instruction_set
from kernel_cases import has_dot_product, isas_with_products, threads

from fourbit import backends
from fourbit.chains import Activation, Norm, NormApply, NormStatistics
from fourbit.formats import FP4_R2, FP4_R4_EVEN, FP16_169, INT4_SYM, UINT4
from fourbit.kernels.cpu import library
from fourbit.ops import Convolution, Gemm, Layout, Operand
from fourbit.ops._product import multiply
from fourbit.quantizers import round_to_format

CASES = [  # num, in, out, height, width, kernel, padding
    (2, 16, 16, 5, 7, (3, 3), (1, 1)),
    (3, 32, 48, 9, 8, (3, 3), (1, 1)),
    (1, 16, 16, 6, 5, (3, 3), (0, 0)),
    (2, 16, 16, 7, 9, (5, 5), (2, 2)),
    (2, 48, 16, 8, 20, (2, 4), (1, 3)),
    (1, 16, 32, 3, 3, (1, 3), (0, 1)),
    (5, 16, 16, 1, 1, (3, 3), (1, 1)),
]


FORWARD = [  # num, in, out, height, width, kernel, padding, stride
    *((*case, (1, 1)) for case in CASES),
    (2, 16, 32, 9, 8, (3, 3), (1, 1), (2, 2)),
    (2, 32, 16, 8, 9, (1, 1), (0, 0), (2, 2)),
    (3, 4, 16, 7, 6, (3, 2), (2, 0), (1, 3)),
    (2, 20, 48, 5, 33, (3, 3), (1, 1), (1, 1)),
    (1, 128, 80, 4, 4, (3, 3), (1, 1), (1, 1)),
    (2, 64, 16, 6, 18, (3, 3), (1, 1), (1, 1)),
    (2, 16, 16, 6, 5, (2, 2), (0, 0), (3, 3)),  # the last rows and columns meet no kernel
]


STRIDED = [  # the same, of what only products of integers take
    (2, 16, 32, 9, 8, (3, 3), (1, 1), (2, 2)),
    (2, 32, 16, 8, 9, (1, 1), (0, 0), (2, 2)),
    (3, 4, 16, 7, 6, (3, 2), (2, 0), (1, 3)),
    (2, 20, 48, 5, 33, (3, 3), (1, 1), (1, 1)),
    (2, 16, 16, 6, 5, (2, 2), (0, 0), (3, 3)),
    (19, 3, 7, 9, 9, (3, 3), (1, 1), (1, 1)),
    (1, 17, 33, 1, 70, (1, 5), (0, 4), (1, 4)),
    (2, 6, 5, 11, 10, (7, 7), (3, 3), (2, 2)),
    (2, 6, 5, 4, 3, (1, 2), (3, 2), (1, 1)),  # more padding than kernel
    (2, 6, 5, 2, 1, (1, 2), (4, 3), (9, 5)),
]


@pytest.fixture(params=isas_with_products(), ids=str)
def exact_kernels(request):
    if request.param is None:
        pytest.skip(f"no products here: this machine has {torch.backends.cpu.get_cpu_capability()}")
    with instruction_set(request.param):
        yield library()


def needs_integers_only():
    """Ends a test of what only products of integers take."""
    if has_dot_product(None):
        pytest.skip("not with this instruction set")


def operands(case):
    num, in_channels, out_channels, height, width, kernel, padding, *stride = case
    generator = torch.Generator().manual_seed(0)
    con = Convolution(*(stride or [(1, 1)]), padding, (1, 1))
    last = {"memory_format": torch.channels_last}
    x = torch.randint(0, 16, (num, in_channels, height, width), generator=generator).contiguous(**last)
    w = torch.randint(-7, 8, (out_channels, in_channels, *kernel), generator=generator).contiguous(**last)
    shape = con.fprop(x.double(), w.double()).shape
    exponents, signs = (torch.randint(low, high, shape, generator=generator) for low, high in ((-3, 4), (-1, 2)))
    return con, x, w, (4.0**exponents * signs).contiguous(**last)


def values_of(codes):
    """The numbers of 16-bit codes."""
    grid = torch.tensor([float(v) for v in FP16_169.grid if v >= 0])
    bits = codes.int()
    return grid[(bits & 0x7FFF).long()] * torch.where(bits < 0, -1.0, 1.0)


@pytest.mark.parametrize("products", ["exact", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_exact_sums(case, products, exact_kernels):
    con, x, w, g = operands(case)
    gradient = Operand(g.bfloat16(), None, FP4_R4_EVEN)
    for which, other, like, format in (("dgrad", w, x, INT4_SYM), ("wgrad", x, w, UINT4)):
        operand = Operand(other.to(torch.int8), None, format)
        gemm = Gemm(which, con, gradient, operand, Layout.of(like), torch.float32, products)
        raw = backends.OPERATIONS["gemm"](gemm)
        exact = getattr(con, which)(g.double(), other.double(), like.double())
        value = raw.y.double() if raw.high is None else (raw.y.double() + 256.0 * raw.high.double()) * raw.unit
        if which == "dgrad" and products == "fast" and exact_kernels.has_dot_product:
            torch.testing.assert_close(value, exact, rtol=2.0**-8, atol=1e-6)
        else:
            torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("case", CASES + STRIDED)
def test_gradients_of_integers_equal_the_exact_sums_in_every_geometry(case, num_threads, exact_kernels):
    """Whoever shares the images: also where there are fewer of them than threads."""
    needs_integers_only()
    con, x, w, g = operands(case)
    for gradient in (Operand(g.bfloat16(), None, FP4_R4_EVEN), Operand(g.sign().mul(64).to(torch.int8), None, FP4_R2)):
        for which, other, like, format in (
            ("dgrad", w, x, INT4_SYM),
            ("wgrad", x, w, UINT4),
            ("wgrad", x.sub(8).clamp(-7, 7).contiguous(memory_format=torch.channels_last), w, INT4_SYM),
        ):
            operand = Operand(other.to(torch.int8), None, format)
            gemm = Gemm(which, con, gradient, operand, Layout.of(like), torch.float32, "fast")
            with threads(num_threads):
                raw = backends.OPERATIONS["gemm"](gemm)
            exact = getattr(con, which)(gradient.q.double(), other.double(), like.double())
            assert torch.equal(raw.y, exact.float()) and raw.y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("case", CASES + STRIDED)
def test_signed_activations_are_multiplied_exactly_too(case, num_threads, exact_kernels):
    needs_integers_only()
    con, x, w, _ = operands(case)
    a = Operand(x.sub(8).clamp(-7, 7).to(torch.int8), torch.tensor(0.1), INT4_SYM)
    gemm = Gemm("fprop", con, a, Operand(w.to(torch.int8), None, INT4_SYM), None, torch.float32, "exact")
    exact = con.fprop(a.q.double(), w.double()).float()
    with threads(num_threads):
        raw, codes = (backends.OPERATIONS["gemm"](replace(gemm, output=output)) for output in (None, FP16_169))
    assert torch.equal(raw.y, exact)
    assert torch.equal(values_of(codes.y), round_to_format(exact * 0.1, FP16_169))


@pytest.mark.parametrize("case", FORWARD)
def test_forward_equals_the_exact_sums_rounded_at_once(case, exact_kernels):
    con, x, w, _ = operands(case)
    a = Operand(x.to(torch.uint8), torch.tensor(0.1), UINT4)
    gemm = Gemm("fprop", con, a, Operand(w.to(torch.int8), torch.tensor(0.03), INT4_SYM), None, torch.float32, "exact")
    exact = con.fprop(x.double(), w.double())
    raw = backends.OPERATIONS["gemm"](gemm)
    codes = backends.OPERATIONS["gemm"](replace(gemm, output=FP16_169))
    assert not raw.rounded and torch.equal(raw.y.double(), exact)
    assert codes.rounded and codes.y.dtype == torch.int16
    assert torch.equal(values_of(codes.y), round_to_format(exact.float() * gemm.scale, FP16_169))


def test_signed_activations_and_scales_that_are_not_finite_are_not_rounded_at_once(exact_kernels):
    con, x, w, _ = operands(CASES[0])
    weights = Operand(w.to(torch.int8), None, INT4_SYM)
    for a in (
        Operand(x.sub(8).to(torch.int8), None, INT4_SYM),
        Operand(x.to(torch.uint8), torch.tensor(torch.nan), UINT4),
    ):
        raw = backends.OPERATIONS["gemm"](Gemm("fprop", con, a, weights, None, torch.float32, "exact", output=FP16_169))
        if a.format == INT4_SYM:
            assert raw.rounded and raw.y.dtype == torch.int16
            continue
        assert not raw.rounded and torch.equal(raw.y.double(), con.fprop(a.q.double(), w.double()))


def test_what_does_not_fit_is_left_to_others(exact_kernels):
    _, x, w, g = operands((1, 16, 16, 6, 6, (3, 3), (1, 1)))
    gradient = Operand(g.bfloat16(), None, FP4_R4_EVEN)
    for change in (Convolution((1, 1), (2, 2), (2, 2)), Convolution((1, 1), (1, 1), (1, 1), 2)):
        gemm = Gemm(
            "wgrad", change, gradient, Operand(x.to(torch.int8), None, UINT4), Layout.of(w), torch.float32, "exact"
        )
        assert backends.OPERATIONS["gemm"](gemm) is None


def test_a_normalization_takes_codes_as_it_takes_what_they_were_rounded_from(exact_kernels):
    con, x, w, _ = operands((3, 16, 32, 7, 6, (3, 3), (1, 1)))
    a = Operand(x.to(torch.uint8), torch.tensor(0.1), UINT4)
    gemm = Gemm("fprop", con, a, Operand(w.to(torch.int8), torch.tensor(0.03), INT4_SYM), None, torch.float32, "fast")
    scale = float(gemm.scale)
    found = []
    for y, factor in ((multiply(gemm).y, scale), (multiply(replace(gemm, output=FP16_169)).y, 1.0)):
        norm = Norm(torch.full((32,), 1.5), torch.full((32,), 0.25), torch.zeros(32), torch.ones(32), 0.1, 1e-5)
        normalized = backends.OPERATIONS["norm_statistics"](NormStatistics(y, factor, FP16_169, norm, True))
        out = backends.OPERATIONS["norm_apply"](NormApply(normalized, None, Activation(True), None, True))[0]
        found.append((out, normalized.v, normalized.moments, norm.running_mean, norm.running_var))
    assert found[0][1].dtype == torch.int16
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_shapes_that_do_not_go_together_are_refused_as_by_torch(exact_kernels):
    """Not read from wrong memory, and nothing empty comes out: every route ends in torch's own error."""
    for x_shape, layer in (
        ((2, 64, 8, 8), (16, 16, 3)),  # channels
        ((2, 16, 2, 2), (16, 16, 3)),  # a kernel larger than the image
        ((2, 16, 8, 1), (16, 16, 2)),
    ):
        x = torch.randint(0, 16, x_shape).to(torch.uint8).contiguous(memory_format=torch.channels_last)
        w = torch.randint(-7, 8, (layer[1], layer[0], layer[2], layer[2])).to(torch.int8)
        gemm = Gemm(
            "fprop",
            Convolution((3, 3), (0, 0), (1, 1)),
            Operand(x, None, UINT4),
            Operand(w, None, INT4_SYM),
            None,
            torch.float32,
            "fast",
            output=FP16_169,
        )
        with pytest.raises(RuntimeError):
            multiply(gemm)
