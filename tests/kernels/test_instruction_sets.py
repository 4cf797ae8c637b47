"""Every instruction set gives the same bytes, whatever the numbers: NaN, infinities, ties, subnormals, ragged ends.

The other tests compare each with the reference, which leaves open what becomes of a NaN, and the sign of zero; here nothing is
left open but which NaN it is.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from instruction_sets import instruction_set, isas
from kernel_cases import needs_library, numbers
from torch import Tensor

from fourbit import formats
from fourbit.formats import FloatFormat
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._quantize import _table, float_grid, kernels, log_grid

pytestmark = [
    needs_library,
    pytest.mark.skipif(len(isas()) < 2, reason="this machine has one instruction set: nothing to compare"),
]
SIZES = (0, 1, 15, 17, 63, 64, 65, 127, 1000)
every_size = pytest.mark.parametrize("n", SIZES)
FLOATS = [
    formats.FP16_169,
    formats.FP8_152,
    formats.FP4_E2M1,
    FloatFormat("to_infinity", exponent_bits=4, mantissa_bits=3, exponent_bias=7, specials="ieee", overflow="infinity"),
]

Outputs = dict[str, Tensor]
Call = Callable[[Outputs], Any]


def nasty(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of all sizes, ties between grid points, NaN and infinities, from another one on for each seed."""
    x = numbers(n, torch.float32, seed)
    bad = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 2.0**-126, -(2.0**-140), 2.5, -3.5, 0.625, -0.0])
    at = (torch.arange(n) + seed) % 11 == 5
    x[at] = bad[(torch.arange(int(at.sum())) + seed) % len(bad)]
    return x.to(dtype)


def inputs(n: int) -> list[Tensor]:
    """In every dtype that the kernels read, without numbers that are not finite, and with them."""
    return [make(n, dtype) for make in (numbers, nasty) for dtype in (torch.float32, torch.bfloat16)]


def comparable(t: Tensor) -> Tensor:
    """Bits, of which NaN has those of one NaN."""
    if t.is_floating_point():
        t = torch.where(t.isnan(), torch.full_like(t, math.nan), t)
        return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    return t


def agree(outputs: dict[str, tuple[int, torch.dtype]], call: Call) -> None:
    """Calls a kernel on each instruction set; outputs and what it returns must be the same."""
    results: dict[str, Outputs] = {}
    for isa in isas():
        found = {name: torch.full((size,), 77, dtype=torch.int8).to(dtype) for name, (size, dtype) in outputs.items()}
        with instruction_set(isa):
            returned = call(found)
        found["returned"] = torch.tensor([0.0 if returned is None else returned], dtype=torch.float64)
        results[isa] = {name: comparable(t) for name, t in found.items()}
    first, *others = results.values()
    for isa, other in zip(list(results)[1:], others, strict=True):
        for name, expected in first.items():
            wrong = (other[name] != expected).nonzero().flatten()
            assert not len(wrong), (isa, name, wrong[:5], other[name][wrong[:5]], expected[wrong[:5]])


