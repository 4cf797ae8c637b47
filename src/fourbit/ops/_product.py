"""Matrix products of quantized operands.

    y = late * out(scale_a scale_b (a * b))

The operands are grid values in their carriers, with the scales factored out. The reference multiplies them in float32: a
product of two 4-bit operands is exact, and so is a sum of them while it fits the 24 bits of float32. A backend may
multiply the carriers in another way (int8 with int32 sums, bfloat16 with float32 sums). What comes out of the multiplier
is a `Raw`; scaling it, rounding it to the output format, and masking it for the straight-through gradient is a `Finish`,
one pass over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fourbit.backends import Operation, Plans
from fourbit.formats import Format
from fourbit.ops._accumulation import Accumulation, accumulate
from fourbit.ops._contraction import Contraction, Which
from fourbit.ops._orientation import Orientation
from fourbit.quantizers import Packed, carrier_dtype, round_to_format, unpack_mask

Products = Literal["fast", "exact"]
"""How backends may multiply.

    exact   sums are exact or in float32, rounded once to the output format
    fast    where the library of the platform rounds the results of a product to bfloat16 (convolutions' gradients on a CPU
            and on a GPU), that is accepted in place of the output format: a relative error of at most 2^-8 per result;
            on a GPU, also float16 results before the output format (convolutions forward: 2^-12), and the sums of FP8
            tensor cores (large Linear layers backward: about 2^-13 of the largest partial sum)
"""


class Operand(NamedTuple):
    """Numbers in their carrier or packed, a 0-d scale still to be multiplied (None: 1), and the format (None: none).

    `on_grid` says that the numbers are the format's own, and not multiplied by the scales of parts or averaged. `cache`, if
    there is one, says that the operand enters several products of one kind: what they make of it is kept there, under a name.
    With an `orientation` it is kept as [groups, rows, spots, sums], perhaps with a scale of each row, and is no operand of a
    product before `natural` has made it one.
    """

    q: Tensor | Packed
    scale: Tensor | None = None
    format: Format | None = None
    on_grid: bool = False
    cache: dict[str, Any] | None = None
    orientation: Orientation | None = None

    def natural(self, contraction: Contraction, name: str) -> Operand:
        """As a product takes it: "x", "w" or "g" with its own axes, and at most one scale."""
        if self.orientation is None:
            return self
        q, scale = self.q, self.scale
        if isinstance(q, Packed):
            q = q.unpack(carrier_dtype(self.format) if self.on_grid and self.format else _carrier(q, contraction))
        if scale is not None and scale.dim():
            q, scale = q.to(torch.float32) * scale, None
        return Operand(contraction.prepare(self.orientation.back(q), name), scale, self.format, self.on_grid)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers in a dtype that holds them."""
        q, cache = self.q, self.cache
        if cache is None:
            return q.unpack(dtype) if isinstance(q, Packed) else q if q.dtype is dtype else q.to(dtype)
        name = f"numbers {dtype}"
        if name not in cache:
            cache[name] = q.unpack(dtype) if isinstance(q, Packed) else q.to(dtype)
        return cache[name]

    @property
    def is_cpu(self) -> bool:
        """Whether they are on the CPU."""
        return self.q.data.is_cpu if isinstance(self.q, Packed) else self.q.is_cpu

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.q.data.device if isinstance(self.q, Packed) else self.q.device


def _carrier(q: Packed, contraction: Contraction) -> torch.dtype:
    """What codes with the scales of blocks are unpacked to."""
    return torch.bfloat16 if q.fits_bfloat16 and not in_float32(contraction, q.data.device) else torch.float32


def in_float32(contraction: Contraction, device: torch.device) -> bool:
    """Whether numbers with the scales of blocks are wanted in float32, even where bfloat16 holds them."""
    wanted = BLOCK_CARRIER(contraction, device)
    return device.type == "cpu" if wanted is None else wanted == torch.float32


class Layout(NamedTuple):
    """Shape and order of axes of a tensor that does not exist yet, or no longer."""

    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(t: Tensor) -> Layout:
        """The layout of a dense tensor."""
        return Layout(t.shape, t.stride())

    @staticmethod
    def channels_last(shape: Sequence[int]) -> Layout:
        """[N, C, H, W] with the channels fastest."""
        _, c, h, w = shape
        return Layout(torch.Size(shape), (c * h * w, 1, c * w, c))

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory with nothing in it."""
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=device)

    def is_contiguous(self) -> bool:
        """Whether the axes lie in order, without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def match(self, t: Tensor) -> Tensor:
        """`t` with its elements in this order."""
        if t.stride() == self.stride:
            return t
        return self.empty(t.dtype, t.device).copy_(t)


