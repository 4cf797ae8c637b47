"""The C functions write every byte that they promise, none beside it, and read nothing beyond their input.

Outputs lie between guard bands. Each call runs twice, on memory filled with two patterns: bytes that differ afterwards were
not written, guards that changed were. Inputs lie between NaN, which an amax or a sum would carry out.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from instruction_sets import instruction_set, isas
from kernel_cases import has_dot_product, needs_library, numbers, threads
from torch import Tensor

from fourbit import formats
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu import library
from fourbit.kernels.cpu._quantize import _table, float_grid, log_grid

pytestmark = needs_library
GUARD = 256
SIZES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 2**14 - 1, 2**14 + 65)
every_isa = pytest.mark.parametrize("isa", isas("round"))
every_isa_of_products = pytest.mark.parametrize("isa", isas("product"))
every_size = pytest.mark.parametrize("n", SIZES)


@dataclass
class Guarded:
    """Outputs between guard bands, all filled with one byte."""

    fill: int
    blocks: list[tuple[Tensor, int]] = field(default_factory=list)

    def output(self, num_bytes: int) -> int:
        """The address of so many bytes."""
        block = torch.full((num_bytes + 2 * GUARD,), self.fill, dtype=torch.uint8)
        self.blocks.append((block, num_bytes))
        return block.data_ptr() + GUARD

    def written(self) -> list[Tensor]:
        """The outputs, after a look at their guards."""
        for block, num_bytes in self.blocks:
            assert (block[:GUARD] == self.fill).all(), "wrote before its output"
            assert (block[GUARD + num_bytes :] == self.fill).all(), "wrote behind its output"
        return [block[GUARD : GUARD + num_bytes].clone() for block, num_bytes in self.blocks]


def input(x: Tensor) -> Tensor:
    """A copy of `x`, contiguous, at an odd offset between values that would show."""
    bad = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    return torch.cat([x.new_full((65,), bad), x, x.new_full((77,), bad)])[65 : 65 + x.numel()]


def check(isa: str, call: Callable[[Guarded], Any]) -> tuple[list[Tensor], Any]:
    """Runs `call` on two patterns; the outputs, which must not depend on them, and what it returned."""
    results = []
    for fill in (0xA5, 0x5A):
        memory = Guarded(fill)
        with instruction_set(isa), threads(3):
            returned = call(memory)
        results.append((memory.written(), returned))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b), "left a byte unwritten"
    assert results[0][1] == results[1][1], "read beyond its input"
    return results[0]


def blocks(n: int) -> int:
    return -(-n // 64)


def sources(n: int) -> Iterator[Tensor]:
    yield input(numbers(n, torch.float32))
    yield input(numbers(n, torch.bfloat16))


def amax(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@every_isa
@every_size
def test_clip_keeps_to_its_codes_packed_codes_and_mask(isa, n):
    for x in sources(n):
        for rule in (0, 1, 2, 3):
            for has_codes, has_packed in ((True, False), (False, True), (True, True)):

                def call(memory, x=x, rule=rule, has_codes=has_codes, has_packed=has_packed):
                    arguments = c.Clip(x=x.data_ptr(), dtype=c.CODES[x.dtype], n=n, inv_scale=3.0, low=-7.0, high=7.0)
                    arguments.mask_rule, arguments.bound = rule, 1.0
                    arguments.codes = memory.output(n) if has_codes else None
                    arguments.packed = memory.output(32 * blocks(n)) if has_packed else None
                    arguments.mask = memory.output(8 * blocks(n)) if rule else None
                    return library().clip(ctypes.byref(arguments))

                _, found = check(isa, call)
                assert found == amax(x)


@every_isa
@every_size
@pytest.mark.parametrize("rule", [0, 1, 2])
def test_log_round_keeps_to_its_outputs(isa, n, rule):
    radix_4 = (log_grid(formats.FP4_R4_EVEN), log_grid(formats.FP4_R4_ODD), torch.bfloat16)
    radix_2 = (log_grid(formats.FP4_R2), log_grid(formats.FP4_R2_139), torch.int8)
    for x in sources(n):
        for num, (*grids, dtype) in itertools.product((1, 2), (radix_4, radix_2)):

            def call(memory, x=x, num=num, grids=grids, dtype=dtype):
                arguments = c.LogRound(x=x.data_ptr(), dtype=c.CODES[x.dtype], n=n, inv_scale=1.0, num=num)
                arguments.rule, arguments.out_dtype = rule, c.CODES[dtype]
                for i in range(num):
                    out = memory.output(dtype.itemsize * n)
                    arguments.grid[i], arguments.out[i], arguments.key[i] = grids[i], out, 5 + i
                return library().log_round(ctypes.byref(arguments))

            _, found = check(isa, call)
            assert found == amax(x)


@every_isa
@every_size
def test_float_round_keeps_to_its_output(isa, n):
    for x in sources(n):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):

            def call(memory, x=x, dtype=dtype, size=size):
                arguments = c.FloatRound(x=x.data_ptr(), dtype=c.CODES[x.dtype], n=n, inv_scale=0.3)
                arguments.grid, arguments.out_dtype = float_grid(formats.FP8_152), c.CODES[dtype]
                arguments.out = memory.output(size * n)
                return library().float_round(ctypes.byref(arguments))

            _, found = check(isa, call)
            assert found == amax(x)


@every_isa
@every_size
@pytest.mark.parametrize("rule", [0, 1, 2])
@pytest.mark.parametrize("format", [formats.FP4_R2, formats.FP8_152], ids=str)  # counting edges, searching among them
def test_table_round_keeps_to_its_output(isa, n, rule, format):
    boundaries, levels = (input(t) for t in _table(format))
    for x in sources(n):
        for dtype in (torch.int8, torch.float32, torch.bfloat16):
            if dtype == torch.int8 and format.max > 127:
                continue

            def call(memory, x=x, dtype=dtype):
                arguments = c.TableRound(x=x.data_ptr(), dtype=c.CODES[x.dtype], n=n, inv_scale=0.3)
                arguments.boundaries, arguments.levels = boundaries.data_ptr(), levels.data_ptr()
                arguments.num_levels, arguments.overflow = len(levels), math.nan
                arguments.out, arguments.out_dtype = memory.output(dtype.itemsize * n), c.CODES[dtype]
                arguments.key, arguments.rule = 5, rule
                arguments.zero, arguments.smallest = format.grid.index(0.0), format.smallest
                return library().table_round(ctypes.byref(arguments))

            outputs, found = check(isa, call)
            assert found == amax(x)
            values = outputs[0].view(dtype).float()
            assert torch.isin(values, levels).all()


@every_isa
@every_size
def test_unpack_keeps_to_its_output(isa, n):
    packed = torch.randint(0, 256, (32 * blocks(n),), dtype=torch.uint8)
    for dtype in (torch.int8, torch.uint8, torch.bfloat16, torch.float32):

        def call(memory, dtype=dtype):
            arguments = c.Unpack(packed=packed.data_ptr(), n=n, is_signed=1, out_dtype=c.CODES[dtype])
            arguments.out = memory.output(dtype.itemsize * n)
            library().unpack(ctypes.byref(arguments))

        check(isa, call)


@every_isa
@every_size
def test_split_keeps_to_its_outputs_and_loses_nothing(isa, n):
    grid = torch.tensor(formats.FP4_R4_EVEN.grid, dtype=torch.bfloat16)
    x = input(grid[torch.arange(n) * 7 % len(grid)])

    def call(memory):
        arguments = c.Split(x=x.data_ptr(), n=n, unit=64.0, high=memory.output(n), low=memory.output(n))
        library().split(ctypes.byref(arguments))

    (high, low), _ = check(isa, call)
    assert torch.equal(256.0 * high.view(torch.int8) + low.view(torch.int8), 64 * x.float())


@every_isa
@every_size
def test_the_epilogue_keeps_to_its_output(isa, n):
    mask = torch.randint(0, 256, (8 * blocks(n),), dtype=torch.uint8)
    packed = torch.randint(0, 256, (32 * blocks(n),), dtype=torch.uint8)
    integers = input(torch.arange(n, dtype=torch.int32) * 977 - 10**5)
    cases = [(x, None) for x in (*sources(n), integers)] + [(integers, input(integers.clone()))]
    for x, high in cases:
        for dtype in (torch.float32, torch.bfloat16):
            for has_mask, has_codes, rounds in ((False, False, 1), (True, False, 0), (True, True, 1)):

                def call(memory, x=x, high=high, dtype=dtype, has_mask=has_mask, has_codes=has_codes, rounds=rounds):
                    arguments = c.Epilogue(x=x.data_ptr(), dtype=c.CODES[x.dtype], n=n, scale=1e-3, post=0.5)
                    arguments.high = None if high is None else high.data_ptr()
                    arguments.rounds, arguments.grid = rounds, float_grid(formats.FP16_169)
                    arguments.mask = mask.data_ptr() if has_mask else None
                    arguments.packed, arguments.is_signed = packed.data_ptr() if has_codes else None, 1
                    arguments.out, arguments.out_dtype = memory.output(dtype.itemsize * n), c.CODES[dtype]
                    return library().epilogue(ctypes.byref(arguments))

                check(isa, call)


@every_isa_of_products
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 32, 2), (13, 33, 3), (25, 47, 64), (5, 300, 7), (400, 16, 9)])
def test_a_matrix_product_keeps_to_its_output(isa, shape, turned):
    rows, columns, depth = shape
    a = input(radix_4(rows * depth))
    b = input(torch.arange(depth * columns, dtype=torch.int32).mul(37).remainder(255).sub(127).to(torch.int8))
    mask = torch.randint(0, 256, (8 * blocks(rows * columns),), dtype=torch.uint8)
    packed = torch.randint(0, 256, (32 * blocks(rows * columns),), dtype=torch.uint8)
    for masked in (False, True) if columns % 16 == 0 else (False,):

        def call(memory, masked=masked):
            arguments = c.MatMul(a=a.data_ptr(), turned=turned, b=b.data_ptr(), rows=rows, columns=columns, depth=depth)
            arguments.of = c.Integers(c.CODES[torch.bfloat16], 2.0**-6, -4096, 4096, -127, 127)
            arguments.out = memory.output(4 * rows * columns)
            arguments.scale, arguments.rounds, arguments.grid, arguments.post = (
                1e-3,
                1,
                float_grid(formats.FP16_169),
                0.5,
            )
            if masked:
                arguments.mask, arguments.packed, arguments.is_signed = mask.data_ptr(), packed.data_ptr(), 1
            done = library().multiply(ctypes.byref(arguments))
            assert bool(done) == library().has_products
            if not done:
                ctypes.memset(arguments.out, 0, 4 * rows * columns)
            return done, arguments.clipped

        check(isa, call)


def radix_4(n: int) -> Tensor:
    """Numbers of FP4_R4_EVEN."""
    grid = torch.tensor(formats.FP4_R4_EVEN.grid, dtype=torch.bfloat16)
    return grid[torch.arange(n) * 7 % len(grid)]


@every_isa_of_products
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (12, 32, 2), (13, 33, 3), (25, 47, 64), (5, 300, 7), (400, 16, 9), (7, 40, 5000)]
)
def test_products_of_bfloat16_keep_to_their_memory(isa, shape, turned):
    rows, columns, depth = shape
    a, b = input(radix_4(rows * depth)), input(radix_4(depth * columns))

    def call(memory):
        product = c.MatMul(a=a.data_ptr(), b16=b.data_ptr(), b_turned=turned, turned=turned, scale=1.0, post=1.0)
        product.rows, product.columns, product.depth = rows, columns, depth
        product.out = memory.output(4 * rows * columns)
        if not library().multiply(ctypes.byref(product)):  # the kernels that multiply integers
            ctypes.memset(product.out, 0, 4 * rows * columns)
            return isa
        return product.clipped

    check(isa, call)


@every_isa_of_products
@pytest.mark.parametrize("integers", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 32, 2), (13, 33, 3), (25, 47, 64), (5, 300, 7), (400, 16, 9)])
def test_panels_and_what_is_multiplied_by_them_keep_to_their_memory(isa, shape, integers):
    rows, columns, depth = shape
    a = input(torch.arange(rows * depth, dtype=torch.int32).remainder(16).to(torch.uint8)) if integers else None
    a = input(radix_4(rows * depth)) if a is None else a
    b = input(torch.arange(depth * columns, dtype=torch.int32).remainder(15).sub(7).to(torch.int8))

    def call(memory):
        product = c.MatMul(a=a.data_ptr(), b=b.data_ptr(), rows=rows, columns=columns, depth=depth, scale=1.0, post=1.0)
        product.integers = product.is_unsigned = integers
        product.out = memory.output(4 * rows * columns)
        product.of = c.Integers(c.CODES[torch.bfloat16], 2.0**-6, -4096, 4096, -7, 7)
        if integers:
            product.of = c.Integers(c.CODES[torch.uint8], 1.0, 0, 15, -7, 7)
        size = 4 * library().panel_count(ctypes.byref(product))
        product.panels = memory.output(size)
        if not library().pack_panels(ctypes.byref(product), product.panels):
            ctypes.memset(product.out, 0, 4 * rows * columns)
            return size
        return size, library().multiply(ctypes.byref(product))

    check(isa, call)


@every_isa_of_products
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
@pytest.mark.parametrize(
    "shape",  # num, in, out, height, width, kernel, padding, stride
    [
        (1, 16, 16, 1, 1, (1, 1), (0, 0), (1, 1)),
        (2, 16, 32, 5, 17, (3, 3), (1, 1), (1, 1)),
        (3, 20, 43, 6, 5, (3, 2), (2, 1), (2, 3)),
        (2, 3, 5, 4, 9, (2, 2), (0, 0), (3, 3)),
    ],
)
def test_gradients_of_a_convolution_keep_to_their_output(isa, shape, which):
    num, in_channels, out_channels, height, width, kernel, padding, stride = shape
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, kernel, stride, strict=True)]
    weights, images = out_channels * in_channels * kernel[0] * kernel[1], num * in_channels * height * width
    g = input(radix_4(num * out_channels * size[0] * size[1]))
    other = torch.arange(weights if which == "dgrad" else images, dtype=torch.int32).remainder(15).sub(7)
    other = input(other.to(torch.int8))
    num_bytes = 4 * (images if which == "dgrad" else weights)

    def call(memory, of):
        out = memory.output(num_bytes)
        geometry = (num, height, width, in_channels, *size, out_channels, *kernel, *padding, *stride)
        if which == "dgrad":
            arguments = c.ConvDgrad(g.data_ptr(), other.data_ptr(), out, 0, *geometry, of)
            done = library().conv_dgrad(ctypes.byref(arguments))
        else:
            arguments = c.ConvWgrad(other.data_ptr(), g.data_ptr(), out, *geometry, of)
            done = library().conv_wgrad(ctypes.byref(arguments))
        assert bool(done) == library().has_products
        if not done:
            ctypes.memset(out, 0, num_bytes)
        return done

    integers = c.Integers(c.CODES[torch.bfloat16], 2.0**-6, -4096, 4096, -7, 7)
    check(isa, lambda memory: call(memory, integers))
    if has_dot_product(isa) and stride == (1, 1) and in_channels % 16 == out_channels % 16 == 0:
        check(isa, lambda memory: call(memory, c.Integers()))


@every_isa_of_products
@pytest.mark.parametrize("halves", [0, 1])
@pytest.mark.parametrize(
    "shape",  # num, in, out, height, width, kernel, padding, stride
    [
        (1, 4, 16, 1, 1, (1, 1), (0, 0), (1, 1)),
        (2, 16, 16, 5, 17, (3, 3), (1, 1), (1, 1)),
        (3, 20, 48, 6, 5, (3, 2), (2, 1), (2, 3)),
        (2, 32, 32, 4, 9, (2, 2), (0, 0), (3, 3)),
    ],
)
def test_a_convolution_keeps_to_its_output(isa, shape, halves):
    num, in_channels, out_channels, height, width, kernel, padding, stride = shape
    x = input(torch.arange(num * in_channels * height * width, dtype=torch.int32).remainder(16).to(torch.uint8))
    w = input(
        torch.arange(out_channels * in_channels * kernel[0] * kernel[1], dtype=torch.int32).remainder(15).to(torch.int8)
    )
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, kernel, stride, strict=True)]
    num_bytes = num * out_channels * size[0] * size[1] * (2 if halves else 4)

    def call(memory):
        out = memory.output(num_bytes)
        geometry = (num, height, width, in_channels, *size, out_channels, *kernel, *padding, *stride)
        arguments = c.ConvFprop(x.data_ptr(), w.data_ptr(), out, halves, 1e-2, float_grid(formats.FP16_169), *geometry)
        arguments.of = c.Integers(c.CODES[torch.uint8], 1.0, 0, 15, -7, 14)
        done = library().conv_fprop(ctypes.byref(arguments))
        assert bool(done) == library().has_products
        if not done:
            ctypes.memset(out, 0, num_bytes)
        return done

    check(isa, call)


@every_isa
@every_size
def test_moments_read_their_input_only(isa, n):
    for x in sources(n):
        found = c.Moments()
        with instruction_set(isa), threads(3):
            library().moments(
                ctypes.c_void_p(x.data_ptr()), ctypes.c_int32(c.CODES[x.dtype]), ctypes.c_int64(n), ctypes.byref(found)
            )
        assert found.amax == amax(x)
        assert found.sum_abs == pytest.approx(float(x.double().abs().sum()), rel=1e-12)
        assert found.sum_square == pytest.approx(float(x.double().square().sum()), rel=1e-12)
