"""Tensors of more than 2^31 elements: indices do not overflow. Inputs are untouched zero pages, which take no memory."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import needs_library
from torch import Tensor

from fourbit import backends, formats
from fourbit.kernels.cpu import library
from fourbit.ops import Finish, Layout, Raw
from fourbit.quantizers import (
    ClipValue,
    FixedScale,
    Packed,
    QuantSpec,
    Request,
    Rounding,
    mix64,
    quantize,
    request_for,
    stream_key,
)

N = 2**31 + 64 * 5 + 7
MARKED = (0, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 100, N - 1)
STARTS = (0, 2**31 - 64, 2**31, N // 64 * 64)
"""Blocks that are looked at."""


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0


pytestmark = [
    pytest.mark.slow,
    needs_library,
    pytest.mark.skipif(_free_bytes() < 9 * 2**30, reason="needs Linux and 9 GiB of free memory (uses up to 5)"),
]


def kernel(operation: str):
    """The CPU's kernel of an operation."""
    return next(k for k in backends.kernels() if (k.operation, k.backend) == (operation, "cpu"))


@pytest.fixture
def x() -> Iterator[Tensor]:
    """bfloat16 zeros, a few elements apart."""
    torch.set_num_threads(max(2, os.cpu_count() or 1))
    memory = mmap.mmap(-1, 2 * N)
    x = torch.frombuffer(memory, dtype=torch.bfloat16)
    for i, position in enumerate(MARKED):
        x[position] = 0.3 * (i + 1)
    assert x.numel() == N
    return x


def test_clipping_packing_masks_and_unpacking(x):
    spec, alpha = QuantSpec("uint4", ClipValue()), torch.tensor(1.4)
    request = Request(x, spec, formats.UINT4, None, alpha, None, save=True, carrier=False)
    found = kernel("round")(request, alpha / 15)
    assert found.q is None and float(found.amax) == float(x[N - 1])
    for start in STARTS:
        part = x[start : start + 64]
        with backends.without():
            q = quantize(part, spec, stored=alpha).q
            inside = (part >= 0) & (part < alpha)
        block = Packed(found.packed.data[start // 2 : start // 2 + 32], q.shape, q.stride(), False)
        assert torch.equal(block.unpack(torch.uint8), q) and q.any()
        bits = found.mask[start // 8 : start // 8 + 8].tolist()
        assert [bits[i // 8] >> (i % 8) & 1 for i in range(len(part))] == inside.int().tolist()
    unpacked = kernel("unpack")(found.packed, torch.uint8)
    for start in STARTS:
        with backends.without():
            assert torch.equal(unpacked[start : start + 64], quantize(x[start : start + 64], spec, stored=alpha).q)
    assert int(unpacked[2**31 - 10**6 :].ne(0).sum()) == len(MARKED) - 1


def test_powers_of_a_radix(x):
    spec = QuantSpec("fp4_r4_even", FixedScale(0.01))
    found = kernel("round")(Request(x, spec, spec.format), torch.tensor(0.01))
    for start in STARTS:
        with backends.without():
            expected = quantize(x[start : start + 64], spec).q
        assert torch.equal(found.q[start : start + 64], expected) and expected.any()


def test_random_words_by_position(x):
    """Beyond element 2^31 the words are those of their position, not of a position that wrapped."""
    key, n = 5, 64
    spec = QuantSpec("fp4_r2", FixedScale(0.7), rounding=Rounding.STOCHASTIC)
    x[2**31 : 2**31 + n] = 2.0  # 2.857 in grid units: 2 or 4
    found = kernel("round")(request_for(x, spec, key=key), torch.tensor(0.7)).q[2**31 : 2**31 + n].tolist()
    threshold = (float(torch.tensor(2.0) * torch.tensor(0.7).reciprocal()) - 2.0) / 2.0 * 2**24
    for i in range(n):
        position = 2**31 + i
        z = mix64((position // 2 + 1) * 0x9E3779B97F4A7C15 + stream_key(key, 0))
        word = (z >> (32 * (position % 2))) & 0xFFFFFFFF
        assert found[i] == (4 if (word >> 8) < threshold else 2)


def test_moments(x):
    found = kernel("moments")(x)
    marked = x[list(MARKED)].double()
    assert float(found.mean_abs) == pytest.approx(float(marked.sum()) / N, rel=1e-12)
    assert float(found.mean_square) == pytest.approx(float(marked.square().sum()) / N, rel=1e-12)
    assert float(found.amax) == float(marked.max())


def test_the_epilogue(x):
    expected = {start: (x[start : start + 64].float() * 0.5).to(torch.bfloat16) for start in STARTS}
    finish = Finish(torch.tensor(0.5), None, False, None, torch.bfloat16, Layout(x.shape, (1,)))
    found, _ = kernel("epilogue")(Raw(x, rounded=True), finish)
    for start, part in expected.items():
        assert torch.equal(found[start : start + 64], part) and part.any()
    assert library() is not None