@dataclass(slots=True, eq=False)
class Gemm:
    """One of the three products of a layer: fprop(x, w), dgrad(g, w) or wgrad(g, x); `layout` is that of dx or dw.

    With an `accumulation`, whose random words `key` names, it does not go to a backend as a whole: see `accumulate`.
    With `output`, whoever takes the result knows the backend's 16-bit codes: it may return them instead of numbers, scaled
    and rounded to that format. `plans` are its layer's.

    Attributes:
        scale: the product of the operands' scales; None: 1.
    """

    which: Which
    contraction: Contraction
    a: Operand
    b: Operand
    layout: Layout | None
    dtype: torch.dtype
    products: Products
    accumulation: Accumulation | None = None
    key: int | None = None
    output: Format | None = None
    plans: Plans | None = None
    scale: Tensor | None = field(init=False)
    _description: tuple[Any, ...] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        a, b = self.a.scale, self.b.scale
        self.scale = b if a is None else a if b is None else a * b

    def description(self) -> tuple[Any, ...]:
        """All that a kernel may look at before it works: no number of an operand."""
        if self._description is not None:
            return self._description
        a, b, scale = self.a, self.b, self.scale
        self._description = (
            *(a.format, a.on_grid, _lies(a.q), b.format, b.on_grid, _lies(b.q), b.cache is None),
            *(scale is None or scale.numel() == 1, self.which, self.contraction, self.layout, self.dtype),
            *(self.products, self.output, torch.get_num_threads()),
        )
        return self._description

    @property
    def keep_infinite(self) -> bool:
        """Whether an operand is in full precision, so that infinities must not saturate."""
        return self.a.format is None or self.b.format is None


class Raw(NamedTuple):
    """What comes out of a multiplier: unit * (y + 256 * high). `rounded`: already as the output format demands; y may then
    be int16, the backend's codes, if the Gemm asked for an `output`."""

    y: Tensor
    high: Tensor | None = None
    unit: float = 1.0
    rounded: bool = False


def _lies(q: Tensor | Packed) -> tuple[Any, ...]:
    """How numbers lie in memory."""
    if isinstance(q, Packed):
        return q.shape, q.stride, q.signed, q.grid, q.blocks is None, q.data.device
    return q.shape, q.stride(), q.dtype, q.device


@dataclass(slots=True, eq=False)
class Finish:
    """What becomes of a Raw.

    Args:
        scale: multiplied before rounding (None: 1).
        output: format to round to (None: not).
        keep_infinite: infinities pass instead of saturating, because an operand was in full precision.
        late: 0-d, multiplied after rounding.
        dtype: of the result.
        layout: of the result.
        mask, codes: bits of the straight-through gradient, and the operand's codes where the clip value's gradient is wanted.
    """

    scale: Tensor | None
    output: Format | None
    keep_infinite: bool
    late: Tensor | None
    dtype: torch.dtype
    layout: Layout | None = None
    mask: Tensor | None = None
    codes: Packed | Tensor | None = None

    def description(self) -> tuple[Any, ...]:
        """All that a kernel may look at before it works, of the result of a Gemm with a description of its own."""
        late, codes = self.late, self.codes
        lies = None if codes is None else _lies(codes)
        return self.output, self.keep_infinite, self.dtype, late is None or late.numel() == 1, self.mask is None, lies


GEMM: Operation[[Gemm], Raw] = Operation("gemm", reference="ops._product.reference_product")
"""A product without accumulation format, neither scaled nor rounded."""
EPILOGUE: Operation[[Raw, Finish], tuple[Tensor, Tensor | None]] = Operation(
    "epilogue", reference="ops._product._finish"
)
"""What follows a product: its result, and the sum of what was clipped."""
BLOCK_CARRIER: Operation[[Contraction, torch.device], torch.dtype] = Operation(
    "block_carrier", reference="(float32 on a CPU, bfloat16 elsewhere)"
)
"""In which dtype a backend multiplies numbers with the scales of their blocks, float32 or bfloat16, with float32 sums."""
PRODUCT: Operation[[Gemm, Finish], tuple[Tensor, Tensor | None]] = Operation(
    "product", reference="(gemm, then epilogue, whose results it has)"
)
"""Both at once."""


