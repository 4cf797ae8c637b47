"""`QuantSpec` describes how one operand is quantized: grid, scale, who shares it, rounding rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from fourbit.errors import UserError
from fourbit.formats import Format, IntFormat, get
from fourbit.quantizers._blocks import BlockScale
from fourbit.quantizers._estimator import DGE
from fourbit.quantizers._round import Rounding
from fourbit.quantizers._scaling import FixedScale, Scaling
from fourbit.quantizers._tiles import Granularity, Tile, require_granularity
from fourbit.quantizers._transform import Hadamard


def half_of(format: Format) -> int | None:
    """h, if the format is all integers of -2 h^2 .. 2 h^2: the numbers 2 h high + low with high and low of -h .. h.

    >>> half_of(get("int4_pair")), half_of(get("int8_sym"))
    (7, None)
    """
    half = math.isqrt(int(format.max) // 2)
    whole = isinstance(format, IntFormat) and format.max == -format.min == 2 * half * half
    return half if whole else None


Compensation = Literal["", "magnitude", "sum"]
Source = Literal["exact", "fprop"]


@dataclass(frozen=True)
class QuantSpec:
    """One operand: grid, scale, who shares it, and rounding rule.

    Args:
        format: a Format or the name of one.
        scaling: where the scale comes from.
        granularity: "tensor", "row", "channel", `Block(n)` or `Tile(rows, n)`: see `fourbit.quantizers.Tile`.
        rounding: a `Rounding`.
        samples: average of this many independent stochastic roundings (LUQ's SMP); 1 for other rules.
        compensate: for gradients, what of the exact tensor x the products get back, which its rounding x^ has lost:
            "magnitude" multiplies their results by sum(x^2) / sum(x x^), so that the projection of x^ on x is x again, one
            number per tensor and GEMM; "sum" adds to each channel of x^ the same number, so that its sum is that of x (an
            experiment: the operand is no longer on the grid).
        transform: rotates the operand along the axis that its product sums over, before anything else. Both operands of a
            product have the same.
        source: what is quantized. "exact": the tensor; "fprop": for w_dgrad and x_wgrad, what fprop had of it (quantized a
            second time).
        estimator: for w_fprop, what the gradient of its rounding is taken for; None: straight through.
        outliers: for x_fprop, a quantile near 1. What lies beyond it (and below 1 minus it), of the tensor or of each row, is
            clamped, and the difference multiplied in high precision by the quantized weight (OCC, outlier clamping and
            compensation); the hardware would have a sparse product for it. None: everything is quantized.
        leverage: for gradients in a format of two parts, such as int4_pair: the share of the rows of both parts that a product
            is computed with, chosen at random by leverage scores (see `fourbit.ops._leverage`). None: all of them.

    >>> str(QuantSpec("fp4_e2m1"))
    'fp4_e2m1, fixed 1'
    """

    format: Format
    scaling: Scaling = field(default_factory=FixedScale)
    granularity: Granularity = "tensor"
    rounding: Rounding = Rounding.NEAREST
    samples: int = 1
    compensate: Compensation = ""
    transform: Hadamard | None = None
    source: Source = "exact"
    estimator: DGE | None = None
    outliers: float | None = None
    leverage: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get(self.format))
        if self.compensate not in ("", "magnitude", "sum"):
            raise UserError(f"compensate must be '', 'magnitude' or 'sum', not {self.compensate!r}")
        require_granularity(self.granularity)
        if isinstance(self.scaling, BlockScale) and not self.in_tiles:
            raise UserError("a BlockScale needs tiles to scale: use granularity=Block(16), for example")
        micro = self.scaling.micro if isinstance(self.scaling, BlockScale) else ()
        if micro and not (
            isinstance(self.granularity, Tile)
            and self.granularity.rows == 1
            and not (self.granularity.sums or 1) % micro[0]
        ):
            raise UserError(
                f"parts of {micro[0]} with micro-exponents need blocks of whole parts: use granularity=Block(64)"
            )
        if objection := self.scaling.objection(self.granularity):
            raise UserError(objection)
        if self.compensate and (
            self.transform is not None or isinstance(self.granularity, Tile) or self.granularity == "row"
        ):
            raise UserError("compensate is for scales of the tensor or of channels, without a transform")
        if self.source not in ("exact", "fprop"):
            raise UserError(f"source must be 'exact' or 'fprop', not {self.source!r}")
        if not (self.transform is None or isinstance(self.transform, Hadamard)):
            raise UserError(f"transform must be a Hadamard or None, not {self.transform!r}")
        if self.estimator is not None and (self.transform is not None or self.scaling.clips):
            raise UserError("an estimator is for operands that are neither rotated nor clipped: leave one of them out")
        if self.outliers is not None:
            if not 0.5 < self.outliers < 1:
                raise UserError(f"outliers is a quantile between 0.5 and 1, not {self.outliers!r}")
            if self.transform is not None or self.scaling.clips or self.granularity not in ("tensor", "row"):
                raise UserError("outliers are split off per tensor or row, without a transform or a clip value")
        if self.leverage is not None:
            if not 0 < self.leverage <= 1:
                raise UserError(f"leverage is a share above 0 and at most 1, not {self.leverage!r}")
            if half_of(self.format) is None:
                raise UserError(f"leverage is for formats of two parts, such as int4_pair, not {self.format.name}")
            if self.transform or self.granularity != "tensor" or self.samples > 1 or self.compensate:
                raise UserError("leverage is for scales of the tensor, without transform, samples or compensate")
        if self.samples < 1 or (self.samples > 1 and not self.rounding.draws):
            raise UserError("samples must be 1, or more with stochastic rounding")

    @cached_property
    def stochastic(self) -> bool:
        """Whether it needs random words."""
        fresh = self.transform is not None and self.transform.is_fresh
        drawn = self.rounding.draws or fresh or self.leverage is not None
        return drawn or (isinstance(self.scaling, BlockScale) and self.scaling.draws)

    @cached_property
    def in_tiles(self) -> bool:
        """Whether several scales are shared by parts of the operand."""
        return self.granularity != "tensor" and self.granularity != Tile(None, None)

    @cached_property
    def needs_orientation(self) -> bool:
        """Whether it matters which axis the product sums over."""
        return self.in_tiles or self.transform is not None

    def starting_at(self, bound: float) -> QuantSpec:
        """The same for data that `bound` limits, where the first batch would decide the scale."""
        scaling, format = self.scaling.starting_at(bound, self.format)
        return replace(self, scaling=scaling, format=format)

    def __str__(self) -> str:
        parts = [self.format.name, str(self.scaling)]
        if self.in_tiles:
            parts.append(f"per {self.granularity}")
        if self.rounding is not Rounding.NEAREST:
            parts.append(self.rounding.value)
        if self.samples > 1:
            parts.append(f"{self.samples} samples")
        if self.compensate:
            parts.append(f"{self.compensate} restored")
        if self.transform is not None:
            parts.append(str(self.transform))
        if self.source == "fprop":
            parts.append("of fprop's")
        if self.estimator is not None:
            parts.append(str(self.estimator))
        if self.outliers is not None:
            parts.append(f"beyond quantile {self.outliers:g} in high precision")
        if self.leverage is not None:
            parts.append(f"{self.leverage:g} of the rows of both parts by leverage")
        return ", ".join(parts)
