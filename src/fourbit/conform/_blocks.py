"""Test tensors out of blocks, and the comparison of a quantizer's numbers with the definition's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourbit.formats import BlockFormat
from fourbit.formats._blocks import ORDERS

PER_ROW = 8
"""Blocks in a row of a test tensor."""
TOLERANCE = 2.0**-21
"""Relative: dequantization multiplies three numbers, each product rounded to float32; codes differ by far more."""
NEAR_TIE = 1e-5
"""Relative difference of two errors that sums in another order may turn round."""

PUBLISHED = {
    "encode_folded": "TransformerEngine's order",
    "encode": "four over six's order",
    "decode": "torchao's order",
}


def variants(format: BlockFormat) -> list[BlockFormat]:
    """The format with all published orders of its arithmetic, its own first."""
    if format.rule != "nearest" or format.micro:
        return [format]
    orders = [format.order, *(order for order in ORDERS if order != format.order)]
    errors = ("squared", "absolute") if len(format.targets) > 1 else (format.error,)
    return [replace(format, order=order, error=error) for error in errors for order in orders]


def describe(format: BlockFormat) -> str:
    """What tells a variant from the others, in words; nothing where there is one."""
    if format.rule != "nearest" or format.micro:
        return ""
    error = f", {format.error} error" if len(format.targets) > 1 else ""
    return PUBLISHED[format.order] + error


def unit(format: BlockFormat) -> float:
    """The largest magnitude of a tensor whose own scale is 1: R, or nothing where there is no tensor scale."""
    return format.tensor_bound * max(format.targets)


def lead(format: BlockFormat) -> list[float]:
    """How a block of scale 1 begins: its largest number, and zeros for all that shares micro-exponents with it."""
    return [max(format.targets), *[0.0] * (max(format.micro, default=1) - 1)]


def pack(format: BlockFormat, blocks: Iterable[Sequence[float]], amax: float | None = None) -> Tensor:
    """Blocks as a tensor [rows, PER_ROW * block], filled with zeros.

    Args:
        format: with a tensor scale, the first block has the largest magnitude `amax` (None: of scale 1) and zeros.
        blocks: at most `format.block` numbers each.
        amax: largest magnitude of the tensor.
    """
    size = format.block
    anchor = [[unit(format) if amax is None else amax]] if format.tensor_bound else []
    padded = [[*block, *[0.0] * (size - len(block))] for block in (*anchor, *blocks)]
    padded += [[0.0] * size] * (-len(padded) % PER_ROW)
    return torch.tensor(padded, dtype=torch.float64).to(torch.float32).view(-1, PER_ROW * size)


@dataclass(frozen=True)
class Comparison:
    """How many numbers were compared, how many are wrong, and the first of these in words."""

    compared: int
    wrong: int
    example: str

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.compared + other.compared, self.wrong + other.wrong, self.example or other.example)


def compare(format: BlockFormat, x: Tensor, y: Tensor) -> Comparison:
    """`y` against the definition's numbers for `x`."""
    rows = x.to(torch.float32).tolist()
    expected = torch.tensor(format.round(rows), dtype=torch.float32).view(x.shape)
    wrong = differs(y, expected)
    if len(format.targets) > 1 and wrong.any():
        expected = _other_targets(format, rows, y, expected, wrong)
        wrong = differs(y, expected)
    return Comparison(wrong.numel(), int(wrong.sum()), example(x, y, expected, wrong))


def differs(y: Tensor, expected: Tensor) -> Tensor:
    """Where two tensors are not the same numbers."""
    same = (y == expected) | (y.isnan() & expected.isnan())
    return ~(same | ((y - expected).abs() <= TOLERANCE * expected.abs()))


def example(x: Tensor, y: Tensor, expected: Tensor, wrong: Tensor) -> str:
    """The first wrong number, with the largest of its row for orientation."""
    if not wrong.any():
        return ""
    row, column = wrong.nonzero()[0].tolist()
    return f"{float(x[row, column]):.9g} became {float(y[row, column]):.9g}, not {float(expected[row, column]):.9g}"


def _other_targets(format: BlockFormat, rows: list[list[float]], y: Tensor, expected: Tensor, wrong: Tensor) -> Tensor:
    """`expected`, with the other target's numbers where both have the same error but for rounding, and `y` took them."""
    amax = max(abs(v) for row in rows for v in row)
    decode = format.tensor_scales(amax)[1]
    expected = expected.clone()
    for row in wrong.any(dim=1).nonzero().flatten().tolist():
        for number, block in enumerate(format.split(rows[row])):
            span = slice(number * format.block, number * format.block + len(block))
            if not wrong[row, span].any():
                continue
            choices = format.choices(block, amax)
            least = min(choice.error for choice in choices)
            for choice in choices:
                if not math.isfinite(least) or choice.error > least * (1 + NEAR_TIE):
                    continue
                s = format.scale.values[choice.scale] * decode
                numbers = torch.tensor([format.element.values[q] * s for q in choice.codes], dtype=torch.float32)
                if not differs(y[row, span], numbers).any():
                    expected[row, span] = numbers
    return expected