def product(
    gemm: Gemm,
    output: Format | None,
    dtype: torch.dtype,
    late: Tensor | None = None,
    mask: Tensor | None = None,
    codes: Packed | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The product in `dtype`, and the sum over masked results of sign(code) * result, if `codes` are given.

    Args:
        late: scale taken out after rounding, 0-d or broadcastable against the result.
        mask: bits as of `pack_mask`, in the order of `gemm.layout`: results are zero where it is not set.
    """
    what = Finish(gemm.scale, output, gemm.keep_infinite, late, dtype, gemm.layout, mask, codes)
    if gemm.accumulation is None and gemm.dtype != torch.float64:
        done = _by_plan(PRODUCT, gemm, (gemm.description(), what.description()), gemm, what)
        if done is not None:
            return done
    return finish(multiply(gemm), what)


def _by_plan(operation: Operation[..., Any], gemm: Gemm, description: tuple[Any, ...], *args: Any) -> Any:
    """What a kernel makes of the call, by its layer's plan; None: none takes it."""
    if gemm.plans is None:
        return operation(*args)
    work = gemm.plans.work(operation, gemm.which, description, *args)
    return None if work is None else work(*args)


def multiply(gemm: Gemm) -> Raw:
    """The product without scales and rounding."""
    if gemm.accumulation is not None:
        return Raw(_accumulate(gemm, gemm.accumulation))
    raw = None if gemm.dtype == torch.float64 else _by_plan(GEMM, gemm, gemm.description(), gemm)
    return Raw(reference_product(gemm)) if raw is None else raw


def finish(raw: Raw, what: Finish) -> tuple[Tensor, Tensor | None]:
    """Scale, round and mask a product; see `product`."""
    return EPILOGUE(raw, what) or _finish(raw, what)


def reference_product(gemm: Gemm) -> Tensor:
    """The product in `gemm.dtype`, as the contraction defines it."""
    a, b = gemm.a.to(gemm.dtype), gemm.b.to(gemm.dtype)
    if gemm.which == "fprop":
        return gemm.contraction.fprop(a, b)
    assert gemm.layout is not None
    like = gemm.layout.empty(gemm.dtype, a.device)
    multiply = gemm.contraction.dgrad if gemm.which == "dgrad" else gemm.contraction.wgrad
    return multiply(a, b, like)


def _accumulate(gemm: Gemm, accumulation: Accumulation) -> Tensor:
    a, b = gemm.a.to(torch.float32), gemm.b.to(torch.float32)
    if gemm.layout is None:
        shape = gemm.contraction.fprop(a.to("meta"), b.to("meta")).shape  # and torch's own errors
    else:
        shape = gemm.layout.shape
    a, b, arrange = gemm.contraction.matrices(gemm.which, a, b, shape)
    return arrange(accumulate(a, b, accumulation, gemm.key))


def _finish(raw: Raw, finish: Finish) -> tuple[Tensor, Tensor | None]:
    y = raw.y
    if not y.is_floating_point():
        total = y.double() if raw.high is None else y.double().add_(raw.high, alpha=256)
        y = total.to(torch.float32)
    elif y.dtype not in (torch.float32, torch.float64):
        y = y.to(torch.float32)
    if raw.unit != 1.0:
        y = y.mul_(raw.unit)
    if finish.scale is not None:
        y = y.mul_(finish.scale)
    if finish.output is not None and not raw.rounded:
        rounded = round_to_format(y, finish.output).to(y.dtype)
        # NaN in a scale passes through; infinity in an operand in full precision must not be saturated away.
        y = torch.where(y.isfinite(), rounded, y) if finish.keep_infinite else rounded
    if finish.late is not None:
        y = y.mul_(finish.late)
    if finish.mask is None:
        return y.to(finish.dtype), None
    assert finish.layout is not None
    y = finish.layout.match(y)
    inside = y.masked_fill(unpack_mask(finish.mask, y).logical_not_(), 0.0)
    clipped = None
    if finish.codes is not None:
        q = finish.codes.unpack(torch.float32) if isinstance(finish.codes, Packed) else finish.codes
        clipped = y.sub_(inside).mul_(q.sign()).sum(dtype=torch.float32)
    return inside.to(finish.dtype), clipped
