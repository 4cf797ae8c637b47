"""Checks of rounding to nearest: every number against the definition, at the places where quantizers go wrong.

Each check is a function of a `Case`; its docstring's first line says what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fourbit._registry import Registry
from fourbit.conform._blocks import PER_ROW, Comparison, compare, differs, example, lead, pack, unit, variants
from fourbit.conform._report import Result
from fourbit.conform._subject import Refused, Subject
from fourbit.formats import BlockFormat, FloatFormat


@dataclass
class Case:
    """A quantizer, and the format that it is held against.

    Args:
        subject: the quantizer.
        format: block format, in the variant whose arithmetic fits best.
        generator: source of the test numbers.
    """

    subject: Subject
    format: BlockFormat
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, rows: int, columns: int) -> Tensor:
        """Gaussian numbers, rows of different magnitude."""
        x = torch.randn(rows, columns, generator=self.generator)
        return x * torch.exp2(torch.randint(-3, 4, (rows, 1), generator=self.generator))

    def block(self, amax: float) -> list[float]:
        """A block with the largest magnitude `amax` in its middle, and others all over the range."""
        others = torch.rand(self.format.block - 1, generator=self.generator, dtype=torch.float64) * 2 - 1
        numbers = (others * amax).tolist()
        return [*numbers[: len(numbers) // 2], amax, *numbers[len(numbers) // 2 :]]

    def on_grid(self, num: int) -> Tensor:
        """`num` blocks of numbers of the grid, which no rounding changes, stochastic or not."""
        grid, first = self.format.element.grid, lead(self.format)
        pick = torch.randint(len(grid), (num, self.format.block - len(first)), generator=self.generator)
        return pack(self.format, [[*first, *row] for row in torch.tensor(grid)[pick].tolist()])

    def compare(self, x: Tensor) -> Comparison:
        """The quantizer's numbers for `x` against the definition's."""
        return compare(self.format, x, self.subject(x))

    @property
    def wide(self) -> bool:
        """Whether the scales are powers of two over the range of float32."""
        return self.format.scale.smallest < 2.0**-100

    @property
    def least_normal(self) -> float:
        """The smallest normal number of the scale format."""
        scale = self.format.scale
        return 2.0 ** (1 - scale.exponent_bias) if isinstance(scale, FloatFormat) else scale.smallest


SMALLEST_NORMAL = 2.0**-126
"""Of float32."""

Check = Callable[[Case], Result]
CHECKS: Registry[Check] = Registry("check")
"""Checks of rounding to nearest, in the order in which they run."""
ALWAYS = ("grid", "zeros", "NaN", "infinity", "layout")
"""Those that also hold for stochastic rounding."""


def best_variant(subject: Subject, format: BlockFormat) -> BlockFormat:
    """The variant of the format's arithmetic with the fewest wrong numbers; the format's own among equals."""
    candidates = variants(format)
    if len(candidates) == 1:
        return format
    case = Case(subject, format)
    # In bfloat16, numbers fall on decision points often, and there the order decides.
    tensors = [
        case.normal(32, 4 * format.block),
        *(case.normal(32, 4 * format.block).bfloat16().float() for _ in range(6)),
    ]
    results = [subject(x) for x in tensors]
    wrong = [sum(compare(each, x, y).wrong for x, y in zip(tensors, results, strict=True)) for each in candidates]
    return candidates[wrong.index(min(wrong))]


def run(name: str, check: Check, case: Case) -> Result:
    """A check; an error of the quantizer is a failure."""
    try:
        return check(case)
    except Refused as error:
        return Result(name, "fail", f"raised {error}")


def _judge(name: str, found: Comparison, also: str = "") -> Result:
    detail = "; ".join(text for text in (found.example, also) if text)
    return Result(name, "fail" if found.wrong else "pass", detail, found.compared, found.wrong)


@CHECKS.register("grid")
def grid(case: Case) -> Result:
    """Numbers on the grid stay as they are, for all scales that are normal numbers."""
    element, scale = case.format.element, case.format.scale
    if case.wide:
        scales = [2.0**k for k in (-40, -13, -2, -1, 0, 1, 2, 9, 40)]
    else:
        scales = [s for s in scale.grid if case.least_normal <= s <= (case.format.tensor_bound or scale.max)]
    first = lead(case.format)
    step = case.format.block - len(first)
    values = [element.grid[i : i + step] for i in range(0, len(element.grid), step)]
    x = pack(case.format, [[v * s for v in (*first, *part)] for s in scales for part in values])
    y = case.subject(x)
    wrong = differs(y, x)
    return _judge("grid", Comparison(wrong.numel(), int(wrong.sum()), example(x, y, x, wrong)))


@CHECKS.register("ties")
def ties(case: Case) -> Result:
    """Decision points, and the float32 numbers next to them."""
    first = lead(case.format)
    element, step = case.format.element, case.format.block - len(first)
    points = torch.tensor(element.decision_points, dtype=torch.float32)
    near = torch.stack([points, *(torch.nextafter(points, torch.tensor(end)) for end in (math.inf, -math.inf))])
    found = []
    for numbers in near:
        parts = [numbers[i : i + step].tolist() for i in range(0, len(numbers), step)]
        found.append(case.compare(pack(case.format, [[*first, *part] for part in parts])))
    also = f"{found[0].wrong} of {len(points)} exact ties wrong" if found[0].wrong else ""
    return _judge("ties", found[0] + found[1] + found[2], also)


@CHECKS.register("saturation")
def saturation(case: Case) -> Result:
    """Block maxima that their scale takes beyond the largest element."""
    f = case.format
    top = max(f.targets)
    if f.rule == "nearest":  # past a scale that was rounded down, and past the largest scale
        past = 1.0 if f.tensor_bound else 4.0
        maxima = [s * top * k for s in f.scale.grid if case.least_normal <= s <= 256 for k in (1.03, 1.06)]
        maxima += [f.scale.max * top * past * k for k in (0.5, 0.97, 1.0)]
        maxima = [a for a in maxima if not f.tensor_bound or a <= unit(f)]
    else:
        full = 2.0 ** math.floor(math.log2(top) + 1)
        maxima = [2.0**k * (top + (full - top) * i / 32) for k in (-30, -1, 0, 5) for i in range(32)]
    return _judge("saturation", case.compare(pack(f, map(case.block, maxima))))


def _sweep(case: Case) -> Tensor:
    """Block maxima over the normal scales: 48 per binade, and those on both sides of where scales change."""
    f, top = case.format, max(case.format.targets)
    low, high = -30, 31
    if not case.wide:
        largest = f.tensor_bound or f.scale.max
        low, high = math.ceil(math.log2(case.least_normal * top)), math.floor(math.log2(largest * top))
    maxima = [2.0**k * (1 + i / 48) for k in range(low, high, 6 if case.wide else 1) for i in range(48)]
    edges = torch.tensor([2.0**k * m for k in range(low + 1, high) for m in (1.0, top / 4)])
    for end in (math.inf, -math.inf):
        maxima += torch.nextafter(edges, torch.tensor(end)).tolist()
    return pack(f, map(case.block, [*maxima, *edges.tolist()]))


@CHECKS.register("scales")
def scales(case: Case) -> Result:
    """Block scales over their range, on both sides of each power of two."""
    return _judge("scales", case.compare(_sweep(case)))


def _judge_small(name: str, case: Case, tensors: Sequence[Tensor], also: str = "") -> Result:
    """As `_judge`, but that hardware flushes subnormal float32 numbers is open."""
    found, flushed = Comparison(0, 0, ""), 0
    for x in tensors:
        y = case.subject(x)
        expected = torch.tensor(case.format.round(x.tolist()))
        off = differs(y, expected)
        wrong = off & ~((y - expected).abs() <= SMALLEST_NORMAL)
        flushed += int((off & ~wrong).sum())
        found += Comparison(wrong.numel(), int(wrong.sum()), example(x, y, expected, wrong))
    if found.wrong or not flushed:
        return _judge(name, found, also if found.wrong else "")
    return Result(name, "open", f"{flushed} subnormal float32 numbers come out as others", found.compared)


@CHECKS.register("small scales")
def small_scales(case: Case) -> Result:
    """Blocks whose scale is subnormal, the smallest there is, or rounds to zero."""
    f = case.format
    if case.wide:
        maxima = [2.0**k * m for k in range(-149, -118) for m in (1.0, 1.3, 1.8)]
        return _judge_small("small scales", case, [pack(f, map(case.block, maxima))])
    smallest = f.scale.smallest
    maxima = [max(f.targets) * smallest * i / 8 for i in range(1, int(8 * case.least_normal / smallest) + 8)]
    found = case.compare(pack(f, map(case.block, maxima)))
    return _judge("small scales", found, _threshold(case, maxima) if found.wrong else "")


def _threshold(case: Case, maxima: Sequence[float]) -> str:
    """From which block maximum on all is well, in units of the scale."""
    blocks = [case.block(a) for a in maxima]
    x = pack(case.format, blocks)
    expected = torch.tensor(case.format.round(x.tolist()))
    good = ~differs(case.subject(x), expected).view(-1, case.format.block).any(dim=1)
    first = 1 if case.format.tensor_bound else 0
    bad = [a for a, well in zip(maxima, good[first : first + len(maxima)].tolist(), strict=True) if not well]
    return f"wrong up to scales of {max(bad) / max(case.format.targets):.4g}" if bad else ""


@CHECKS.register("large numbers")
def large_numbers(case: Case) -> Result:
    """The largest float32 numbers."""
    top = float(torch.finfo(torch.float32).max)
    return _judge(
        "large numbers", case.compare(pack(case.format, map(case.block, [top, top / 2, top / 3, 1.0]), amax=top))
    )


@CHECKS.register("tensor scale")
def tensor_scale(case: Case) -> Result:
    """Tensors whose largest magnitude lies anywhere between 2^-100 and 2^100."""
    found = Comparison(0, 0, "")
    for k in range(-100, 101, 10):
        amax = 2.0**k * (1 + float(torch.rand((), generator=case.generator)))
        fractions = (0.9, 0.5, 0.3, 0.1, 0.04, 0.01)  # and a second row, whose own maximum is another
        blocks = [case.block(amax * f) for f in (*fractions, *(0.37 * f for f in fractions))]
        found += case.compare(pack(case.format, blocks, amax=amax))
    return _judge("tensor scale", found)


@CHECKS.register("small tensors")
def small_tensors(case: Case) -> Result:
    """Tensors of the smallest float32 numbers, subnormal ones included."""
    exponents = range(-148, -107, 4)
    tensors = [pack(case.format, map(case.block, [2.0**k, 2.0 ** (k - 1)]), amax=2.0**k) for k in exponents]
    result = _judge_small("small tensors", case, tensors)
    if result.status != "fail":
        return result
    largest = max(k for k, x in zip(exponents, tensors, strict=True) if _judge_small("", case, [x]).status == "fail")
    return replace(result, detail=f"{result.detail}; wrong up to a maximum of 2^{largest}")


@CHECKS.register("random")
def random(case: Case) -> Result:
    """Gaussian numbers, and numbers with heavy tails."""
    x = case.normal(48, 4 * case.format.block)
    tails = torch.randn(32, 4 * case.format.block, generator=case.generator)
    return _judge("random", case.compare(x) + case.compare(tails * (tails / 2).exp()))


@CHECKS.register("zeros")
def zeros(case: Case) -> Result:
    """A tensor of zeros, and blocks of zeros among others."""
    x = case.normal(8, PER_ROW * case.format.block)
    x[2, : case.format.block] = 0.0
    x[3] = -0.0
    found = Comparison(0, 0, "")
    for tensor, where in ((torch.zeros_like(x), "a tensor of zeros"), (x, "a block of zeros")):
        empty = tensor == 0
        y = case.subject(tensor)
        wrong = empty & (y != 0)
        text = f"{where} became {float(y[wrong][0])}" if wrong.any() else ""
        found += Comparison(int(empty.sum()), int(wrong.sum()), text)
    return _judge("zeros", found)


def _spoilt(case: Case, value: float) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The numbers that come out of a tensor with one `value`, and out of the same with a zero there, and its place."""
    x, place = case.on_grid(4 * PER_ROW), (1, 2 * case.format.block + 3)
    x[place] = 0.0
    clean = case.subject(x)
    x[place] = value
    return case.subject(x), clean, place


