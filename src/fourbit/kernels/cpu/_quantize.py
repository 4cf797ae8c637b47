"""Rounding on the CPU: which kernel rounds to which kind of grid.

Integers with nearest rounding go through `clip` (codes, packed codes and mask in one pass), powers of a radix through
`log_round` (two grids in one pass), binary floats through `float_round`, every other grid of 8 bits or fewer, and
stochastic rounding, through `table_round`. What none of them takes is left to the reference.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit.backends import Plan
from fourbit.formats import FloatFormat, Format
from fourbit.kernels._check import codes_of, fresh, is_plain, is_same, mask_bytes, packed_bytes, pointer
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._library import Library, library
from fourbit.quantizers import (
    MOMENTS,
    ROUND,
    ROUND_PAIR,
    UNPACK,
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


@lru_cache(maxsize=1)
def kernels() -> Library:
    """The loaded library."""
    loaded = library()
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
    return c.FloatGrid(
        mantissa_bits=f.mantissa_bits, lowest=lowest, smallest=smallest, min=f.min, max=f.max, overflow=_overflow(f)
    )


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
    return c.LogGrid(start=start, smallest=float_bits(grid.smallest), largest=float_bits(grid.largest), octaves=octaves)


@lru_cache(maxsize=64)
def _table(format: Format) -> tuple[Tensor, Tensor] | None:
    if format.bits > 8:
        return None
    grid = Table(format)
    return grid.boundaries.contiguous(), grid.levels.contiguous()


def _inverse(scale: Tensor) -> float:
    return to_float32(1.0 / float(scale))


class GridPlan(NamedTuple):
    """How numbers get onto the grid of a format, as far as the format alone decides it.

    Args:
        carrier, code: dtype of the numbers, as torch and the library name it.
        integers, log, binary: the grid, if it is of this kind and a kernel rounds to it in this carrier.
        packs: whether two of its codes share a byte.
    """

    carrier: torch.dtype
    code: int
    integers: Integers | None
    log: Any | None
    binary: Any | None
    packs: bool


@lru_cache(maxsize=64)
def plan_of(format: Format) -> GridPlan:
    """The plan of a format, made once."""
    grid, carrier = grid_of(format), carrier_dtype(format)
    integers = grid if isinstance(grid, Integers) and carrier.itemsize == 1 else None
    log = log_grid(format) if carrier in (torch.bfloat16, torch.int8) else None
    binary = float_grid(format) if carrier.is_floating_point else None
    return GridPlan(carrier, c.CODES[carrier], integers, log, binary, has_integer_codes(format))


def why_unreadable(x: Tensor) -> str:
    """Why no kernel can read `x` as it is; "" where they can."""
    if not x.is_cpu:
        return "the tensor is on another device"
    if x.dtype not in _DTYPES:
        return f"the tensor is {x.dtype}: float32, bfloat16 and float16 are read"
    return "" if is_plain(x) else "the elements of the tensor do not fill one piece of memory"


def why_not_rounded(request: Request, scale: Tensor) -> str:
    """Why no kernel may round this, to a grid that it knows; "" where one may."""
    spec = request.spec
    if found := why_unreadable(request.x):
        return found
    if request.tile is not None:
        return "parts of the tensor have scales"
    if scale.numel() != 1 or not scale.is_cpu:
        return "there is not one scale, on the CPU"
    if spec.samples != 1:
        return "the average of several roundings is wanted"
    if spec.rounding is Rounding.TRUNCATE:
        return "the rounding truncates"
    if request.key is None and spec.rounding is not Rounding.NEAREST:
        return "random words without a key"
    return ""


@ROUND.kernel("cpu")
def round_one(request: Request, scale: Tensor) -> Plan[Rounded]:
    """One operand, to one format."""
    if declined := why_not_rounded(request, scale):
        return declined
    format, spec, plan = request.format, request.spec, plan_of(request.format)
    stochastic = spec.rounding is not Rounding.NEAREST
    bound = spec.scaling.bound(scale, format, request.stored) if request.save else None
    if bound is not None and isinstance(bound.value, Tensor) and bound.value.numel() != 1:
        return "there is more than one clip value"
    integers = plan.integers
    if integers is not None and not stochastic:
        return lambda: _clip(request, scale, plan, integers, bound)
    if bound is not None:
        return f"a clip value is known for integers with nearest rounding, not for {spec}"
    if plan.log is not None:
        return lambda: _log(request.x, (request,), (plan,), scale)[0]
    if plan.binary is not None and not stochastic:
        return lambda: _float(request, scale, plan)
    if _table(format) is None:
        return f"{format.name} has more than 8 bits, and no grid that a kernel knows"
    if spec.rounding is Rounding.UNDERFLOW and 0.0 not in format.grid:
        return f"{format.name} has no zero to round to"
    return lambda: _by_table(request, scale)


@ROUND_PAIR.kernel("cpu")
def round_pair(first: Request, second: Request, scale: Tensor) -> Plan[tuple[Rounded, ...]]:
    """Both phases of two-phase rounding from one read."""
    plans = plan_of(first.format), plan_of(second.format)
    if plans[0].log is None or plans[1].log is None or plans[0].carrier is not plans[1].carrier:
        return f"{first.format.name} and {second.format.name} are not two logarithmic grids in one carrier"
    if first.save or second.save or second.tile is not None or second.spec.samples != 1:
        return "more than the numbers is wanted, or parts of the tensor have scales"
    if not first.spec.rounding is second.spec.rounding is Rounding.NEAREST:
        return "the rounding is not nearest"
    if declined := why_not_rounded(first, scale):
        return declined
    if not is_same(first.x, second.x):
        return "these are two tensors"
    return lambda: _log(first.x, (first, second), plans, scale)


def _clip(request: Request, scale: Tensor, plan: GridPlan, grid: Integers, bound: Bound | None) -> Rounded:
    x = readable(request.x)
    n = x.numel()
    q = torch.empty_like(x, dtype=plan.carrier) if request.carrier else None
    packed = torch.empty(packed_bytes(n), dtype=torch.uint8) if request.save and plan.packs else None
    mask = None if bound is None else torch.empty(mask_bytes(n), dtype=torch.uint8)
    arguments = c.Clip(
        x=pointer(x, "x", x.dtype, n),
        dtype=c.CODES[x.dtype],
        n=n,
        inv_scale=_inverse(scale),
        low=grid.low,
        high=grid.high,
        mask_rule=0 if bound is None else RULES[bound.rule],
        bound=0.0 if bound is None else float(bound.value),
        codes=None if q is None else fresh(q),
        packed=None if packed is None else fresh(packed),
        mask=None if mask is None else fresh(mask),
    )
    amax = kernels().clip(ctypes.byref(arguments))
    saved = None if packed is None else Packed(packed, x.shape, x.stride(), request.format.min < 0)
    return Rounded(q, amax, saved, mask)


def _log(x: Tensor, requests: tuple[Request, ...], plans: tuple[GridPlan, ...], scale: Tensor) -> tuple[Rounded, ...]:
    x = readable(x)
    rounding, (carrier, code, *_) = requests[0].spec.rounding, plans[0]
    outputs = [torch.empty_like(x, dtype=carrier) for _ in requests]
    n = x.numel()
    arguments = c.LogRound(
        x=pointer(x, "x", x.dtype, n),
        dtype=c.CODES[x.dtype],
        n=n,
        inv_scale=_inverse(scale),
        num=len(requests),
        out_dtype=code,
        rule=RULE_OF[rounding],
    )
    for i, (plan, out, request) in enumerate(zip(plans, outputs, requests, strict=True)):
        arguments.grid[i] = plan.log
        arguments.out[i] = fresh(out)
        if rounding is not Rounding.NEAREST:
            arguments.key[i] = stream_key(request.key, 0)  # type: ignore[arg-type]
    amax = kernels().log_round(ctypes.byref(arguments))
    return tuple(Rounded(out, amax) for out in outputs)


def _float(request: Request, scale: Tensor, plan: GridPlan) -> Rounded:
    x = readable(request.x)
    out = torch.empty_like(x, dtype=plan.carrier)
    n = x.numel()
    arguments = c.FloatRound(
        x=pointer(x, "x", x.dtype, n),
        dtype=c.CODES[x.dtype],
        n=n,
        inv_scale=_inverse(scale),
        grid=plan.binary,
        out=fresh(out),
        out_dtype=plan.code,
    )
    return Rounded(out, kernels().float_round(ctypes.byref(arguments)))


def _by_table(request: Request, scale: Tensor) -> Rounded:
    x, format = readable(request.x), request.format
    boundaries, levels = _table(format)  # type: ignore[misc]
    rounding = request.spec.rounding
    out = torch.empty_like(x, dtype=carrier_dtype(format))
    n, num_levels = x.numel(), len(format.grid)
    arguments = c.TableRound(
        x=pointer(x, "x", x.dtype, n),
        dtype=c.CODES[x.dtype],
        n=n,
        inv_scale=_inverse(scale),
        boundaries=pointer(boundaries, "boundaries", torch.float32, num_levels - 1),
        levels=pointer(levels, "levels", torch.float32, num_levels),
        num_levels=num_levels,
        overflow=_overflow(format),
        out=fresh(out),
        out_dtype=c.CODES[out.dtype],
        key=stream_key(request.key, 0) if rounding.draws and request.key is not None else 0,
        rule=RULE_OF[rounding],
    )
    if rounding is Rounding.UNDERFLOW:
        arguments.zero, arguments.smallest = format.grid.index(0.0), format.smallest
    return Rounded(out, kernels().table_round(ctypes.byref(arguments)))


_UNPACKED = (torch.int8, torch.uint8, torch.bfloat16, torch.float32)


@UNPACK.kernel("cpu")
def unpack(packed: Packed, dtype: torch.dtype) -> Plan[Tensor]:
    """Packed integers as int8, uint8, bfloat16 or float32."""
    if dtype not in _UNPACKED:
        return f"no kernel unpacks to {dtype}"
    if not packed.data.is_cpu:
        return "the codes are on another device"
    if packed.grid is not None:
        return "the codes are not those of integers"
    return lambda: _unpack(packed, dtype)


def _unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    out = torch.empty_strided(packed.shape, packed.stride, dtype=dtype)
    n = out.numel()
    arguments = c.Unpack(
        packed=codes_of(packed.data, n),
        n=n,
        is_signed=packed.signed,
        out=pointer(out, "out", dtype, n),
        out_dtype=c.CODES[dtype],
    )
    kernels().unpack(ctypes.byref(arguments))
    return out


@MOMENTS.kernel("cpu")
def moments(x: Tensor) -> Plan[Moments]:
    """Means of x^2 and |x|, and max|x|, from one read."""
    if declined := why_unreadable(x):
        return declined
    return "the tensor is empty" if x.numel() == 0 else lambda: _moments(x)


def _moments(x: Tensor) -> Moments:
    x = readable(x)
    found, n = c.Moments(), x.numel()
    kernels().moments(pointer(x, "x", x.dtype, n), c.CODES[x.dtype], n, ctypes.byref(found))
    return Moments(found.sum_square / x.numel(), found.sum_abs / x.numel(), found.amax)
