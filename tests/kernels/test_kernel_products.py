"""Every registered product and epilogue against a float64 computation, and what products must leave to the reference.

A Raw that does not say `rounded` is a sum of integers, and exact, or a sum in float32. One that says so is rounded to
bfloat16 after a sum in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    assert_same,
    each_implementation,
    has_dot_product,
    has_products,
    instruction_set,
    isas_with_products,
    needs_products,
    numbers,
    skip_if_none,
    skip_without_products,
    threads,
)
from torch import Tensor

from fourbit import backends, formats
from fourbit.formats import Codebook, Format
from fourbit.ops import Contraction, Convolution, Finish, Gemm, Layout, LinearMap, Matmul, Operand, Raw
from fourbit.ops._product import _finish, multiply, product, reference_product
from fourbit.quantizers import Packed, carrier_dtype, is_packable, pack, pack_mask

f = formats
X = (f.UINT4, f.INT4_SYM, f.INT8, f.UINT8, f.FP4_E2M1, f.INT4_MIDRISE)
W = (f.INT4_SYM, f.INT4, f.INT2_SYM, f.INT8, f.UINT4, f.UINT8)
THIRDS = Codebook("multiples of 1.3046875", table=tuple(1.3046875 * i for i in (0, 1, 2, 4, 5, -1, -2, -4)))
G = (f.FP4_R4_EVEN, f.FP4_R4_ODD, f.FP4_R2, f.FP4_R8, f.FP4_E2M1, f.FP4_121, f.INT4_SYM, f.INT8, f.FP8_152, THIRDS)

SHAPES: dict[str, tuple[Contraction, tuple[int, ...], tuple[int, ...]]] = {
    # contraction, x, w
    "linear": (LinearMap(), (5, 8), (4, 8)),
    "linear, three axes": (LinearMap(), (2, 3, 7), (17, 7)),
    "linear, one row": (LinearMap(), (1, 7), (3, 7)),
    "linear, one column": (LinearMap(), (6, 7), (1, 7)),
    "linear, one term": (LinearMap(), (6, 1), (5, 1)),
    "linear, one of all": (LinearMap(), (1, 1), (1, 1)),
    "linear, a vector": (LinearMap(), (9,), (4, 9)),
    "linear, long": (LinearMap(), (33, 1001), (64, 1001)),
    "1x1": (Convolution((1, 1), (0, 0), (1, 1)), (2, 3, 7, 7), (5, 3, 1, 1)),
    "1x1, one image, odd channels": (Convolution((1, 1), (0, 0), (1, 1)), (1, 17, 5, 4), (3, 17, 1, 1)),
    "1x1, strided": (Convolution((2, 2), (0, 0), (1, 1)), (3, 4, 7, 6), (8, 4, 1, 1)),
    "1x1, padded": (Convolution((1, 1), (1, 1), (1, 1)), (2, 5, 6, 6), (3, 5, 1, 1)),
    "1x1, one of all": (Convolution((1, 1), (0, 0), (1, 1)), (1, 1, 1, 1), (1, 1, 1, 1)),
    "1x1, one channel": (Convolution((1, 1), (0, 0), (1, 1)), (2, 1, 3, 5), (1, 1, 1, 1)),
    "3x3": (Convolution((1, 1), (1, 1), (1, 1)), (2, 16, 8, 8), (16, 16, 3, 3)),
    "3x3, odd channels": (Convolution((1, 1), (1, 1), (1, 1)), (2, 3, 7, 5), (5, 3, 3, 3)),
    "3x3, strided, one image": (Convolution((2, 2), (1, 1), (1, 1)), (1, 5, 6, 6), (17, 5, 3, 3)),
    "3x3, strided, left over": (Convolution((2, 2), (0, 0), (1, 1)), (2, 17, 8, 8), (3, 17, 3, 3)),
    "2x3, uneven": (Convolution((1, 2), (0, 1), (1, 1)), (2, 17, 6, 7), (1, 17, 2, 3)),
    "3x3, dilated": (Convolution((1, 1), (2, 2), (2, 2)), (2, 3, 7, 7), (4, 3, 3, 3)),
    "7x7": (Convolution((2, 2), (3, 3), (1, 1)), (2, 3, 15, 15), (8, 3, 7, 7)),
}
every_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
LEFT_ALONE: dict[str, tuple[Contraction, tuple[int, ...], tuple[int, ...]]] = {
    "grouped": (Convolution((1, 1), (1, 1), (1, 1), 2), (2, 4, 7, 7), (6, 2, 3, 3)),
    "depthwise": (Convolution((1, 1), (1, 1), (1, 1), 4), (2, 4, 5, 5), (4, 1, 3, 3)),
    "transposed": (Convolution((2, 2), (1, 1), (1, 1), 1, True, (0, 0)), (2, 3, 5, 5), (3, 4, 3, 3)),
    "one dimension": (Convolution((1,), (1,), (1,)), (2, 3, 9), (4, 3, 3)),
    "three dimensions": (Convolution((1, 1, 1), (1, 1, 1), (1, 1, 1)), (2, 2, 4, 5, 4), (3, 2, 3, 3, 3)),
    "batched matmul": (Matmul(), (2, 4, 5), (2, 5, 6)),
}


def draw(format: Format, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers of a format, in its carrier, images in channels_last as layers have them."""
    grid = torch.tensor(format.grid)
    q = grid[torch.randint(len(grid), shape, generator=torch.Generator().manual_seed(seed))].to(carrier_dtype(format))
    return q.contiguous(memory_format=torch.channels_last) if q.dim() == 4 else q