def _reach(case: Case, y: Tensor, clean: Tensor, place: tuple[int, int]) -> tuple[str, bool]:
    """How far a number's effect goes, in words, and whether blocks that have nothing to do with it are touched."""
    size = case.format.block
    touched = differs(y, clean).view(len(y), -1, size).any(dim=2)
    row, block = place[0], place[1] // size
    beyond = touched.clone()
    beyond[row, block] = False
    hurt = bool(beyond.any()) and not case.format.tensor_bound
    if beyond.any():
        everything = y.isnan().all() or bool(beyond.sum() == beyond.numel() - 1)
        return ("all of the tensor changes" if everything else f"{int(beyond.sum())} other blocks change"), hurt
    span = y[row, block * size : (block + 1) * size]
    return ("its block becomes NaN" if span.isnan().all() else "its block alone changes"), hurt


@CHECKS.register("NaN")
def nan(case: Case) -> Result:
    """A NaN comes out as NaN, and blocks that have nothing to do with it stay."""
    y, clean, place = _spoilt(case, math.nan)
    text, hurt = _reach(case, y, clean, place)
    if not y[place].isnan():
        return Result("NaN", "fail", f"NaN became {float(y[place]):g}; {text}", 1, 1)
    return Result("NaN", "fail" if hurt else "pass", text, 1)


