"""Rounding on the CPU: which kernel rounds to which kind of grid.

Integers with nearest rounding go through `clip` (codes, packed codes and mask in one pass), powers of a radix through
`log_round` (two grids in one pass), binary floats through `float_round`, every other grid of 8 bits or fewer, and
stochastic rounding, through `table_round`. What none of them takes is left to the reference.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.formats import FloatFormat, Format
from fourbit.kernels._check import bits_of, codes_of, is_plain, is_same, mask_bytes, optional, packed_bytes, pointer
from fourbit.kernels.cpu import _library as c
from fourbit.quantizers import (
    Binary,
    Bound,
    Cast,
    Integers,
    Logarithmic,
    Moments,
    Packed,
    Request,
    Rounded,
    Rounding,
    Table,
    carrier_dtype,
    float_bits,
    grid_of,
    has_integer_codes,
    stream_key,
    to_float32,
)

RULES = {"unsigned": 1, "symmetric": 2, "inclusive": 3}
"""Clip ranges as the library numbers them."""
RULE_OF = {Rounding.NEAREST: 0, Rounding.STOCHASTIC: 1, Rounding.UNDERFLOW: 2}
"""Rounding rules likewise."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOG_CARRIERS = (torch.bfloat16, torch.int8)


def kernels() -> c.Library:
    """The loaded library."""
    loaded = c.library()
    assert loaded is not None
    return loaded


def readable(x: Tensor) -> Tensor:
    """`x` in a dtype that the kernels read: float16 becomes float32, which holds it exactly."""
    return x.to(torch.float32) if x.dtype == torch.float16 else x


@lru_cache(maxsize=64)
def float_grid(format: Format) -> Any | None:
    """The parameters of a binary float format for the kernels; None for other formats."""
    grid = grid_of(format)
    if not isinstance(grid, (Binary, Cast)) or format.min != -format.max:
        return None
    f = grid.format
    if f.max >= 2.0 ** (103 + f.mantissa_bits):  # 2^23 quanta of twice that must be finite
        return None
    lowest = (1 if f.subnormals else 0) - f.exponent_bias + 127
    if lowest <= f.mantissa_bits or f.mantissa_bits > 20:
        return None
    smallest = 0.0 if f.subnormals else float(f.smallest)
    return c.FloatGrid(f.mantissa_bits, lowest, smallest, f.min, f.max, _overflow(f))


def _overflow(format: Format) -> float:
    """The magnitude from which numbers become infinite; NaN, which no number reaches, where they saturate."""
    return float(format.overflow_point) if format.overflow == "infinity" else math.nan


@lru_cache(maxsize=64)
def is_half(format: Format | None) -> bool:
    """Whether 16 bits hold a number of the format by its exponent and mantissa alone, and the kernels know it."""
    return (
        isinstance(format, FloatFormat)
        and (format.bits, format.overflow) == (16, "saturate")
        and not format.subnormals
        and format.is_binary
        and float_grid(format) is not None
    )


@lru_cache(maxsize=64)
def log_grid(format: Format) -> Any | None:
    """The parameters of a logarithmic grid for the kernels; None for other formats."""
    grid = grid_of(format)
    if not isinstance(grid, Logarithmic) or format.overflow == "infinity":
        return None
    octaves = int(math.log2(grid.ratio)) << 23
    start = float_bits(grid.threshold)
    if start & 0xFFFF:  # the kernels look at 16 bits
        return None
    return c.LogGrid(start, float_bits(grid.smallest), float_bits(grid.largest), octaves)


@lru_cache(maxsize=64)
def _table(format: Format) -> tuple[Tensor, Tensor] | None:
    if format.bits > 8:
        return None
    grid = Table(format)
    return grid.boundaries.contiguous(), grid.levels.contiguous()


def _inverse(scale: Tensor) -> float:
    return to_float32(1.0 / float(scale))


def takes(request: Request, scale: Tensor) -> bool:
    """Whether a kernel may round this, to a grid that it knows."""
    x = request.x
    return (
        x.is_cpu
        and x.dtype in _DTYPES
        and is_plain(x)
        and request.dims is None
        and scale.numel() == 1
        and scale.is_cpu
        and request.spec.samples == 1
        and request.spec.rounding is not Rounding.TRUNCATE
        and (request.key is not None or not request.spec.stochastic)
    )


@backends.register("round", "cpu")
def round_one(request: Request, scale: Tensor) -> Rounded | None:
    """One operand, to one format."""
    if not takes(request, scale):
        return None
    grid, carrier = grid_of(request.format), carrier_dtype(request.format)
    bound = request.spec.scaling.bound(scale, request.format, request.stored) if request.save else None
    if bound is not None and isinstance(bound.value, Tensor) and bound.value.numel() != 1:
        return None
    if isinstance(grid, Integers) and not request.spec.stochastic and carrier.itemsize == 1:
        return _clip(request, scale, grid, bound)
    if bound is not None:
        return None
    if log_grid(request.format) is not None and carrier in _LOG_CARRIERS:
        return _log(request.x, (request,), scale)[0]
    parameters = None if request.spec.stochastic or not carrier.is_floating_point else float_grid(request.format)
    if parameters is not None:
        return _float(request, scale, parameters)
    return None if _table(request.format) is None else _by_table(request, scale)


@backends.register("round_pair", "cpu")
def round_pair(first: Request, second: Request, scale: Tensor) -> tuple[Rounded, ...] | None:
    """Both phases of two-phase rounding from one read."""
    both = (first, second)
    if not all(takes(r, scale) and not r.spec.stochastic and not r.save for r in both):
        return None
    if first.spec.rounding is not second.spec.rounding or not is_same(first.x, second.x):
        return None
    carriers = [carrier_dtype(r.format) for r in both]
    if any(log_grid(r.format) is None for r in both) or carriers[0] is not carriers[1] or carriers[0] not in _LOG_CARRIERS:
        return None
    return _log(first.x, both, scale)


