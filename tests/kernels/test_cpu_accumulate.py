"""The CPU kernel for rounded sums: bit for bit the reference's numbers, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import math

import instruction_sets
import pytest
import torch

from fourbit import Accumulation, QuantSpec, backends, formats, quantize
from fourbit.kernels.cpu import library
from fourbit.ops import accumulate
from fourbit.quantizers import round_to_format

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not built")
FORMATS = ("fp16_169", "binary16", "fp8_152", "fp8_143", "fp8_e4m3fn", "fp4_e2m1", "fp4_121")
SHAPES = ((1, 1, 1, 1), (1, 5, 37, 70), (2, 33, 130, 3), (3, 1, 65, 100), (1, 20, 9, 17), (4, 2, 7, 2))


@pytest.fixture
def isas():
    """The instruction sets of this machine and build; the one in use comes back afterwards."""
    loaded = library()
    assert loaded is not None
    before = loaded.isa
    yield instruction_sets.isas("accumulate")
    loaded.use_isa(before)


def kernel(a, b, accumulation: Accumulation, key: int | None = None) -> torch.Tensor:
    """What the kernel gives, and nothing else."""
    found = [k for k in backends.kernels() if (k.operation, k.backend) == ("accumulate", "cpu")]
    y = found[0](a, b, accumulation, key)
    assert y is not None
    return y


def assert_equal_bits(isas: list[str], a, b, accumulation: Accumulation, key: int | None = None) -> None:
    with backends.without():
        wanted = accumulate(a, b, accumulation, key)
    for isa in isas:
        library().use_isa(isa)
        found = kernel(a, b, accumulation, key)
        assert found.shape == wanted.shape and found.is_contiguous()
        same = (found.view(torch.int32) == wanted.view(torch.int32)) | (found.isnan() & wanted.isnan())
        assert same.all(), (isa, accumulation, a.shape, int((~same).sum()))


def operands(kind: str, shape: tuple[int, int, int, int]):
    G, M, K, N = shape
    r = torch.Generator().manual_seed(M * K + N)
    a, b = torch.randn(G, M, K, generator=r), torch.randn(G, K, N, generator=r)
    if kind == "int4":
        return (a * 4).round().clamp(-7, 7), (b.abs() * 8).round().clamp(0, 15)
    if kind == "fp16":
        return round_to_format(a, formats.FP16_169), round_to_format(b, formats.FP16_169)
    if kind == "beyond the range":
        return a * 2.0 ** torch.randint(0, 40, a.shape, generator=r), b
    if kind == "below the range":
        return a * 2.0 ** -torch.randint(0, 45, a.shape, generator=r), b
    if kind == "ties":  # multiples of half a quantum next to sums of all sizes
        return a.sign() * 2.0 ** torch.randint(-20, 12, a.shape, generator=r), b.sign() * (1 + (b > 0) * 2.0**-9)
    assert kind == "infinite"
    a.view(-1)[::7], b.view(-1)[::11] = math.inf, math.nan
    return a, b


KINDS = ("int4", "fp16", "beyond the range", "below the range", "ties", "infinite")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_kernel_equals_the_reference_bit_for_bit(isas, format, rounding):
    chunks = (1, 3, 64, None) if format == FORMATS[0] else (3, None)  # a chunk is no matter of the format
    shapes = SHAPES if format == FORMATS[0] else SHAPES[1:4]  # nor is a shape
    for kind, shape, chunk in itertools.product(KINDS, shapes, chunks):
        assert_equal_bits(isas, *operands(kind, shape), Accumulation(format, chunk, rounding), key=2**63 + 5)


def test_every_single_addition_of_two_numbers_equals_the_reference(isas):
    """1 * x + y for a grid of x and y around the powers of two and the ends of the range."""
    r = torch.Generator().manual_seed(0)
    grid = torch.tensor(formats.FP16_169.grid)[torch.randint(0, 65000, (600,), generator=r)]
    terms = torch.cat([grid, 2.0 ** torch.arange(-40, 40.0), -(2.0 ** torch.arange(-40, 40.0)), torch.zeros(1)])
    a = torch.stack([torch.ones(len(terms)), terms], 1).view(1, -1, 2)
    b = torch.stack([terms, torch.ones(len(terms))]).view(1, 2, -1)
    for rounding in ("nearest", "stochastic"):
        assert_equal_bits(isas, a, b, Accumulation(rounding=rounding), key=1)


def test_operands_of_any_stride_are_read_right(isas):
    a, b = operands("fp16", (2, 6, 40, 10))
    views = (
        (a, b.mT.contiguous().mT),
        (a.mT.contiguous().mT, b),
        (a[:, ::2, 1:], b[:, 1:, ::3]),
        (a[:1].expand(2, -1, -1), b),
    )
    for left, right in views:
        assert_equal_bits(isas, left, right, Accumulation())


def test_results_do_not_depend_on_the_number_of_threads_or_the_order_of_the_axes():
    a, b = operands("fp16", (1, 64, 300, 100))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(kernel(a, b, Accumulation(rounding="stochastic"), key=4))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], y) for y in results)
    assert torch.equal(kernel(a, b, Accumulation()), kernel(b.mT, a.mT, Accumulation()).mT)


def test_what_the_kernel_does_not_take_is_left_to_the_reference():
    a, b = operands("int4", (1, 2, 5, 3))
    function = next(k for k in backends.kernels() if k.operation == "accumulate" and k.backend == "cpu")
    for accumulation in (Accumulation(rounding="truncate"), Accumulation("int8"), Accumulation("bfloat16")):
        assert function(a, b, accumulation, None) is None
        accumulate(a, b, accumulation)


def test_a_format_that_ends_near_float32_s_own_end_is_left_to_the_reference():
    """There the kernels' way of rounding, by adding 2^23 quanta, would overflow."""
    far = formats.FloatFormat("far", exponent_bits=7, mantissa_bits=3, exponent_bias=3)
    a = torch.randn(1, 3, 20) * 2.0 ** torch.randint(0, 120, (1, 3, 20))
    function = next(k for k in backends.kernels() if k.operation == "accumulate" and k.backend == "cpu")
    assert function(a, torch.ones(1, 20, 4), Accumulation(far), None) is None
    x = a.flatten()
    with backends.without():
        wanted = quantize(x, QuantSpec(far)).q
    assert torch.equal(quantize(x, QuantSpec(far)).q, wanted)


def test_numbers_around_the_operands_do_not_reach_the_result():
    """Lanes that only fill a panel up, operands in the middle of NaN."""
    for M, K, N in ((3, 5, 7), (1, 65, 33), (70, 2, 1)):
        a, b = torch.full((1, M + 2, K + 2), math.nan), torch.full((1, K + 2, N + 2), math.nan)
        a[:, 1:-1, 1:-1], b[:, 1:-1, 1:-1] = 1.0, 2.0
        y = kernel(a[:, 1:-1, 1:-1], b[:, 1:-1, 1:-1], Accumulation())
        assert torch.equal(y, torch.full((1, M, N), 2.0 * K))
