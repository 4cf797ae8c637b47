"""Rounding to a grid, as Triton code: what `fourbit.quantizers._round` defines, element by element in registers.

`GRID` is what `_grids.parameters` says of a format, known when a kernel is compiled. Every kernel that uses these functions
must be launched with enable_fp_fusion=False: a multiplication contracted with the addition behind it would round once where
the definition rounds twice. Divisions are `div_rn`, because Triton's `/` is only near in float32. Triton leaves subnormal
numbers as they are (no flushing to zero), and so must we.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    """The bit pattern of float32 numbers."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 numbers of bit patterns."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """The bit pattern of |x|: as integers these are ordered as the magnitudes are, with infinity and NaN on top."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def clamp(x, low, high):
    """torch.clamp: NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def count_below(s, edges, STEPS: tl.constexpr, INCLUSIVE: tl.constexpr):
    """How many of the 2^STEPS - 1 ascending numbers at `edges` are below s (or equal, if INCLUSIVE); 0 for NaN."""
    count = tl.zeros_like(bits_of(s))
    for i in tl.static_range(STEPS):
        step = 1 << (STEPS - 1 - i)
        edge = tl.load(edges + count + (step - 1))
        count = tl.where(s >= edge if INCLUSIVE else s > edge, count + step, count)
    return count


@triton.jit
def nearest(s, table, GRID: tl.constexpr):
    """Nearest rounding: `quantizers._round.nearest_number`, except that NaN becomes a number in integers."""
    if GRID[0] == "integers":
        y = tl.where(s > GRID[1], s, GRID[1])  # NaN becomes the lowest
        y = tl.where(y < GRID[2], y, GRID[2])
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to the nearest integer, ties to even, below 2^22
    elif GRID[0] == "log":
        magnitude = magnitude_bits(s)
        bits = ((magnitude - GRID[1]) & -GRID[4]) + GRID[2]
        bits = tl.where(magnitude >= GRID[1], tl.minimum(bits, GRID[3]), 0)
        y = float_of(bits | (bits_of(s) ^ magnitude))
    elif GRID[0] == "binary":
        most = 2.0 * GRID[4]
        x = clamp(s, -most, most)
        exponent = tl.maximum(bits_of(x) & 0x7F800000, GRID[2] << 23)
        # x + m - m rounds x to multiples of the quantum 2^(exponent - mantissa bits): m is 1.5 * 2^23 quanta
        m = float_of((exponent + ((23 - GRID[1]) << 23)) | 0x400000)
        y = (x + m) - m
        if GRID[3] > 0.0:  # no subnormals: between 0 and the smallest magnitude there is nothing; a tie goes to 0
            magnitude = tl.abs(x)
            tiny = tl.where(magnitude > 0.5 * GRID[3], tl.where(x < 0.0, -GRID[3], GRID[3]), 0.0)
            y = tl.where(magnitude < GRID[3], tiny, y)
        y = clamp(y, -GRID[4], GRID[4])
        if GRID[5] > 0.0:
            y = tl.where(tl.abs(s) >= GRID[5], tl.where(s < 0.0, float("-inf"), float("inf")), y)
        y = tl.where(s != s, s, y)
    elif GRID[0] == "bfloat16":
        y = s.to(tl.bfloat16).to(tl.float32)
    elif GRID[0] == "float16":
        y = s.to(tl.float16).to(tl.float32)
    else:
        y = tl.load(table + (1 << GRID[1]) + count_below(s, table, GRID[1], False))
        if GRID[4] > 0.0:
            y = tl.where(tl.abs(s) >= GRID[4], tl.where(s < 0.0, float("-inf"), float("inf")), y)
        y = tl.where(s != s, s, y)
    return y


@triton.jit
def stochastic(s, u, table, GRID: tl.constexpr):
    """Stochastic rounding: up where u < 2^24 (s - low) / (high - low); u in 0 .. 2^24 - 1. Not for "binary"."""
    if GRID[0] == "log":
        magnitude = magnitude_bits(s)
        bits = tl.minimum(((magnitude - GRID[2]) & -GRID[4]) + GRID[2], GRID[3])
        near = tl.where(magnitude >= GRID[2], float_of(bits), 0.0)
        far = tl.where(near > 0.0, near * GRID[7], GRID[5])
        far = tl.where(far < GRID[6], far, GRID[6])
        far = tl.where(near == float_of(magnitude), near, far)
        low = tl.where(s < 0.0, -far, near)
        high = tl.where(s < 0.0, -near, far)
        inside = clamp(s, -GRID[6], GRID[6])
    else:
        levels = table + (1 << GRID[1])
        inside = clamp(s, GRID[2], GRID[3])
        index = count_below(inside, levels + 1, GRID[1], True)
        low = tl.load(levels + index)
        high = tl.where(low >= inside, low, tl.load(levels + index + 1))
    threshold = tl.div_rn(inside - low, high - low) * 16777216.0  # 0 / 0 where low is high: then low
    q = tl.where(u < threshold, high, low)
    return tl.where(s != s, s, q) + 0.0  # -0.0 + 0.0 is +0.0


@triton.jit
def uniform(key, pairs):
    """The upper 24 bits of the random words of elements 2 i and 2 i + 1 for i in `pairs`, as float32, interleaved.

    SplitMix64 on a counter, as `fourbit.quantizers.random_words`: one 64-bit number gives the words of two elements.
    """
    z = (pairs + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    first = ((z >> 8) & 0xFFFFFF).to(tl.int32)
    second = ((z >> 40) & 0xFFFFFF).to(tl.int32)
    return tl.interleave(first, second).to(tl.float32)
