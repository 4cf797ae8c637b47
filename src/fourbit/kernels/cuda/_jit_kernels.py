"""The kernels, in Triton: one pass over memory each.

Elements are taken in the order in which they lie in memory, in blocks of 64 (see `fourbit.quantizers.Packed`). A program
works on ROWS blocks, held as two tiles [ROWS, 32], the first and the second half of each block: byte i of a packed block
holds element i of both, so packing moves nothing between threads, and every access is to whole lines of memory.

Scales and clip values are read from device memory, and amax is left there: nothing waits for the host. Offsets within a
program are 32-bit, the program's own start is 64-bit, so tensors may have more than 2^31 elements.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportOptionalSubscript=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fourbit.kernels.cuda._jit_grids import magnitude_bits, nearest, stochastic, uniform


@triton.jit
def _offsets(HALF: tl.constexpr, ROWS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * 64 + (HALF * 32 + tl.arange(0, 32)[None, :])


@triton.jit
def _store(pointer, value, inside):
    """Store float32 numbers as the pointer's type, integers by way of int32."""
    if pointer.dtype.element_ty.is_int():
        tl.store(pointer, value.to(tl.int32).to(pointer.dtype.element_ty), inside)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), inside)


@triton.jit
def _grid_value(
    s, begin, key, table, GRID: tl.constexpr, STOCHASTIC: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    if STOCHASTIC:
        pairs = begin // 2 + tl.arange(0, ROWS)[:, None] * 32 + (HALF * 16 + tl.arange(0, 16)[None, :])
        return stochastic(s, uniform(key, pairs), table, GRID)
    return nearest(s, table, GRID)


@triton.jit
def _round_half(
    x, left, begin, inv_scale, bound, key, first, second, first_table, second_table,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STOCHASTIC: tl.constexpr, RULE: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One half of the blocks: stores carriers; returns codes (as int32), the bits that pass, and the largest magnitude."""
    offset = _offsets(HALF, ROWS)
    inside = offset < left
    v = tl.load(x + offset, inside, other=0.0).to(tl.float32)
    s = v * inv_scale
    q = _grid_value(s, begin, key, first_table, FIRST, STOCHASTIC, HALF, ROWS)
    if first is not None:
        _store(first + offset, q, inside)
    if second is not None:
        _store(second + offset, nearest(s, second_table, SECOND), inside)
    passes = inside
    if RULE == "unsigned":
        passes = inside & (v >= 0.0) & (v < bound)
    elif RULE == "symmetric":
        passes = inside & (v > -bound) & (v < bound)
    elif RULE == "inclusive":
        passes = inside & (tl.abs(v) <= bound)
    word = tl.sum(passes.to(tl.int32) << tl.arange(0, 32)[None, :], 1)
    codes = tl.where(inside, q, 0.0).to(tl.int32)
    return codes, word, tl.max(tl.max(magnitude_bits(v), 1), 0)


@triton.jit(do_not_specialize=["key"])
def round_kernel(
    x, n, scale, bound, amax, key, first, second, packed, mask, first_table, second_table,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STOCHASTIC: tl.constexpr, RULE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round x / scale to one or two grids; optionally packed codes (of the first) and the clip mask; amax by atomic max.

    amax is an int32 that holds the bit pattern of a float32 and starts at 0; `packed` is uint8, `mask` int32; what is None
    is not wanted. RULE says which elements pass the clip range: see `quantizers.Bound`.
    """
    begin = tl.program_id(0).to(tl.int64) * (ROWS * 64)
    left = n - begin
    one = tl.full((), 1.0, tl.float32)
    inv_scale = tl.div_rn(one, tl.load(scale))
    limit = one
    if bound is not None:
        limit = tl.load(bound)
    x += begin
    if first is not None:
        first += begin
    if second is not None:
        second += begin
    low, low_word, low_top = _round_half(
        x, left, begin, inv_scale, limit, key, first, second, first_table, second_table,
        FIRST, SECOND, STOCHASTIC, RULE, 0, ROWS,
    )  # fmt: skip
    high, high_word, high_top = _round_half(
        x, left, begin, inv_scale, limit, key, first, second, first_table, second_table,
        FIRST, SECOND, STOCHASTIC, RULE, 1, ROWS,
    )  # fmt: skip
    tl.atomic_max(amax, tl.maximum(low_top, high_top), sem="relaxed")
    row = tl.arange(0, ROWS)
    if packed is not None:
        byte = (low & 15) | ((high & 15) << 4)
        position = row[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(packed + begin // 2 + position, byte.to(tl.uint8), row[:, None] * 64 < left)
    if mask is not None:
        mask += begin // 32
        tl.store(mask + row * 2, low_word, row * 64 < left)
        tl.store(mask + row * 2 + 1, high_word, row * 64 < left)


@triton.jit
def round_pair_transposed_kernel(
    x, num_rows, num_columns, scale, amax, first, second, first_table, second_table,
    FIRST: tl.constexpr, SECOND: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Round a matrix to two grids: the first as it lies, the second transposed, as the two backward products want them."""
    tiles = tl.cdiv(num_columns, TILE_COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = (tl.program_id(0) % tiles).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    inv_scale = tl.div_rn(tl.full((), 1.0, tl.float32), tl.load(scale))
    v = tl.load(x + row * num_columns + column, inside, other=0.0).to(tl.float32)
    s = v * inv_scale
    _store(first + row * num_columns + column, nearest(s, first_table, FIRST), inside)
    turned = tl.trans(nearest(s, second_table, SECOND))
    _store(second + tl.trans(column) * num_rows + tl.trans(row), turned, tl.trans(inside))
    tl.atomic_max(amax, tl.max(tl.max(magnitude_bits(v), 1), 0), sem="relaxed")


@triton.jit
def moments_kernel(x, n, square, absolute, amax, BLOCK: tl.constexpr):
    """Sums of x^2 and |x| in float64, one of each per program (so that their order is fixed), and max|x| by atomic max."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    v = tl.load(x + begin + offset, offset < n - begin, other=0.0).to(tl.float32)
    size = tl.abs(v).to(tl.float64)
    tl.store(square + tl.program_id(0), tl.sum(size * size, 0))
    tl.store(absolute + tl.program_id(0), tl.sum(size, 0))
    tl.atomic_max(amax, tl.max(magnitude_bits(v), 0), sem="relaxed")


@triton.jit
def _code(byte, HALF: tl.constexpr, SIGNED: tl.constexpr):
    nibble = (byte.to(tl.int32) >> (4 * HALF)) & 15
    return ((nibble ^ 8) - 8) if SIGNED else nibble


@triton.jit
def unpack_kernel(packed, n, out, SIGNED: tl.constexpr, ROWS: tl.constexpr):
    """Packed codes as numbers of the type of `out`."""
    begin = tl.program_id(0).to(tl.int64) * (ROWS * 64)
    left = n - begin
    row = tl.arange(0, ROWS)[:, None]
    byte = tl.load(packed + begin // 2 + row * 32 + tl.arange(0, 32)[None, :], row * 64 < left, other=0)
    for HALF in tl.static_range(2):
        offset = _offsets(HALF, ROWS)
        _store(out + begin + offset, _code(byte, HALF, SIGNED).to(tl.float32), offset < left)


@triton.jit
def unpack_transposed_kernel(packed, num_rows, num_columns, out, SIGNED: tl.constexpr, ROWS: tl.constexpr):
    """Packed codes of a matrix whose rows are whole blocks, as the transposed matrix [num_columns, num_rows]."""
    blocks = num_columns // 64
    block = (tl.program_id(0) % blocks).to(tl.int64)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    byte = tl.load(packed + (row * blocks + block) * 32 + lane, row < num_rows, other=0)
    for HALF in tl.static_range(2):
        column = block * 64 + HALF * 32 + tl.trans(lane)
        turned = tl.trans(_code(byte, HALF, SIGNED).to(tl.float32))
        _store(out + column * num_rows + tl.trans(row), turned, tl.trans(row < num_rows))


@triton.jit
def epilogue_kernel(
    y, n, unit, scale, late, mask, packed, out, clipped, table,
    GRID: tl.constexpr, KEEP_INFINITE: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = late * round(scale * unit * y), zero where the mask is not set; what was zeroed is summed by the codes' signs.

    y is float32, bfloat16, float16 or int32; `clipped` gets one float32 sum per program.
    """
    begin = tl.program_id(0).to(tl.int64) * (ROWS * 64)
    left = n - begin
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, 32), tl.float32)
    byte = tl.zeros((ROWS, 32), tl.uint8)
    if packed is not None:
        byte = tl.load(packed + begin // 2 + row * 32 + tl.arange(0, 32)[None, :], row * 64 < left, other=0)
    for HALF in tl.static_range(2):
        offset = _offsets(HALF, ROWS)
        inside = offset < left
        v = tl.load(y + begin + offset, inside, other=0).to(tl.float32) * unit
        if scale is not None:
            v = v * tl.load(scale)
        if GRID is not None:
            rounded = nearest(v, table, GRID) + 0.0
            if KEEP_INFINITE:
                rounded = tl.where(tl.abs(v) == float("inf"), v, rounded)
            v = tl.where(v != v, v, rounded)
        if late is not None:
            v = v * tl.load(late)
        if mask is not None:
            word = tl.load(mask + begin // 32 + row * 2 + HALF, row * 64 < left, other=0)
            passes = ((word >> tl.arange(0, 32)[None, :]) & 1) != 0
            if packed is not None:
                code = _code(byte, HALF, SIGNED)
                signed = tl.where(code > 0, v, tl.where(code < 0, -v, 0.0))
                total += tl.where(passes | (offset >= left), 0.0, signed)
            v = tl.where(passes, v, 0.0)
        tl.store(out + begin + offset, v.to(out.dtype.element_ty), inside)
    if packed is not None:
        tl.store(clipped + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))
