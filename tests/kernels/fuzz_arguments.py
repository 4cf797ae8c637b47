"""Wrong and odd arguments for every kernel: each call ends in a clean error, is declined, or gives what the reference gives.

    python fuzz_arguments.py CALLS SEED

Run by test_kernel_arguments.py, there under AddressSanitizer, which ends the process at the first access beyond a tensor.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends, formats
from fourbit.errors import UserError
from fourbit.kernels import _check
from fourbit.ops import LSTM_CELL, Accumulation, Convolution, Finish, Gemm, Layout, LinearMap, Operand, Raw
from fourbit.ops import LstmBackward as BackwardRun
from fourbit.ops import LstmForward as ForwardRun
from fourbit.ops._accumulation import accumulate
from fourbit.ops._product import _finish, _multiply
from fourbit.quantizers import (
    Amax,
    ClipValue,
    FixedScale,
    Packed,
    QuantSpec,
    Request,
    Rounded,
    Rounding,
    quantize,
    run,
    scale_of,
)
from fourbit.recipes import catalog

CLEAN = (UserError, RuntimeError, TypeError, NotImplementedError, IndexError)
"""A sentence of ours, or of torch: never an assertion, never a crash. (A UserError is a ValueError.)"""
DTYPES = (
    torch.float32,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
)
SIZES = (0, 1, 1, 2, 3, 4, 7, 16, 17, 32, 63, 64, 65, 130)


class Fuzz:
    """A source of odd values. Tensors without memory are only for kernels that read them before torch does, which dies of
    them."""

    for_kernels = False

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def one(self, *values: Any) -> Any:
        """One of them."""
        return self.random.choice(values)

    def rarely(self, odd: Any, usual: Any, share: float = 0.1) -> Any:
        """Mostly the usual."""
        return odd if self.random.random() < share else usual

    def shape(self, axes: int) -> tuple[int, ...]:
        """Small sizes, zero among them."""
        return tuple(self.random.choice(SIZES if axes < 3 else SIZES[:10]) for _ in range(axes))

    def wrong(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, or one near it."""
        if not shape or self.random.random() < 0.85:
            return shape
        axis = self.random.randrange(len(shape))
        changed = list(shape)
        changed[axis] = max(0, changed[axis] + self.one(-1, 1, 7, -changed[axis]))
        return self.one(tuple(changed), shape[1:], (*shape, 2), shape[::-1])

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, odd: float = 0.25) -> Tensor:
        """So many numbers in an odd piece of memory."""
        shape = self.wrong(shape) if odd else shape
        dtype = self.rarely(self.one(*DTYPES), dtype, 0.08 if odd else 0)
        x = (torch.randn(shape) * 3).clamp(-7, 7)
        x = x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)
        return self.memory(x) if self.random.random() < odd else x

    def memory(self, x: Tensor) -> Tensor:
        """The same numbers elsewhere: with gaps, repeats, another order of axes, or none at all."""
        kind = self.random.randrange(10 if self.for_kernels else 8)
        if kind == 0 and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 1 and x.dim():
            return x.repeat_interleave(2, -1)[..., ::2]
        if kind == 2 and x.dim() and x.shape[0]:
            return x[:1].expand(x.shape)
        if kind == 3:
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if kind == 4 and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if kind == 5:
            return x.to("meta")
        if kind == 6 and x.dtype != torch.uint8:
            return torch._neg_view(-x)
        if kind == 7 and x.dim() and x.numel():  # rows that overlap
            return x.flatten().as_strided(x.shape, (*[1] * (x.dim() - 1), 1)) if sum(x.shape) <= x.numel() else x
        if kind == 8:
            return torch._efficientzerotensor(x.shape, dtype=x.dtype)
        if kind == 9:
            x = x.clone()
            x.untyped_storage().resize_(0)
        return x


def scalar(f: Fuzz) -> Tensor:
    """A scale, or something else."""
    usual = torch.tensor(f.one(0.5, 0.37, 1.0, 2.0**-9))
    return f.rarely(
        f.one(f.tensor((2,)), torch.tensor(math.nan), torch.tensor(3), torch.ones(1), usual.to("meta")), usual
    )


def bits(f: Fuzz, n: int, of: Callable[[int], int]) -> Tensor:
    """Packed codes or masks for n elements, sometimes of the wrong size."""
    size = f.rarely(max(0, of(n) + f.one(-32, -8, -1, 8, 64)), of(n), 0.15)
    return f.tensor((size,), torch.uint8, 0.1)


SPECS = [
    *(QuantSpec(name, FixedScale(0.5)) for name in ("int4_sym", "uint4", "fp4_r4_even", "fp16_169", "fp8_152", "int8")),
    *(QuantSpec(name, FixedScale(0.5), rounding=Rounding.STOCHASTIC) for name in ("fp4_r2", "int4_sym")),
    QuantSpec("fp4_r4_even", Amax(), rounding=Rounding.UNDERFLOW),
    QuantSpec("uint4", ClipValue()),
    QuantSpec("int4_sym", Amax(), "channel"),
]


def request(f: Fuzz, x: Tensor) -> Request:
    """How it is rounded."""
    spec = f.one(*SPECS)
    format = f.rarely(f.one(*formats.CATALOG.values()), spec.format)
    stored = f.rarely(f.tensor((2,)), torch.tensor(1.4)) if isinstance(spec.scaling, ClipValue) else None
    key = f.rarely(None, 7) if spec.rounding.draws else None
    return Request(x, spec, format, f.rarely((0,), None, 0.05), stored, key, f.one(True, False), f.rarely(False, True))