def _clip(request: Request, scale: Tensor, grid: Integers, bound: Bound | None) -> Rounded:
    x = readable(request.x)
    q = torch.empty_like(x, dtype=carrier_dtype(request.format)) if request.carrier else None
    n, codes, whole = x.numel(), carrier_dtype(request.format), (packed_bytes(x.numel()), mask_bytes(x.numel()))
    packs = request.save and has_integer_codes(request.format)
    packed = x.new_empty(whole[0], dtype=torch.uint8) if packs else None
    mask = None if bound is None else x.new_empty(whole[1], dtype=torch.uint8)
    amax = kernels().clip(
        ctypes.byref(
            c.Clip(
                pointer(x, "x", x.dtype, n),
                c.CODES[x.dtype],
                n,
                _inverse(scale),
                grid.low,
                grid.high,
                0 if bound is None else RULES[bound.rule],
                0.0 if bound is None else float(bound.value),
                optional(q, "codes", codes, n, x),
                None if packed is None else codes_of(packed, n),
                bits_of(mask, "mask", n),
            )
        )
    )
    saved = None if packed is None else Packed(packed, x.shape, x.stride(), request.format.min < 0)
    return Rounded(q, amax, saved, mask)


def _log(x: Tensor, requests: tuple[Request, ...], scale: Tensor) -> tuple[Rounded, ...]:
    x = readable(x)
    grids = [log_grid(r.format) for r in requests]
    rounding = requests[0].spec.rounding
    carrier = carrier_dtype(requests[0].format)
    outputs = [torch.empty_like(x, dtype=carrier) for _ in requests]
    n = x.numel()
    arguments = c.LogRound(pointer(x, "x", x.dtype, n), c.CODES[x.dtype], n, _inverse(scale))
    arguments.num, arguments.rule, arguments.out_dtype = len(requests), RULE_OF[rounding], c.CODES[carrier]
    for i, (grid, out, request) in enumerate(zip(grids, outputs, requests, strict=True)):
        arguments.grid[i] = grid
        arguments.out[i] = pointer(out, "out", carrier, n, like=x)
        arguments.key[i] = stream_key(request.key, 0) if rounding.draws and request.key is not None else 0
    amax = kernels().log_round(ctypes.byref(arguments))
    return tuple(Rounded(out, amax) for out in outputs)


def _float(request: Request, scale: Tensor, parameters: Any) -> Rounded:
    x = readable(request.x)
    out = torch.empty_like(x, dtype=carrier_dtype(request.format))
    n, to = x.numel(), out.dtype
    arguments = c.FloatRound(pointer(x, "x", x.dtype, n), c.CODES[x.dtype], n, _inverse(scale), parameters)
    arguments.out, arguments.out_dtype = pointer(out, "out", to, n, like=x), c.CODES[to]
    return Rounded(out, kernels().float_round(ctypes.byref(arguments)))


def _by_table(request: Request, scale: Tensor) -> Rounded | None:
    x, format = readable(request.x), request.format
    boundaries, levels = _table(format)  # type: ignore[misc]
    rounding = request.spec.rounding
    if rounding is Rounding.UNDERFLOW and 0.0 not in format.grid:
        return None
    out = torch.empty_like(x, dtype=carrier_dtype(format))
    n, num_levels = x.numel(), len(format.grid)
    arguments: Any = c.TableRound(
        pointer(x, "x", x.dtype, n),
        c.CODES[x.dtype],
        n,
        _inverse(scale),
        pointer(boundaries, "boundaries", torch.float32, num_levels - 1),
        pointer(levels, "levels", torch.float32, num_levels),
        num_levels,
        _overflow(format),
        pointer(out, "out", out.dtype, n, like=x),
        c.CODES[out.dtype],
        stream_key(request.key, 0) if rounding.draws and request.key is not None else 0,
        RULE_OF[rounding],
    )
    if rounding is Rounding.UNDERFLOW:
        arguments.zero, arguments.smallest = format.grid.index(0.0), format.smallest
    return Rounded(out, kernels().table_round(ctypes.byref(arguments)))


@backends.register("unpack", "cpu")
def unpack(packed: Packed, dtype: torch.dtype) -> Tensor | None:
    """Packed integers as int8, uint8, bfloat16 or float32."""
    if dtype not in (torch.int8, torch.uint8, torch.bfloat16, torch.float32):
        return None
    if not packed.data.is_cpu or packed.grid is not None:
        return None
    out = torch.empty_strided(packed.shape, packed.stride, dtype=dtype)
    n = out.numel()
    codes = codes_of(packed.data, n)
    arguments = c.Unpack(codes, n, int(packed.signed), pointer(out, "out", dtype, n), c.CODES[dtype])
    kernels().unpack(ctypes.byref(arguments))
    return out


@backends.register("moments", "cpu")
def moments(x: Tensor) -> Moments | None:
    """Means of x^2 and |x|, and max|x|, from one read."""
    if not x.is_cpu or x.dtype not in _DTYPES or x.numel() == 0 or not is_plain(x):
        return None
    x = readable(x)
    found, n = c.Moments(), x.numel()
    address = ctypes.c_void_p(pointer(x, "x", x.dtype, n))
    kernels().moments(address, c.CODES[x.dtype], ctypes.c_int64(n), ctypes.byref(found))
    return Moments(found.sum_square / x.numel(), found.sum_abs / x.numel(), found.amax)