@CHECKS.register("infinity")
def infinity(case: Case) -> Result:
    """What becomes of infinity is open, as long as other blocks stay and it does not become less than its neighbours."""
    y, clean, place = _spoilt(case, math.inf)
    text, hurt = _reach(case, y, clean, place)
    value = float(y[place])
    became = "NaN" if math.isnan(value) else "infinity" if math.isinf(value) else f"{value:g}"
    size, (row, column) = case.format.block, place
    others = clean[row, column // size * size : (column // size + 1) * size].abs().max()
    lost = abs(value) < float(others)  # False for NaN
    return Result("infinity", "fail" if hurt or lost else "open", f"becomes {became}; {text}", 1, int(lost))


@CHECKS.register("ragged ends")
def ragged(case: Case) -> Result:
    """Rows that are no multiple of the block."""
    size = case.format.block
    found = Comparison(0, 0, "")
    for columns in (1, size // 2 + 1, size - 1, size + 1, 3 * size - 1):
        x = case.normal(3, columns)
        try:
            y = case.subject(x)
        except Refused as error:
            return Result("ragged ends", "refuses", f"K = {columns}: {error}")
        found += compare(case.format, x, y)
    return _judge("ragged ends", found)


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "transposed", x.t().contiguous().t()
    wide = torch.full((x.shape[0], 2 * x.shape[1]), 1e9)
    wide[:, ::2] = x
    yield "every other column", wide[:, ::2]
    yield "part of a larger tensor", torch.cat([torch.full_like(x, 1e9), x])[len(x) :]


@CHECKS.register("layout")
def layout(case: Case) -> Result:
    """Transposed and strided inputs give the numbers of contiguous ones; the input stays as it is."""
    x = case.on_grid(4 * PER_ROW)
    expected = case.subject(x)
    found, refused = Comparison(0, 0, ""), ""
    for name, view in _layouts(x):
        try:
            y = case.subject(view)
        except Refused as error:
            refused = refused or f"{name}: {error}"
            continue
        wrong = differs(y, expected)
        text = f"{name}: {example(x, y, expected, wrong)}" if wrong.any() else ""
        found += Comparison(wrong.numel(), int(wrong.sum()), text)
    if case.subject.changed_input:
        return Result("layout", "fail", "the input was changed", found.compared, max(found.wrong, 1))
    if refused and not found.wrong:
        return Result("layout", "refuses", refused, found.compared)
    return _judge("layout", found)


@CHECKS.register("bfloat16")
def bfloat16(case: Case) -> Result:
    """A bfloat16 input gives what the same numbers give in float32, or that rounded to bfloat16."""
    x = case.normal(16, 4 * case.format.block).bfloat16()
    try:
        y = case.subject(x)
    except Refused as error:
        return Result("bfloat16", "refuses", str(error))
    expected = torch.tensor(case.format.round(x.float().tolist()))
    wrong = differs(y, expected) & differs(y, expected.bfloat16().float())
    return _judge("bfloat16", Comparison(wrong.numel(), int(wrong.sum()), example(x, y, expected, wrong)))


@CHECKS.register("repeated")
def repeated(case: Case) -> Result:
    """The same input gives the same numbers again."""
    x = case.normal(16, 4 * case.format.block)
    first, second = case.subject(x), case.subject(x)
    wrong = differs(first, second)
    return _judge("repeated", Comparison(wrong.numel(), int(wrong.sum()), example(x, second, first, wrong)))


@CHECKS.register("sizes")
def sizes(case: Case) -> Result:
    """One row, and none."""
    block = case.format.block
    one = case.normal(1, 2 * block)
    found = case.compare(one)
    try:
        case.subject(torch.zeros(0, 2 * block))
    except Refused as error:
        return Result(
            "sizes", "fail" if found.wrong else "refuses", found.example or f"no rows: {error}", found.compared
        )
    return _judge("sizes", found)