def same(a: Tensor, b: Tensor, rtol: float = 1e-5) -> None:
    """NaN equals NaN; sums may differ in their last bits."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    if a.numel() and not a.is_meta:
        a, b = a.double(), b.double()
        size = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * size + 1e-30, equal_nan=True)


def plain(x: Tensor) -> bool:
    return not x.is_meta and (not x.numel() or x.is_neg() or x.data_ptr() != 0)


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
        with backends.without():
            expected = run(one)
        known = scale.numel() == 1 and bool(scale == scale_of(one)) if plain(x) else False
        if known and bool(x.isfinite().all()):
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
    a = f.tensor(first, torch.bfloat16 if gradient else torch.uint8)
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
            same(y.to(torch.float32) * found.unit, _multiply(gemm))

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


CASES = (
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


def call_kernel(f: Fuzz) -> tuple[str, str]:
    """One registered kernel, called directly."""
    case = f.one(*CASES)
    f.for_kernels = case in (rounding, unpacking, moments, cells)
    operation, arguments, check = case(f)
    kernel = next(k.function for k in backends.kernels() if (k.operation, k.backend) == (operation, "cpu"))
    try:
        found = kernel(*arguments)
    except CLEAN:
        return operation, "refused"
    if found is None:
        return operation, "declined"
    check(found)
    return operation, "right"


def call_quantize(f: Fuzz) -> tuple[str, str]:
    """fourbit.quantize with kernels and without."""
    x, spec = f.tensor(f.shape(f.one(0, 1, 2, 4)), f.one(torch.float32, torch.bfloat16, torch.float16)), f.one(*SPECS)
    stored = torch.tensor(1.4) if isinstance(spec.scaling, ClipValue) else None
    axis = f.one(0, 1, -1) if spec.granularity == "channel" else None

    def once() -> Tensor | None:
        try:
            return quantize(x, spec, channel_axis=axis, stored=stored, key=7).q
        except CLEAN:
            return None

    return "quantize", compare(once)


def compare(once: Callable[[], Any]) -> str:
    """With kernels and without: the same, or refused by both."""
    found = once()
    with backends.without():
        expected = once()
    assert (found is None) == (expected is None), (found, expected)
    if found is None:
        return "refused"
    for one, other in zip(*((t,) if isinstance(t, Tensor) else t for t in (found, expected)), strict=True):
        same(one, other, 0.25)  # a sum in another order may fall to another number of the grid
    return "right"


LAYERS: tuple[tuple[Callable[..., nn.Module], tuple[int, ...]], ...] = (
    (lambda **k: fb.nn.Linear(6, 4, **k), (5, 6)),
    (lambda **k: fb.nn.Linear(16, 16, **k), (2, 3, 16)),
    (lambda **k: fb.nn.Conv2d(4, 16, 3, padding=1, **k), (2, 4, 5, 5)),
    (lambda **k: fb.nn.Conv2d(3, 5, 1, stride=2, **k), (2, 3, 6, 6)),
    (lambda **k: fb.nn.Conv2d(4, 4, 2, groups=2, **k), (1, 4, 5, 4)),
    (lambda **k: fb.nn.Conv1d(3, 4, 3, **k), (2, 3, 5)),
    (lambda **k: fb.nn.LSTM(5, 7, **k), (4, 3, 5)),
    (lambda **k: fb.nn.GRU(5, 7, **k), (4, 3, 5)),
)


def call_layer(f: Fuzz) -> tuple[str, str]:
    """A layer's forward and backward pass with kernels and without."""
    make, shape = f.one(*LAYERS)
    spec = f.one(catalog.TPR, catalog.LUQ.rules[-1].spec, catalog.IBM2020.rules[0].spec)
    x = f.tensor(shape)
    odd_gradient, seed = f.random.random() < 0.3, f.random.randrange(10**6)

    def once() -> tuple[Tensor, ...] | None:
        torch.manual_seed(seed)
        again = Fuzz(seed)
        layer = make(spec=spec)
        try:
            given = x.detach().requires_grad_()
            y = layer(given)
            y = y[0] if isinstance(y, tuple) else y
            g = again.tensor(tuple(y.shape), odd=1.0) if odd_gradient else torch.randn_like(y)
            y.backward(g)
        except CLEAN:
            return None
        return (y.detach(), *(t.grad for t in (given, *layer.parameters()) if t.grad is not None))

    return type(make(spec=spec)).__name__, compare(once)


def main(calls: int, seed: int) -> None:
    """Prints how many calls of each kind there were, and how they ended."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    counts: Counter[tuple[str, str]] = Counter()
    for i in range(calls):
        f = Fuzz(seed + i)
        share = f.random.random()
        call = call_layer if share < 0.02 else call_quantize if share < 0.2 else call_kernel
        try:
            counts[call(f)] += 1
        except BaseException:
            print(f"again: python fuzz_arguments.py 1 {seed + i} ({call.__name__})", file=sys.stderr)
            raise
    for (what, end), count in sorted(counts.items()):
        print(f"{what} {end} {count}")
    print(f"calls {sum(counts.values())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
