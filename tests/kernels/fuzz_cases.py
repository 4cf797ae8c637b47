"""A call of each kernel that the backends have for operations, and what its result must be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fuzz_values import CLEAN, Fuzz, bits, plain, request, same, scalar
from torch import Tensor

from fourbit import backends, formats
from fourbit.chains import Activation, Norm, Normalized, NormApply, NormBackward, NormStatistics
from fourbit.kernels import _check
from fourbit.ops import LSTM_CELL, Accumulation, Convolution, Finish, Gemm, Layout, LinearMap, Operand, Raw
from fourbit.ops import LstmBackward as BackwardRun
from fourbit.ops import LstmForward as ForwardRun
from fourbit.ops._accumulation import accumulate
from fourbit.ops._product import _finish, reference_product
from fourbit.quantizers import ClipValue, FixedScale, Packed, QuantSpec, Request, Rounded, run, scale_of

Case = tuple[str, tuple[Any, ...], Callable[[Any], None]]
"""A registered operation, its arguments, and what its result must be."""


def rounding(f: Fuzz) -> Case:
    x = f.tensor(f.shape(f.one(0, 1, 2, 4)), f.one(torch.float32, torch.bfloat16, torch.float16))
    one = request(f, x)
    scale = scalar(f)
    if f.one(True, False, False, False):
        pair = [QuantSpec(name, FixedScale(0.5)) for name in ("fp4_r4_even", "fp4_r4_odd")]
        first, second = (Request(x, spec, spec.format) for spec in pair)
        other = f.rarely(f.one(request(f, x), replace(second, x=f.tensor(tuple(x.shape)))), second, 0.2)
        scale = f.rarely(scale, torch.tensor(0.5))

        def check_pair(found: tuple[Rounded, Rounded]) -> None:
            if float(scale) == 0.5 and bool(x.isfinite().all()):
                with backends.without():
                    for part, whole in zip(found, (first, other), strict=True):
                        same(part.q, run(whole).tensor.q)  # type: ignore[arg-type]

        return "round_pair", (first, other, scale), check_pair

    def check(found: Rounded) -> None:
        if one.stored is not None and one.stored.numel() != 1:
            return  # the kernel was given a scale all the same
        if not plain(x) or not scale.numel() == scale_of(one).numel() == 1 or bool(scale != scale_of(one)):
            return  # another scale than that of the reference
        with backends.without():
            expected = run(one)
        if bool(x.isfinite().all()):
            if found.q is not None:
                same(found.q, expected.tensor.q)
            if found.packed is not None and expected.packed is not None:
                same(found.packed.data, expected.packed.data)

    if plain(x) and x.is_floating_point() and f.one(True, False):
        with contextlib.suppress(CLEAN):
            scale = scale_of(one)
    return "round", (one, scale), check


def unpacking(f: Fuzz) -> Case:
    shape = f.shape(f.one(1, 2))
    n = math.prod(shape)
    stride = f.rarely(f.one((0,) * len(shape), (1,) * len(shape), (3,) * len(shape)), torch.empty(shape).stride())
    packed = Packed(bits(f, n, _check.packed_bytes), torch.Size(shape), stride, f.one(True, False))
    dtype = f.one(torch.int8, torch.uint8, torch.bfloat16, torch.float32, torch.int64)

    def check(found: Tensor) -> None:
        with backends.without():
            data = packed.data.flatten()[: _check.packed_bytes(n)]
            same(found, Packed(data, packed.shape, packed.stride, packed.signed).unpack(dtype))

    return "unpack", (packed, dtype), check


def moments(f: Fuzz) -> Case:
    x = f.tensor(f.shape(f.one(0, 1, 2, 3, 4)))

    def check(found: Any) -> None:
        assert math.isclose(float(found.mean_abs), float(x.double().abs().mean()), rel_tol=1e-6)
        assert math.isclose(float(found.amax), float(x.float().abs().max()), rel_tol=1e-6)

    return "moments", (x,), check


def accumulating(f: Fuzz) -> Case:
    g, m, k, n = f.shape(4)
    a, b = f.tensor((g, m, k)), f.tensor((g, k, n))
    how = Accumulation(f.one(formats.FP16_169, formats.FP8_152, formats.BINARY16), f.one(None, 1, 64, 5))

    def check(found: Tensor) -> None:
        with backends.without():
            same(found, accumulate(a, b, how, None))

    return "accumulate", (a, b, how, None), check


def finishing(f: Fuzz) -> Case:
    shape = f.shape(f.one(1, 2, 4))
    y = f.tensor(shape, f.one(torch.float32, torch.bfloat16, torch.int32))
    high = f.rarely(f.tensor(shape, torch.int32), None, 0.3 if y.dtype == torch.int32 else 0.05)
    like = f.rarely(f.tensor(shape), torch.empty(shape))
    layout = f.one(None, Layout(like.shape, like.stride()))
    n = math.prod(shape)
    mask = f.one(None, bits(f, n, _check.mask_bytes))
    codes = f.one(None, Packed(bits(f, n, _check.packed_bytes), torch.Size(shape), like.stride(), True))
    output = f.one(None, formats.FP16_169, formats.FP8_152)
    late = f.one(None, scalar(f))
    dtype = f.one(torch.float32, torch.bfloat16, torch.float16)
    what = Finish(scalar(f), output, f.one(True, False), late, dtype, layout, mask, codes)
    kept = [t.clone() if t is not None and plain(t) else t for t in (y, high)]

    def check(found: tuple[Tensor, Tensor | None]) -> None:
        if (what.late is not None and what.late.dim()) or (what.scale is not None and what.scale.dim()):
            return
        size = kept[0].numel()
        cut = None if mask is None else mask.flatten()[: _check.mask_bytes(size)]
        fitting = codes
        if codes is not None and (codes.shape.numel() != size or layout is None):
            return
        if mask is not None and layout is None:
            return
        if fitting is not None:
            data = fitting.data.flatten()[: _check.packed_bytes(size)]
            fitting = Packed(data, layout.shape, layout.stride, True)  # type: ignore[union-attr]
        again = Finish(what.scale, output, what.keep_infinite, late, dtype, layout, cut, fitting)
        same(found[0], _finish(Raw(kept[0].clone(), kept[1]), again)[0], 2.0**-7 if dtype == torch.bfloat16 else 1e-5)

    return "epilogue", (Raw(y, high), what), check


def products(f: Fuzz) -> Case:
    which = f.one("fprop", "dgrad", "wgrad")
    rows, out, width = f.shape(3)
    if f.one(True, False):
        con: Any = LinearMap()
        x, w, g = (rows, width), (out, width), (rows, out)
    else:
        kernel, stride, padding = f.one(1, 2, 3), f.one(1, 2, 0), f.one(0, 1, 3, -1)
        con = Convolution((stride,) * 2, (padding,) * 2, (1, 1))
        channels = f.one(4, 16, 3), f.one(16, 5)
        x, w = (f.one(1, 2), channels[0], 5, 6), (channels[1], channels[0], kernel, kernel)
        g = (x[0], channels[1], *((n + 2 * padding - kernel) // max(stride, 1) + 1 for n in x[2:]))
        g = tuple(max(0, n) for n in g)
    first, second, like = {"fprop": (x, w, None), "dgrad": (g, w, x), "wgrad": (g, x, w)}[which]
    gradient = which != "fprop"
    a = f.tensor(first, torch.bfloat16 if gradient else torch.uint8, powers=gradient)
    b = f.tensor(second, torch.int8)
    kind = formats.FP4_R4_EVEN if gradient else formats.UINT4
    layout = None
    if like is not None:
        likeness = f.rarely(f.tensor(like), torch.empty(like))
        layout = Layout(likeness.shape, likeness.stride())
    cache = f.rarely({}, None, 0.3)
    operand = Operand(a, scalar(f), kind, True), Operand(b, None, formats.INT4_SYM, True, cache)
    gemm = Gemm(which, con, *operand, layout, torch.float32, f.one("fast", "exact"))

    def check(found: Any) -> None:
        y = found.y if isinstance(found, Raw) else found[0]
        if isinstance(found, Raw) and not found.rounded and found.high is None:
            same(y.to(torch.float32) * found.unit, reference_product(gemm))

    if f.one(True, False):
        n = 0 if layout is None else layout.shape.numel()
        mask = f.one(None, bits(f, n, _check.mask_bytes))
        return "product", (gemm, Finish(gemm.scale, None, False, None, torch.float32, layout, mask)), check
    return "gemm", (gemm,), check


def cells(f: Fuzz) -> Case:
    rows, size = f.shape(2)
    gates = [f.tensor((rows, 4 * size), odd=0.1) for _ in range(3)]
    states = [f.tensor((rows, size), odd=0.1) for _ in range(4)]
    if f.one(True, False):
        kept = f.rarely(gates[0], gates[2], 0.05)
        arguments = (gates[0], gates[1], states[0], kept)
        copies = [t.clone() if plain(t) else t for t in arguments]

        def check(found: tuple[Tensor, Tensor]) -> None:
            for one, other in zip(found, LSTM_CELL.forward(*copies[:2], None, *copies[2:]), strict=True):
                same(one, other)

        return "lstm_forward", arguments, check
    out = f.rarely(gates[0], gates[2], 0.05)
    arguments = (*states[:2], gates[0], *states[2:], out)
    copies = [t.clone() if plain(t) else t for t in arguments]

    def check_back(found: Tensor) -> None:
        dh, dc, before, c, new, into = copies
        same(found, LSTM_CELL.backward(dh, dc, before, None, None, c, new, into).c)

    return "lstm_backward", arguments, check_back


def sequences(f: Fuzz) -> Case:
    num, size, steps = f.one(1, 3, 4), f.one(1, 7, 16), f.one(1, 2, 3)
    total = num * steps
    ranges = [(f.rarely(-1, i * num), f.rarely(num + 1, num)) for i in range(steps)]

    def t(*shape: int) -> Tensor:
        return f.tensor(shape, odd=0.03)

    w = Operand(f.tensor((4 * size, size), torch.int8, 0.05), torch.tensor(0.1), formats.INT4_SYM, True, {})
    h, c, output = t(num, size), t(num, size), f.one(None, formats.FP16_169)
    if f.one(True, False):
        spec = QuantSpec("uint4", ClipValue())
        one = Request(h, spec, spec.format, None, torch.tensor(1.4), None, True, False)
        rest = t(total, 4 * size), t(2, total, size), t(total, size)
        task: Any = ForwardRun(ranges, t(total, 4 * size), h, c, *rest, one, torch.tensor(0.1), w, output)
        return "lstm_run", (task,), lambda found: None
    spec = QuantSpec("fp4_r4_even", FixedScale(0.5))
    gates, cell, d_gates = t(total, 4 * size), t(2, total, size), t(total, 4 * size)
    masks = [f.one(None, bits(f, num * size, _check.mask_bytes)) for _ in ranges]
    codes = [
        None
        if m is None
        else Packed(bits(f, num * size, _check.packed_bytes), torch.Size((num, size)), (size, 1), False)
        for m in masks
    ]
    one, dy = Request(d_gates, spec, spec.format), f.one(None, t(total, size))
    task = BackwardRun(ranges, dy, h, c, gates, cell, d_gates, one, torch.tensor(0.5), w, masks, codes, output)
    return "lstm_run_back", (task,), lambda found: None


def normalizing(f: Fuzz) -> Case:
    """One of the three kernels of batch normalization, on the results of the others before it."""
    shape = f.shape(4)
    channels = shape[1]
    y = f.tensor(shape)
    y = y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 and f.one(True, True, False) else y
    gamma, beta, mean, var = (f.one(None, f.tensor((channels,))) for _ in range(4))
    norm = Norm(
        gamma,
        beta,
        *f.rarely((mean, var), f.one((None, None), (f.tensor((channels,)), torch.ones(channels)))),
        0.1,
        1e-5,
    )
    output = f.one(None, formats.FP16_169, formats.FP8_152)
    statistics = NormStatistics(y, f.rarely(0.37, 1.0), output, norm, f.one(True, False))
    kept = y.clone() if plain(y) else y
    if f.one(True, False, False):

        def check(found: Normalized) -> None:
            if output is None and statistics.scale == 1.0:
                same(found.moments[0], kept.mean((0, 2, 3)), 1e-4)

        return "norm_statistics", (statistics,), check
    normalized = None
    with contextlib.suppress(CLEAN):
        normalized = backends.OPERATIONS["norm_statistics"](statistics)
    if normalized is None:
        normalized = Normalized(f.tensor(shape), output, f.tensor((4, channels)))
    n = math.prod(shape)
    residual, act = f.one(None, f.tensor(shape)), Activation(f.one(True, False), f.one(math.inf, 1.0))
    if f.one(True, False):
        one = f.one(
            None,
            Request(y, QuantSpec("uint4", ClipValue()), formats.UINT4, None, torch.ones(1), None, True),
            request(f, y),
        )
        task = NormApply(normalized, residual, act, one, f.one(True, False))

        def check_out(found: Any) -> None:
            if found[0] is None or normalized.format is not None:
                return
            slope, offset = (m.view(1, -1, 1, 1) for m in normalized.moments[2:])
            t = normalized.v * slope + offset
            t = t if residual is None else t + residual
            same(found[0], t.clamp(0.0, act.cap) if act.clips else t, 1e-4)

        return "norm_apply", (task,), check_out
    packed = f.one(None, Packed(bits(f, n, _check.packed_bytes), torch.Size(shape), normalized.v.stride(), False))
    mask, passes = (f.one(None, bits(f, n, _check.mask_bytes)) for _ in range(2))
    dq, do = (f.one(None, f.tensor(shape, f.rarely(torch.bfloat16, torch.float32, 0.3))) for _ in range(2))
    specs = f.one((), (QuantSpec("fp4_r4_even", FixedScale(0.5)),), (QuantSpec("fp16_169", FixedScale(1.0)),))
    layout = f.rarely(Layout(torch.Size(shape), (1,) * 4), Layout.of(normalized.v), 0.1)
    exponent = torch.tensor(1.0)
    back = NormBackward(
        normalized, gamma, act, layout, dq, 1.0, packed, mask, passes, True, do, f.one(True, False), specs, exponent
    )
    return "norm_backward", (back,), lambda found: None


CASES = (
    normalizing,
    normalizing,
    rounding,
    rounding,
    unpacking,
    moments,
    accumulating,
    finishing,
    finishing,
    products,
    products,
    cells,
    sequences,
)