def gemms(case, a: Format, b: Format, which: str, products: str = "exact") -> list[tuple[Gemm, Tensor, Tensor]]:
    """The product, the right result, and the sum of magnitudes: with the second operand as it is, and packed."""
    return [(replace(gemm, products=products), exact, size) for gemm, exact, size in _exact_gemms(*case, a, b, which)]


@functools.lru_cache(maxsize=256)  # all pairs of formats of one case, which every implementation is tried on in turn
def _exact_gemms(contraction, x_shape, w_shape, a: Format, b: Format, which: str) -> list[tuple[Gemm, Tensor, Tensor]]:
    x, w = draw(a if which == "fprop" else b, x_shape, 1), draw(b, w_shape, 2)
    if which == "fprop":
        layout, left, right, multiply = None, x, w, contraction.fprop
    else:
        g = draw(a, tuple(contraction.fprop(x.float(), w.float()).shape), 3)
        layout, right = (Layout.of(x), w) if which == "dgrad" else (Layout.of(w), x)
        left, derivative = g, contraction.dgrad if which == "dgrad" else contraction.wgrad
        like = layout.empty(torch.float64, x.device)
        multiply = lambda p, q: derivative(p, q, like)  # noqa: E731
    exact = multiply(left.double(), right.double())
    size = multiply(left.double().abs(), right.double().abs())
    forms = [right, pack(right, b)] if is_packable(b) else [right]
    gemm = Gemm(which, contraction, Operand(left, None, a), Operand(right, None, b), layout, torch.float32, "exact")  # type: ignore[arg-type]
    return [(replace(gemm, b=Operand(form, None, b)), exact, size) for form in forms]


def value(raw: Raw) -> Tensor:
    """The numbers that a Raw stands for."""
    y = raw.y.double() if raw.high is None else raw.y.double() + 256 * raw.high.double()
    return y * raw.unit


def check(raw: Raw, exact: Tensor, size: Tensor, products: str) -> None:
    assert raw.y.shape == exact.shape
    multiples = bool((exact * 128 == (exact * 128).round()).all())  # of 2^-7: all four-bit formats but radix 8
    fits = raw.y.dtype != torch.float32 or (multiples and float(size.max() if size.numel() else 0) < 2.0**17)
    if not raw.rounded and not fits:
        assert ((value(raw) - exact).abs() <= 2.0**-20 * size).all()
        return
    if not raw.rounded:
        assert torch.equal(value(raw).float(), exact.float())
        return
    assert products == "fast"
    error = (value(raw) - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 2.0**-20 * size).all()  # bfloat16, after a sum in float32


