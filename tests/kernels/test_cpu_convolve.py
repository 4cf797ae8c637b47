"""Our own gradients of convolutions, against sums in float64."""

from __future__ import annotations

import pytest
import torch

from fourbit import backends
from fourbit.formats import FP4_R4_EVEN, INT4_SYM, UINT4
from fourbit.kernels.cpu import library
from fourbit.ops import Convolution, Gemm, Layout, Operand

CASES = [  # num, in, out, height, width, kernel, padding
    (2, 16, 16, 5, 7, (3, 3), (1, 1)),
    (3, 32, 48, 9, 8, (3, 3), (1, 1)),
    (1, 16, 16, 6, 5, (3, 3), (0, 0)),
    (2, 16, 16, 7, 9, (5, 5), (2, 2)),
    (2, 48, 16, 8, 20, (2, 4), (1, 3)),
    (1, 16, 32, 3, 3, (1, 3), (0, 1)),
    (5, 16, 16, 1, 1, (3, 3), (1, 1)),
]


@pytest.fixture
def exact_kernels():
    loaded = library()
    flags = torch.backends.cpu.get_cpu_capability()
    if loaded is None or loaded.isa != "avx512" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip(f"needs AVX512-BF16, this machine has {flags}")
    return loaded


def operands(case):
    num, in_channels, out_channels, height, width, kernel, padding = case
    generator = torch.Generator().manual_seed(0)
    con = Convolution((1, 1), padding, (1, 1))
    last = {"memory_format": torch.channels_last}
    x = torch.randint(0, 16, (num, in_channels, height, width), generator=generator).contiguous(**last)
    w = torch.randint(-7, 8, (out_channels, in_channels, *kernel), generator=generator).contiguous(**last)
    shape = con.fprop(x.double(), w.double()).shape
    exponents, signs = (torch.randint(low, high, shape, generator=generator) for low, high in ((-3, 4), (-1, 2)))
    return con, x, w, (4.0**exponents * signs).contiguous(**last)


@pytest.mark.parametrize("products", ["exact", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_exact_sums(case, products, exact_kernels):
    con, x, w, g = operands(case)
    gradient = Operand(g.bfloat16(), None, FP4_R4_EVEN)
    for which, other, like, format in (("dgrad", w, x, INT4_SYM), ("wgrad", x, w, UINT4)):
        operand = Operand(other.to(torch.int8), None, format)
        gemm = Gemm(which, con, gradient, operand, Layout.of(like), torch.float32, products)
        raw = backends.dispatch("gemm", gemm)
        exact = getattr(con, which)(g.double(), other.double(), like.double())
        value = raw.y.double() if raw.high is None else (raw.y.double() + 256.0 * raw.high.double()) * raw.unit
        if which == "dgrad" and products == "fast":
            torch.testing.assert_close(value, exact, rtol=2.0**-8, atol=1e-6)
        else:
            torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_left_to_others(exact_kernels):
    _, x, w, g = operands((1, 16, 16, 6, 6, (3, 3), (1, 1)))
    gradient = Operand(g.bfloat16(), None, FP4_R4_EVEN)
    for change in (Convolution((1, 1), (2, 2), (2, 2)), Convolution((1, 1), (1, 1), (1, 1), 2)):
        gemm = Gemm(
            "wgrad", change, gradient, Operand(x.to(torch.int8), None, UINT4), Layout.of(w), torch.float32, "exact"
        )
        assert backends.dispatch("gemm", gemm) is None
