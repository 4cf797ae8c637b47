"""Parity of what surrounds rounding: moments, packed codes, and what follows a product. See parity.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from parity_inputs import DTYPES, Check, same, sample
from torch import Tensor

from fourbit import backends, formats
from fourbit.formats import Format
from fourbit.kernels.cuda import _products, _quantize
from fourbit.ops import Finish, Layout, Operand, Raw
from fourbit.ops._product import _finish
from fourbit.quantizers import Amax, Sawb, pack, pack_mask
from fourbit.quantizers._statistics import Statistics


def statistics_checks(device: str, sizes: tuple[int, ...]) -> Iterator[Check]:
    def compare(x: Tensor) -> None:
        ours = _quantize.moments(x)
        assert ours is not None, "the kernel declined"
        with backends.without():
            theirs = Statistics(x).moments
        same(ours.amax, theirs.amax, "amax")
        for name in ("mean_square", "mean_abs"):
            a, b = float(getattr(ours, name)), float(getattr(theirs, name))
            assert math.isclose(a, b, rel_tol=1e-12) or a == b or (math.isnan(a) and math.isnan(b)), f"{name}: {a}, {b}"
        for scaling in (Sawb(), Amax()):
            mine = scaling.of(_Found(ours), formats.INT4_SYM, None)  # type: ignore[arg-type]
            same(mine, scaling.of(_Found(theirs), formats.INT4_SYM, None), f"{scaling} scale")  # type: ignore[arg-type]

    for n in sizes:
        for dtype in DTYPES:
            yield f"moments, {dtype}, {n}", lambda n=n, d=dtype: compare(sample(n, d, device, spread=1.0))
    for value in (math.inf, -math.inf, math.nan):
        x = sample(300, torch.float32, device)
        x[200] = value
        yield f"moments with {value}", lambda x=x: compare(x)


class _Found:
    """Statistics that are there already."""

    def __init__(self, moments: object):
        self.moments = moments
        self.amax = moments.amax  # type: ignore[attr-defined]


def unpack_checks(device: str, sizes: tuple[int, ...]) -> Iterator[Check]:
    def compare(q: Tensor, format: Format, dtype: torch.dtype) -> None:
        found = _quantize.unpack(pack(q, format), dtype)
        assert found is not None, "the kernel declined"
        assert found.dtype == dtype and found.stride() == q.stride()
        same(found.to(torch.float32), q.to(torch.float32), "codes")

    def turned(q: Tensor, format: Format) -> None:
        operand = Operand(pack(q, format), None, format, True)
        found = _products._transposed(operand, torch.float8_e4m3fn)
        same(found.to(torch.float32), q.view(-1, q.shape[-1]).t().float(), "codes")

    for format in (formats.UINT4, formats.INT4_SYM, formats.INT4):
        for n in sizes:
            low, high = int(format.min), int(format.max)
            q = torch.randint(low, high + 1, (n,)).to(torch.int8 if low < 0 else torch.uint8).to(device)
            for dtype in (q.dtype, *DTYPES):
                yield f"unpack {format} as {dtype}, {n}", lambda q=q, f=format, d=dtype: compare(q, f, d)
        image = torch.randint(low, high + 1, (2, 5, 3, 7)).to(torch.int8).to(device)
        image = image.contiguous(memory_format=torch.channels_last)
        yield f"unpack {format}, channels_last", lambda q=image, f=format: compare(q, f, torch.bfloat16)
        for shape in ((70, 128), (3, 33, 64), (70, 72)):
            q = torch.randint(low, high + 1, shape).to(torch.int8).to(device)
            yield f"unpack {format}, transposed, {shape}", lambda q=q, f=format: turned(q, f)


def epilogue_checks(device: str, sizes: tuple[int, ...]) -> Iterator[Check]:
    scale, late = torch.tensor(0.0173, device=device), torch.tensor(2.0**-7, device=device)

    def compare(raw: Raw, finish: Finish) -> None:
        copy = raw._replace(y=raw.y.clone())
        ours, theirs = _products.epilogue(raw, finish), _finish(copy, finish)
        assert ours is not None, "the kernel declined"
        assert ours[0].dtype == theirs[0].dtype
        same(ours[0], theirs[0], "result")
        assert (ours[1] is None) == (theirs[1] is None)
        if ours[1] is not None and theirs[1] is not None:
            assert math.isclose(float(ours[1]), float(theirs[1]), rel_tol=1e-4, abs_tol=1e-3), "sum of what was clipped"

    for n in sizes:
        base = sample(n, torch.float32, device, 2.0).clamp(-1e6, 1e6)
        codes = torch.randint(-7, 8, (n,), dtype=torch.int8).to(device)
        mask = pack_mask(torch.rand(n).to(device) < 0.6)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
            y = base.clamp(-6e4, 6e4).to(dtype)
            for output, out in ((formats.FP16_169, DTYPES[0]), (formats.FP8_E5M2, DTYPES[2]), (None, DTYPES[1])):
                plain = Finish(scale, output, False, None, out, Layout.of(y))
                full = Finish(scale, output, False, late, out, Layout.of(y), mask, pack(codes, formats.INT4_SYM))
                name = f"epilogue {dtype} -> {out}, {output}, {n}"
                yield name, lambda y=y, f=plain: compare(Raw(y.clone(), unit=4.0), f)
                yield f"{name}, masked", lambda y=y, f=full: compare(Raw(y.clone()), f)
    y = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, 1e-30], device=device)
    for keep in (False, True):
        for output in (formats.FP16_169, formats.FP4_E2M1, formats.FP4_R4_EVEN, formats.BINARY16):
            finish = Finish(None, output, keep, None, torch.float32, Layout.of(y))
            yield f"epilogue of infinity to {output}, kept: {keep}", lambda f=finish: compare(Raw(y.clone()), f)
