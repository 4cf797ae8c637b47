"""Scales and numbers of blocks along the summed axis, in Triton: each block is read once."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl

from fourbit.kernels.cuda._jit_grids import float_of, magnitude_bits, nearest, stochastic, uniform


@triton.jit(do_not_specialize=["key"])
def blocks_kernel(
    x, num_sums, num_blocks, factor, decode, key, q, each, amax, table, scale_table,
    GRID: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr, STOCHASTIC: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round blocks of SIZE. SCALE None: the floor rule to E8M0, for a target below 2^TOP; else amax * factor to that grid."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    per_row = tl.cdiv(num_sums, SIZE)
    start = (block % per_row) * SIZE
    begin = (block // per_row) * num_sums + start
    lane = tl.arange(0, SIZE)[None, :]
    inside = (block < num_blocks) & (start + lane < num_sums)
    v = tl.load(x + begin + lane, inside, other=0.0).to(tl.float32)
    top = tl.max(magnitude_bits(v), 1)[:, None]
    unit = tl.load(decode)
    if SCALE is None:
        exponent = tl.minimum(tl.maximum((top >> 23) - 126 - TOP, -127), 127)
        scale = float_of(tl.where(exponent == -127, 0x400000, (exponent + 127) << 23))
    else:
        scale = nearest(float_of(top) * tl.load(factor), scale_table, SCALE)
    scale = tl.where(top < 0x7F800000, scale, float("nan"))
    product = scale * unit
    inverse = tl.div_rn(tl.full((ROWS, 1), 1.0, tl.float32), product)
    inverse = tl.where(inverse > 3.4028234663852886e38, 3.4028234663852886e38, inverse)
    s = v * tl.where(scale == 0.0, 0.0, inverse)
    if STOCHASTIC:
        code = stochastic(s, uniform(key, begin // 2 + tl.arange(0, SIZE // 2)[None, :]), table, GRID)
    else:
        code = nearest(s, table, GRID)
    tl.store(q + begin + lane, (code * scale).to(q.dtype.element_ty), inside)
    tl.store(each + block, product, block < num_blocks)
    tl.store(amax + block, float_of(top), block < num_blocks)