@each_implementation("gemm")
@pytest.mark.parametrize("products", ["exact", "fast"])
@every_shape
def test_products_are_exact_or_rounded_once_to_bfloat16(implementation, case, products):
    taken = 0
    for which, left in (("fprop", X), ("dgrad", G), ("wgrad", G)):
        for a, b in itertools.product(left, W):
            for gemm, exact, size in gemms(case, a, b, which, products):
                raw = implementation(gemm)
                if raw is not None:
                    check(raw, exact, size, products)
                    taken += 1
    skip_if_none(taken)


@each_implementation("gemm")
@every_shape
def test_the_products_of_four_bit_layers_have_a_kernel(implementation, case):
    """Where the processor multiplies int8 and bfloat16 fast."""
    if implementation.kernel.backend != "cpu" or not (
        torch.cpu._is_vnni_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        pytest.skip("not this backend's, or not on this processor")
    for which, pairs in (
        ("fprop", [(f.UINT4, f.INT4_SYM), (f.INT4_SYM, f.INT4_SYM)]),
        ("dgrad", [(f.FP4_R4_EVEN, f.INT4_SYM), (f.FP4_R2, f.INT4_SYM), (f.FP8_152, f.INT4_SYM)]),
        ("wgrad", [(f.FP4_R4_ODD, f.UINT4), (f.FP4_R2, f.INT4_SYM), (f.FP8_152, f.UINT4)]),
    ):
        for a, b in pairs:
            for gemm, *_ in gemms(case, a, b, which, "fast"):
                assert implementation(gemm) is not None, (which, a, b)


def integers_only(implementation) -> bool:
    """Whether the library's own products are those of integers."""
    return (
        implementation.isa is not None and has_products(implementation.isa) and not has_dot_product(implementation.isa)
    )


@each_implementation("gemm")
@every_shape
def test_products_of_integers_have_a_kernel_and_are_exact(implementation, case):
    """Whatever the sizes: with AVX2, operands that are integers in some unit are multiplied as such, and rounded once."""
    if not integers_only(implementation):
        pytest.skip("not this instruction set's")
    dilated = isinstance(case[0], Convolution) and case[0].dilation != (1, 1)
    gradients = (f.FP4_R4_EVEN, f.FP4_R4_ODD, f.FP4_R2, f.FP4_E2M1, f.INT4_SYM, f.INT8)
    for num_threads in (1, 3):
        for which, left in (
            ("fprop", (f.UINT4, f.INT4_SYM, f.INT8, f.UINT8)),
            ("dgrad", gradients),
            ("wgrad", gradients),
        ):
            for a, b in itertools.product(left, (f.INT4_SYM, f.INT4, f.INT8, f.UINT4)):
                for gemm, exact, _ in gemms(case, a, b, which):
                    with threads(num_threads):
                        raw = implementation(gemm)
                    if dilated:
                        assert raw is None or a == f.FP4_E2M1 or which == "fprop", (which, a, b)
                        continue
                    assert raw is not None and not raw.rounded and raw.high is None, (which, a, b)
                    assert torch.equal(raw.y, exact.float()), (which, a, b)


LONG: dict[str, tuple[Contraction, tuple[int, ...], tuple[int, ...]]] = {
    "rows": (LinearMap(), (140001, 3), (2, 3)),
    "features": (LinearMap(), (3, 140001), (2, 140001)),
    "outputs": (LinearMap(), (2, 3), (140001, 3)),
    "pixels": (Convolution((1, 1), (1, 1), (1, 1)), (2, 2, 190, 197), (3, 2, 3, 3)),
    "a row of pixels": (Convolution((1, 2), (0, 0), (1, 1)), (1, 2, 2, 70002), (3, 2, 1, 2)),
    "images": (Convolution((1, 1), (0, 0), (1, 1)), (37, 2, 61, 67), (3, 2, 1, 1)),
}


@each_implementation("gemm")
@pytest.mark.parametrize("case", LONG.values(), ids=LONG.keys())
def test_sums_that_32_bits_do_not_hold_are_exact_all_the_same(implementation, case):
    """Of the largest numbers: 64 in units of 2^-6, times 15 or 127, more than 2^31 / 4096 / 15 of them; and 127 times 127."""
    if not integers_only(implementation):
        pytest.skip("not this instruction set's")
    taken = 0
    pairs = [("fprop", f.INT8, f.INT8), ("dgrad", f.FP4_R4_EVEN, f.INT8), ("wgrad", f.FP4_R4_EVEN, f.UINT4)]
    for which, a, b in [*pairs, ("wgrad", f.INT8, f.INT8)]:
        for gemm, _, _ in gemms(case, a, b, which)[:1]:
            left = torch.full_like(gemm.a.q, a.max)
            left.as_strided((left.numel(),), (1,))[::13] = float(a.grid[1])
            right = torch.full_like(gemm.b.q, b.max)
            gemm = replace(gemm, a=Operand(left, None, a), b=Operand(right, None, b))
            with threads(3):
                raw = implementation(gemm)
            if raw is None:
                continue
            taken += 1
            left, right = left.double(), right.double()
            if which == "fprop":
                exact = case[0].fprop(left, right)
            else:
                like = gemm.layout.empty(torch.float64, left.device)
                exact = getattr(case[0], which)(left, right, like)
            assert torch.equal(raw.y, exact.float()), which
    assert taken >= 3


@each_implementation("gemm")
@pytest.mark.parametrize("case", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_geometries_without_a_kernel_are_declined(implementation, case):
    for which, a in (("fprop", f.UINT4), ("dgrad", f.FP4_R4_EVEN), ("wgrad", f.FP4_R4_ODD)):
        for gemm, exact, size in gemms(case, a, f.INT4_SYM, which, "fast"):
            raw = implementation(gemm)
            if implementation.kernel.backend == "cpu":
                assert raw is None
            elif raw is not None:
                check(raw, exact, size, "fast")


@each_implementation("gemm")
def test_operands_without_a_small_carrier_are_declined(implementation):
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    packed = pack(draw(f.INT4_SYM, (5, 6), 0), f.INT4_SYM)
    for a, b in (
        (Operand(x), Operand(w)),
        (Operand(x), Operand(packed, None, f.INT4_SYM)),
        (Operand(x, None, f.FP16_169), Operand(w, None, f.FP16_169)),
        (Operand(draw(f.INT4_SYM, (4, 6), 0), None, f.INT4_SYM), Operand(w)),
        # scales per channel are multiplied into the numbers, which are then of no format's grid
        (Operand(draw(f.INT4_SYM, (4, 6), 0), None, f.INT4_SYM), Operand(w, None, f.INT4_SYM)),
        (Operand(x, None, f.INT4_SYM), Operand(packed, None, f.INT4_SYM)),
    ):
        assert implementation(Gemm("fprop", LinearMap(), a, b, None, torch.float32, "fast")) is None


@each_implementation("gemm")
@pytest.mark.parametrize("x_shape", [(0, 6), (2, 0, 6), (4, 0)])
def test_empty_operands_are_declined_or_right(implementation, x_shape):
    case = (LinearMap(), x_shape, (5, x_shape[-1]))
    for which in ("fprop", "dgrad", "wgrad"):
        for gemm, exact, size in gemms(case, f.INT4_SYM, f.INT4_SYM, which):
            raw = implementation(gemm)
            if raw is not None:
                check(raw, exact, size, "exact")


@each_implementation("gemm")
@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("repeated", ["a", "b"])
def test_a_row_that_is_repeated_is_read_as_often(implementation, which, repeated):
    """torch._int_mm reads memory that is not theirs."""
    case = (LinearMap(), (16, 8), (3, 8))
    for gemm, _, size in gemms(case, f.INT4_SYM, f.INT4_SYM, which):
        operand = getattr(gemm, repeated)
        numbers = operand.to(torch.int8)[:1].expand(operand.q.shape)
        gemm = replace(gemm, **{repeated: operand._replace(q=numbers)})
        raw = implementation(gemm)
        if raw is not None:
            exact = reference_product(replace(gemm, dtype=torch.float64))
            check(raw, exact, torch.full_like(size, 16 * 49.0), "exact")


@each_implementation("gemm")
def test_operands_on_other_devices_are_declined(implementation):
    a, b = (Operand(draw(f.INT4_SYM, (4, 6), 0), None, f.INT4_SYM) for _ in range(2))
    meta = b._replace(q=torch.empty(4, 6, dtype=torch.int8, device="meta"))
    for pair in ((a, meta), (meta, a)):
        assert implementation(Gemm("fprop", LinearMap(), *pair, None, torch.float32, "fast")) is None


@each_implementation("gemm")
def test_sums_beyond_two_to_the_24_are_rounded_once(implementation):
    """127 * 127 * 4096 and more: exact in int32, not in float32."""
    taken = 0
    for contraction, x_shape, w_shape in (
        (LinearMap(), (3, 4101), (5, 4101)),
        (Convolution((1, 1), (0, 0), (1, 1)), (1, 460, 3, 3), (2, 460, 3, 3)),
    ):
        x = torch.full(x_shape, 127, dtype=torch.int8)
        x.view(-1)[::7] = 126
        w = torch.full(w_shape, -127, dtype=torch.int8)
        x, w = (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (x, w))
        gemm = Gemm(
            "fprop", contraction, Operand(x, None, f.INT8), Operand(w, None, f.INT8), None, torch.float32, "exact"
        )
        raw = implementation(gemm)
        if raw is not None:
            check(raw, contraction.fprop(x.double(), w.double()), torch.zeros(()), "exact")
            taken += 1
    skip_if_none(taken)


@each_implementation("gemm")
def test_backward_gradients_of_a_layer_with_one_output_are_right(implementation):
    """A matrix of one row is easily misread: its stride along the rows means nothing."""
    taken = 0
    for which in ("dgrad", "wgrad"):
        for gemm, exact, _ in gemms((LinearMap(), (40, 31), (1, 31)), f.FP4_R4_EVEN, f.INT4_SYM, which):
            raw = implementation(gemm)
            if raw is not None:
                assert torch.equal(value(raw), exact)
                taken += 1
    skip_if_none(taken)


FINISHED = [k for k in SHAPES if k.startswith("linear")] + ["linear, sixteens", "linear, three axes of sixteens"]
SIXTEENS = {
    "linear, sixteens": (LinearMap(), (7, 48), (20, 48)),
    "linear, three axes of sixteens": (LinearMap(), (2, 13, 112), (70, 112)),
}


@each_implementation("product")
@pytest.mark.parametrize("name", FINISHED)
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_a_product_finished_at_once_is_the_product_finished_afterwards(implementation, which, name):
    case, taken = (SHAPES | SIXTEENS)[name], 0
    for a, output, b in itertools.product(
        (f.FP4_R4_EVEN, f.FP4_R4_ODD, f.FP8_152), (f.FP16_169, f.BINARY16, None), (f.UINT4, f.INT4_SYM)
    ):
        for gemm, exact, size in gemms(case, a, b, which):
            for what in _finishes(output, gemm.layout, b):
                done = implementation(gemm, what)
                if done is None:
                    continue
                taken += 1
                expected, clipped = _finish(Raw(exact.float()), what)
                assert done[0].stride() == gemm.layout.stride
                assert a == f.FP8_152 or float(size.max()) >= 2.0**17 or torch.equal(done[0], expected)
                torch.testing.assert_close(done[0], expected, rtol=2.0**-7, atol=2.0**-18 * float(size.max()))
                assert (done[1] is None) == (clipped is None)
                if clipped is not None:
                    torch.testing.assert_close(done[1], clipped, rtol=1e-4, atol=1e-4 * float(size.max()))
    if implementation.isa is not None:
        every = 3 * 2 * 2 * (4 if name in SIXTEENS else 1)  # of one gradient format; FP8 is no integer
        formats_taken = 3 if has_dot_product(implementation.isa) else 2 if has_products(implementation.isa) else 0
        assert taken == every * formats_taken


def _finishes(output: Format | None, layout: Layout, codes: Format) -> list[Finish]:
    """Without a mask, with one that keeps all, with one of random bits, and with the sum of what it removes."""
    late, scale = torch.tensor(0.37), torch.tensor(0.011)
    plain = Finish(scale, output, False, late, torch.float32, layout)
    random = torch.rand(layout.shape, generator=torch.Generator().manual_seed(5)) < 0.7
    packed = pack(draw(codes, tuple(layout.shape), 7), codes)
    some = replace(plain, mask=pack_mask(random))
    return [plain, replace(plain, mask=pack_mask(torch.ones_like(random))), some, replace(some, codes=packed)]


@each_implementation("product")
def test_what_needs_more_than_that_is_not_finished_at_once(implementation):
    skip_without_products(implementation)
    for gemm, *_ in gemms(SIXTEENS["linear, sixteens"], f.FP4_R4_EVEN, f.UINT4, "wgrad"):
        what = Finish(None, f.FP16_169, False, None, torch.float32, gemm.layout)
        for change in ({"keep_infinite": True}, {"late": torch.ones(20, 1)}, {"dtype": torch.bfloat16}):
            assert implementation(gemm, replace(what, **change)) is None
        assert implementation(gemm, replace(what, layout=Layout(gemm.layout.shape, (1, 20)))) is None
        assert implementation(replace(gemm, a=Operand(torch.randn(7, 20))), what) is None
        # scales per channel are multiplied into the numbers, which are then of no format's grid
        assert implementation(replace(gemm, b=Operand(torch.rand(7, 48), None, f.UINT4)), what) is None


@each_implementation("product")
def test_scales_that_are_not_finite_reach_the_result(implementation):
    skip_without_products(implementation)
    for gemm, *_ in gemms(SIXTEENS["linear, sixteens"], f.FP4_R4_EVEN, f.UINT4, "wgrad"):
        for bad in (torch.nan, torch.inf):
            for change in ({"scale": torch.tensor(bad)}, {"late": torch.tensor(bad)}):
                what = replace(Finish(None, f.FP16_169, False, None, torch.float32, gemm.layout), **change)
                done = implementation(gemm, what)
                with backends.without():
                    expected = _finish(multiply(gemm), what)[0]
                torch.testing.assert_close(done[0], expected, equal_nan=True)


@each_implementation("product")
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_long_sums_and_few_columns_are_finished_rightly(implementation, which):
    skip_without_products(implementation)
    for case in ((LinearMap(), (9000, 17), (20, 17)), (LinearMap(), (30, 40), (5000, 40))):
        for gemm, exact, size in gemms(case, f.FP4_R4_EVEN, f.UINT4, which):
            with threads(3):
                done = implementation(gemm, Finish(None, None, False, None, torch.float32, gemm.layout))
            assert ((done[0].double() - exact).abs() <= 2.0**-20 * size).all()


RAWS = {
    "float32": lambda n: Raw(numbers(n, torch.float32)),
    "bfloat16, rounded": lambda n: Raw(numbers(n, torch.bfloat16), rounded=True),
    "int32": lambda n: Raw(_integers(n, 1)),
    "two int32": lambda n: Raw(_integers(n, 1), _integers(n, 2), 2.0**-6),
    "float32, with NaN and infinity": lambda n: Raw(_bad(n)),
    "float64": lambda n: Raw(numbers(n, torch.float32).double()),
}


def _integers(n: int, seed: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def _bad(n: int) -> Tensor:
    x = numbers(n, torch.float32)
    x[::11], x[3::19], x[5::23] = float("nan"), float("inf"), float("-inf")
    return x


@functools.lru_cache(maxsize=4)  # the sizes of one test, which every implementation is tried on in turn
def finished(make: Callable[[int], Raw], n: int) -> tuple[Raw, list[tuple[Finish, Tensor, Tensor | None]]]:
    """Sums, and what the reference makes of them."""
    raw = make(n)
    return raw, [(finish, *_finish(raw._replace(y=raw.y.clone()), finish)) for finish in finishes(n)]


def finishes(n: int) -> list[Finish]:
    """Combinations of everything that an epilogue does."""
    inside = numbers(n, torch.float32, 5) > 0
    mask = pack_mask(inside)
    codes = [None]
    for format in (f.INT4_SYM, f.UINT4):
        codes.append(pack(draw(format, (n,), 6), format))
    layout = Layout(torch.Size((n,)), (1,))
    found = []
    for scale, late, output, dtype in itertools.product(
        (None, torch.tensor(0.37)),
        (None, torch.tensor(2.0**-9)),
        (None, f.FP16_169, f.FP8_152, f.FP8_143, f.BINARY16),
        (torch.float32, torch.bfloat16, torch.float16),
    ):
        plain = Finish(scale, output, False, late, dtype, layout)
        masked = [replace(plain, mask=mask, codes=c) for c in codes]
        found += [plain, replace(plain, keep_infinite=True), *masked]
    return found


@each_implementation("epilogue")
@pytest.mark.parametrize("make", RAWS.values(), ids=RAWS.keys())
def test_epilogues_equal_the_reference_to_the_bit(implementation, make):
    taken = 0
    for n, num_threads in ((1, 1), (64, 1), (333, 1), (2**14 + 77, 3)):
        raw, cases = finished(make, n)
        for finish, y, clipped in cases:
            with threads(num_threads):
                found = implementation(raw._replace(y=raw.y.clone()), finish)
            if found is None:
                continue
            taken += 1
            assert_same(found[0], y)
            assert (found[1] is None) == (clipped is None)
            if clipped is not None:
                assert found[1].dtype == clipped.dtype and found[1].shape == clipped.shape
                size = float(raw.y.double().abs().sum())
                if size < 1e30 and clipped.isfinite():
                    assert abs(float(found[1]) - float(clipped)) <= 1e-5 * size
    assert taken or raw.y.dtype == torch.float64 or implementation.kernel.backend != "cpu"


@each_implementation("epilogue")
def test_the_gradient_of_the_clip_value_is_the_signed_sum_of_what_the_mask_removes(implementation):
    n = 50000
    y, q = torch.randn(n), draw(f.INT4_SYM, (n,), 1)
    inside = torch.arange(n) % 3 != 1
    finish = Finish(
        None, None, False, None, torch.float32, Layout(y.shape, (1,)), pack_mask(inside), pack(q, f.INT4_SYM)
    )
    with threads(3):
        masked, clipped = implementation(Raw(y.clone()), finish)
    assert torch.equal(masked, y.where(inside, torch.zeros(())))
    wanted = float((y.double() * q.sign())[~inside].sum())
    assert float(clipped) == pytest.approx(wanted, rel=1e-5, abs=1e-7 * float(y.abs().sum()))  # it may cancel


@each_implementation("epilogue")
def test_results_come_in_the_order_of_axes_that_is_asked_for(implementation):
    like = torch.empty(2, 3, 5, 4).to(memory_format=torch.channels_last)
    for raw in (
        Raw(torch.randn(2, 3, 5, 4)),
        Raw(torch.randn(2, 4, 5, 3).transpose(1, 3)),
        Raw(torch.randn(2, 3, 5, 8)[..., ::2]),
    ):
        for layout, output in itertools.product((Layout.of(like), None), (None, f.FP16_169)):
            finish = Finish(torch.tensor(0.5), output, False, None, torch.float32, layout)
            y, _ = _finish(raw._replace(y=raw.y.clone()), finish)
            found, _ = implementation(raw, finish)
            assert_same(found, y)
            assert layout is None or found.stride() == layout.stride


@each_implementation("epilogue")
def test_epilogues_decline_scales_per_channel_and_masks_with_unpacked_codes(implementation):
    y, mask = torch.randn(8, 64), pack_mask(torch.ones(8, 64, dtype=torch.bool))
    plain = Finish(None, None, False, torch.rand(1, 64), torch.float32, Layout.of(y))
    codes = torch.ones(8, 64, dtype=torch.int8)
    for finish in (plain, replace(plain, late=None, mask=mask, codes=codes)):
        found = implementation(Raw(y.clone()), finish)
        if found is not None:
            assert_same(found[0], _finish(Raw(y.clone()), finish)[0])
        else:
            assert not isinstance(finish.codes, Packed)


KEPT_SHAPES = [(1, 1, 1), (3, 5, 31), (12, 4, 32), (13, 63, 33), (20, 650, 100), (25, 7, 64)]


@needs_products
@pytest.mark.parametrize("isa", isas_with_products())
@pytest.mark.parametrize(("rows", "depth", "columns"), KEPT_SHAPES)
@pytest.mark.parametrize("output", [None, formats.FP16_169])
@pytest.mark.parametrize("name", ["int4_sym", "uint4", "int8"])
def test_a_weight_kept_in_panels_gives_every_bit_again(isa, rows, depth, columns, output, name):
    """As an LSTM multiplies: the same weight at every step, forward by integers, backward by radix-4 gradients."""
    generator = torch.Generator().manual_seed(rows)
    format = formats.get(name)
    low, high = int(min(format.grid)), int(max(format.grid))
    dtype = torch.uint8 if low == 0 else torch.int8
    w = Operand(
        torch.randint(-7, 8, (columns, depth), generator=generator, dtype=torch.int8), None, formats.INT4_SYM, True
    )
    kept = {"fprop": w._replace(cache={}), "dgrad": w._replace(cache={})}
    scale = torch.tensor(0.0123)
    for _ in range(3):
        x = Operand(torch.randint(low, high + 1, (rows, depth), generator=generator).to(dtype), scale, format, True)
        g = torch.randint(-3, 4, (rows, columns), generator=generator)
        g = Operand((g.sign() * 4.0 ** g.abs().float()).bfloat16(), None, formats.FP4_R4_EVEN, True)
        layout = Layout(torch.Size((rows, depth)), (depth, 1))
        for which, a, like in (("fprop", x, None), ("dgrad", g, layout)):
            gemm = Gemm(which, LinearMap(), a, kept[which], like, torch.float32, "fast")
            finish = Finish(gemm.scale, output, False, None, torch.float32, like)
            with instruction_set(isa):
                found = backends.OPERATIONS["product"](gemm, finish)
            with backends.without():
                expected, _ = product(gemm, output, torch.float32)
            assert found is not None and torch.equal(found[0], expected)
            assert kept[which].cache


@each_implementation("product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 8, 4), (37, 50, 33), (96, 31, 80), (9, 5001, 3), (5002, 7, 20)])
def test_numbers_in_bfloat16_are_multiplied_with_float32_sums(implementation, which, sizes, dtype):
    rows, inner, outer = sizes
    x, w, g = (torch.randn(size).bfloat16() for size in ((rows, inner), (outer, inner), (rows, outer)))
    a, b = {"fprop": (x, w), "dgrad": (g, w), "wgrad": (g, x)}[which]
    like = None if which == "fprop" else Layout.of(x if which == "dgrad" else w)
    gemm = Gemm(which, LinearMap(), Operand(a, torch.tensor(0.75)), Operand(b), like, torch.float32, "exact")
    found = implementation(gemm, Finish(gemm.scale, None, True, torch.tensor(2.0), dtype, like))
    if not has_dot_product(implementation.isa):
        assert found is None
        return
    expected = 1.5 * reference_product(replace(gemm, dtype=torch.float64))
    of_sizes = replace(gemm, a=Operand(a.abs()), b=Operand(b.abs()), dtype=torch.float64)
    bound = 2.0**-20 * 1.5 * reference_product(of_sizes)
    if dtype == torch.bfloat16:
        bound += 2.0**-8 * expected.abs()
    assert found is not None and found[0].dtype == dtype and found[0].shape == expected.shape
    assert bool(((found[0].double() - expected).abs() <= bound).all())


@each_implementation("product")
def test_numbers_in_bfloat16_that_are_not_finite_reach_the_result(implementation):
    x = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0], [2.0, 3.0]]).bfloat16()
    w = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).bfloat16()
    gemm = Gemm("fprop", LinearMap(), Operand(x), Operand(w), None, torch.float32, "fast")
    found = implementation(gemm, Finish(None, None, True, None, torch.float32))
    assert (found is not None) == has_dot_product(implementation.isa)
    if found is not None:
        assert_same(found[0], x.float() @ w.float().t())