def blocks(n: int) -> int:
    return -(-n // 64)


def bits(n: int, seed: int = 0) -> Tensor:
    """Packed codes, or masks."""
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@every_size
@pytest.mark.parametrize("rule", [0, 1, 2, 3])
def test_clip(n, rule):
    shapes = {"codes": (n, torch.int8), "packed": (32 * blocks(n), torch.uint8), "mask": (8 * blocks(n), torch.uint8)}
    for x in inputs(n):
        for low, high, bound in ((0.0, 15.0, 2.0), (-7.0, 7.0, 2.5), (0.0, 255.0, math.inf), (-128.0, 127.0, math.nan)):

            def call(out: Outputs, x=x, low=low, high=high, bound=bound):
                t = c.Clip(x.data_ptr(), c.CODES[x.dtype], n, 1.7, low, high, rule, bound)
                t.codes, t.packed = out["codes"].data_ptr(), out["packed"].data_ptr()
                t.mask = out["mask"].data_ptr() if rule else None
                return kernels().clip(ctypes.byref(t))

            agree(shapes, call)


@every_size
@pytest.mark.parametrize("rule", [0, 1, 2])
@pytest.mark.parametrize(
    ("pair", "dtype"),
    [
        (("fp4_r4_even", "fp4_r4_odd"), torch.bfloat16),
        (("fp4_r2", "fp4_r2_139"), torch.bfloat16),
        (("fp4_r2_139", "fp4_r2"), torch.int8),
        (("fp4_r4_odd",), torch.bfloat16),
    ],
    ids=str,
)
def test_log_round(n, rule, pair, dtype):
    shapes = {str(i): (n, dtype) for i in range(len(pair))}
    for x in inputs(n):
        for scale in (1.0, 0.3, 2.0**-60):

            def call(out: Outputs, x=x, scale=scale):
                t = c.LogRound(x.data_ptr(), c.CODES[x.dtype], n, scale, len(pair))
                t.rule, t.out_dtype = rule, c.CODES[dtype]
                for i, name in enumerate(pair):
                    t.grid[i], t.out[i] = log_grid(formats.get(name)), out[str(i)].data_ptr()
                    t.key[i] = 2**64 - 5 + i
                return kernels().log_round(ctypes.byref(t))

            agree(shapes, call)


@every_size
@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_float_round(n, format):
    for x in inputs(n):
        for dtype in (torch.float32, torch.bfloat16):
            for scale in (1.0, 0.3, 2.0**-100, 2.0**100):

                def call(out: Outputs, x=x, dtype=dtype, scale=scale):
                    t = c.FloatRound(x.data_ptr(), c.CODES[x.dtype], n, scale, float_grid(format))
                    t.out, t.out_dtype = out["out"].data_ptr(), c.CODES[dtype]
                    return kernels().float_round(ctypes.byref(t))

                agree({"out": (n, dtype)}, call)


@every_size
@pytest.mark.parametrize("rule", [0, 1, 2])
@pytest.mark.parametrize("name", ["int4_sym", "fp4_e2m1", "fp4_r4_odd", "int8", "fp8_152", "fp8_e4m3fn"])
def test_table_round(n, rule, name):
    format = formats.get(name)
    boundaries, levels = _table(format)  # type: ignore[misc]
    overflow = 0.8 * format.max if format.max > 127 else math.nan
    for x in inputs(n):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            if dtype == torch.int8 and format.max > 127:
                continue

            def call(out: Outputs, x=x, dtype=dtype):
                t = c.TableRound(x.data_ptr(), c.CODES[x.dtype], n, 1.7, boundaries.data_ptr(), levels.data_ptr())
                t.num_levels, t.overflow, t.key, t.rule = len(format.grid), overflow, 99, rule
                t.out, t.out_dtype = out["out"].data_ptr(), c.CODES[dtype]
                t.zero, t.smallest = format.grid.index(0.0), format.smallest
                return kernels().table_round(ctypes.byref(t))

            agree({"out": (n, dtype)}, call)


@every_size
def test_unpack(n):
    packed = bits(32 * blocks(n))
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        for signed in (0, 1):

            def call(out: Outputs, dtype=dtype, signed=signed):
                t = c.Unpack(packed.data_ptr(), n, signed, out["out"].data_ptr(), c.CODES[dtype])
                kernels().unpack(ctypes.byref(t))

            agree({"out": (n, dtype)}, call)


@every_size
def test_split(n):
    for x in inputs(n):
        if x.dtype == torch.bfloat16:

            def call(out: Outputs, x=x):
                t = c.Split(x.data_ptr(), n, 64.0, out["high"].data_ptr(), out["low"].data_ptr())
                kernels().split(ctypes.byref(t))

            agree({"high": (n, torch.int8), "low": (n, torch.int8)}, call)


@every_size
def test_moments(n):
    for x in inputs(n):

        def call(out: Outputs, x=x):
            found = c.Moments()
            kernels().moments(ctypes.c_void_p(x.data_ptr()), c.CODES[x.dtype], ctypes.c_int64(n), ctypes.byref(found))
            out["out"].copy_(torch.tensor([found.sum_square, found.sum_abs, found.amax], dtype=torch.float64))

        agree({"out": (3, torch.float64)}, call)


@every_size
@pytest.mark.parametrize("format", FLOATS, ids=str)
@pytest.mark.parametrize("keep_infinite", [0, 1])
def test_epilogue(n, format, keep_infinite):
    mask, packed = bits(8 * blocks(n)), bits(32 * blocks(n), 1)
    integers = torch.randint(-(2**31), 2**31 - 1, (2, n), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    cases = [(x, None) for x in (*inputs(n), integers[0])] + [(integers[0], integers[1])]
    for x, high in cases:
        for dtype in (torch.float32, torch.bfloat16):
            for rounds, has_mask, has_codes, post in ((0, 0, 0, 1.0), (1, 0, 0, 0.3), (1, 1, 0, 1.0), (1, 1, 1, 0.3)):

                def call(out: Outputs, x=x, high=high, dtype=dtype, options=(rounds, has_mask, has_codes, post)):
                    rounds, has_mask, has_codes, post = options
                    t = c.Epilogue(x.data_ptr(), c.CODES[x.dtype], n, None if high is None else high.data_ptr(), 0.01)
                    t.rounds, t.keep_infinite, t.grid, t.post = rounds, keep_infinite, float_grid(format), post
                    t.mask = mask.data_ptr() if has_mask else None
                    t.packed, t.is_signed = packed.data_ptr() if has_codes else None, 1
                    t.out, t.out_dtype = out["out"].data_ptr(), c.CODES[dtype]
                    return kernels().epilogue(ctypes.byref(t))

                agree({"out": (n, dtype)}, call)


SHAPES = ((1, 1), (63, 1), (64, 1), (5, 13), (21, 3), (7, 64), (3, 100), (33, 16))
"""Rows, channels."""

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def addresses(table: Tensor) -> list[int]:
    """Of the rows of a table."""
    return [row.data_ptr() for row in table]


def channel_numbers(channels: int) -> Tensor:
    """Six rows of ordinary numbers, one for each channel."""
    return torch.rand(6, channels, generator=torch.Generator().manual_seed(3)) + 0.5


@every_shape
@pytest.mark.parametrize("kind", ["float32", "rounded", "halves", "coded"])
def test_norm_statistics(shape, kind):
    rows, channels = shape
    n, weights = rows * channels, channel_numbers(channels)
    for x in (numbers(n, torch.float32).clamp(-1e4, 1e4), nasty(n, torch.float32)):
        codes = torch.randint(-(2**15), 2**15, (n,), generator=torch.Generator().manual_seed(1)).to(torch.int16)

        def call(out: Outputs, x=x, codes=codes):
            t = c.NormStatistics(y=x.data_ptr(), rows=rows, channels=channels, scale=0.3, eps=1e-5, momentum=0.1)
            t.rounds, t.coded, t.halves = kind != "float32", kind == "coded", kind in ("halves", "coded")
            t.grid, t.gamma, t.beta = float_grid(formats.FP16_169), *addresses(weights)[:2]
            out["running"].copy_(weights[2:4].flatten())
            t.running_mean, t.running_var = addresses(out["running"].view(2, -1))
            t.mean, t.inv_std, t.slope, t.offset = addresses(out["moments"].view(4, -1))
            if kind == "coded":
                out["kept"].copy_(codes)
            t.kept = out["kept"].data_ptr()
            kernels().norm_statistics(ctypes.byref(t))

        kept = torch.int16 if kind in ("halves", "coded") else torch.float32
        shapes = {"kept": (n, kept), "moments": (4 * channels, torch.float32), "running": (2 * channels, torch.float32)}
        agree(shapes, call)


@every_shape
@pytest.mark.parametrize("rule", [1, 2, 3])
@pytest.mark.parametrize(("act", "cap"), [(0, math.inf), (1, math.inf), (1, 0.7)])
def test_norm_apply(shape, rule, act, cap):
    rows, channels = shape
    n, weights = rows * channels, channel_numbers(channels)
    outputs = {
        "codes": (n, torch.int8),
        "packed": (32 * blocks(n), torch.uint8),
        "mask": (8 * blocks(n), torch.uint8),
        "pass": (8 * blocks(n), torch.uint8),
        "out": (n, torch.float32),
    }
    residual = nasty(n, torch.float32, 4)
    codes = torch.randint(-(2**15), 2**15, (n,), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    for kept, sums, clips in ((codes, 0, 1), (codes, 1, 1), (residual.neg(), 1, 1), (codes, 1, 0)):

        def call(out: Outputs, kept=kept, sums=sums, clips=clips):
            t = c.NormApply(kept=kept.data_ptr(), halves=kept.dtype == torch.int16, rows=rows, channels=channels)
            t.grid, t.slope, t.offset = float_grid(formats.FP16_169), *addresses(weights)[:2]
            t.residual = residual.data_ptr() if sums else None
            t.act, t.cap, t.clips = act, cap, clips
            t.out, t.passes = out["out"].data_ptr(), out["pass"].data_ptr()
            t.clip.inv_scale, t.clip.low, t.clip.high, t.clip.mask_rule, t.clip.bound = 7.0, -7.0, 7.0, rule, 1.0
            t.clip.codes, t.clip.packed, t.clip.mask = (out[name].data_ptr() for name in ("codes", "packed", "mask"))
            return kernels().norm_apply(ctypes.byref(t))

        agree(outputs, call)


@every_shape
@pytest.mark.parametrize("token", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num", [0, 1, 2])
def test_norm_backward(shape, token, num):
    rows, channels = shape
    n, weights = rows * channels, channel_numbers(channels)
    shapes = {str(i): (n, torch.bfloat16 if num else torch.float32) for i in range(max(num, 1))}
    shapes |= {"g": (n, torch.float32), "sums": (2 * channels, torch.float32), "clipped": (1, torch.float64)}
    codes = torch.randint(-(2**15), 2**15, (n,), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    mask, packed, passing = bits(8 * blocks(n)), bits(32 * blocks(n), 1), bits(8 * blocks(n), 2)
    for bad in (False, True):
        x, dq, do = (nasty(n, torch.float32, i) if bad else numbers(n, torch.float32, i) for i in range(3))
        dq = None if token is None else dq.to(token)
        for act, has_pass, has_grad, has_g, halves, cap_clips in (
            *((1, 0, 1, 1, 1, 0), (1, 0, 1, 0, 1, 1), (1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 1, 0), (1, 1, 0, 1, 0, 1)),
        ):

            def call(
                out: Outputs, x=x, dq=dq, do=do, bad=bad, options=(act, has_pass, has_grad, has_g, halves, cap_clips)
            ):
                act, has_pass, has_grad, has_g, halves, cap_clips = options
                t = c.NormBackward(rows=rows, channels=channels, act=act, cap_clips=cap_clips, halves=halves, num=num)
                t.token, t.token_scale = None if dq is None else dq.data_ptr(), 0.3
                t.token_dtype = 0 if dq is None else c.CODES[dq.dtype]
                t.packed, t.is_signed, t.mask = packed.data_ptr(), 1, mask.data_ptr()
                t.out_grad = do.data_ptr() if has_grad else None
                t.passes = passing.data_ptr() if has_pass else None
                t.kept, t.grid = (codes if halves else x).data_ptr(), float_grid(formats.FP16_169)
                t.gamma, t.mean, t.inv_std = addresses(weights)[:3]
                t.g = out["g"].data_ptr() if has_g else None
                t.dgamma, t.dbeta = addresses(out["sums"].view(2, -1))
                t.inv_scale = 3.0
                for i in range(max(num, 1)):
                    t.out[i] = out[str(i)].data_ptr()
                    t.log_grid[i] = log_grid((formats.FP4_R4_EVEN, formats.FP4_R4_ODD)[i])
                largest = kernels().norm_backward(ctypes.byref(t))
                out["clipped"].fill_(t.clipped)
                for i in range(num if bad else 0):
                    out[str(i)].abs_()  # what a NaN becomes has its sign, and that of a sum of two is open
                return largest

            agree(shapes, call)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (9, 16), (2, 67), (1, 130)])
def test_lstm(rows, size):
    shapes: dict[str, tuple[int, torch.dtype]] = {
        **dict.fromkeys(("h", "c", "before"), (rows * size, torch.float32)),
        **dict.fromkeys(("kept", "gates"), (4 * rows * size, torch.float32)),
    }
    for make in (numbers, nasty):
        x, u, cell = (make(k * rows * size, torch.float32, i) for i, k in enumerate((4, 4, 1)))

        def call(out: Outputs, x=x, u=u, cell=cell):
            at = {name: t.data_ptr() for name, t in out.items()}
            forward = c.LstmForward(
                x.data_ptr(), u.data_ptr(), cell.data_ptr(), at["kept"], at["h"], at["c"], rows, size
            )
            kernels().lstm_forward(ctypes.byref(forward))
            from_h, before = u.data_ptr(), cell.data_ptr()
            backward = c.LstmBackward(
                from_h, before, at["kept"], before, at["c"], at["gates"], at["before"], rows, size
            )
            kernels().lstm_backward(ctypes.byref(backward))

        agree(shapes, call)
