"""`fourbit formats`: the list of number formats, and a page about one of them, on the terminal or as a picture."""

from __future__ import annotations

import io
import math
from pathlib import Path

from fourbit._files import problem, replace_file
from fourbit.cli._terminal import make_table, say, show
from fourbit.errors import UserError
from fourbit.formats import BLOCKS, CATALOG, BlockFormat, Format

MAX_LISTED_BITS = 8
"""Wider formats have too many codes to list one by one: their binades are listed."""


def list_formats() -> None:
    """Print a line per format."""
    table = make_table("format", "bits", "numbers", "smallest", "largest", "definition")
    for each in CATALOG.values():
        numbers = (each.bits, len(each.grid), f"{each.smallest:g}", f"{each.max:g}")
        table.add_row(each.name, *map(str, numbers), each.summary)
    show(table)
    list_block_formats()


def list_block_formats() -> None:
    """Print a line per block-scaled format."""
    table = make_table("block format", "block", "elements", "scales", "bits", "definition")
    for each in BLOCKS.values():
        table.add_row(each.name, str(each.block), each.element.name, each.scale.name, f"{each.bits:g}", each.summary)
    show(table)


def show_block_format(format: BlockFormat) -> None:
    """Print all about a block-scaled format."""
    largest = f"{format.tensor_bound:g} * {max(format.targets):g}"
    scaled = f"float32, the tensor's largest magnitude / ({largest})" if format.tensor_bound else "none"
    say(
        f"{format.name}: {format.summary}\nsource: {format.source or '-'}\n"
        f"elements:         {format.element.name}: {format.element.summary}\n"
        f"block:            {format.block} neighbours along the axis that a product sums over\n"
        f"block scales:     {format.scale.name}: {format.scale.summary}\n"
        f"tensor scale:     {scaled}\n"
        f"micro-exponents:  {_parts(format)}\n"
        f"bits per element: {format.bits:g}\n"
        f"Hold a quantizer against it: fourbit conform mymodule:quantize --format {format.name}"
    )


def _parts(format: BlockFormat) -> str:
    """Who shares the factors of 1 or 2 below a block's scale."""
    return ", ".join(f"a factor of 1 or 2 for each {size}" for size in format.micro) or "none"


def show_format(format: Format, png: Path | None) -> None:
    """Print all about a format, and draw it if `png` is given."""
    drawn = "" if png is None else f"\ndrawn: {draw(format, png)}"
    say(f"{format.name}: {format.summary}\nsource: {format.source or '-'}{drawn}")
    if format.bits > MAX_LISTED_BITS:
        _show_range(format)
        _show_binades(format)
    else:
        _show_codes(format)
    away = format.multiplier is not None or format.ties == "away"
    ties = "goes away from zero" if away else "goes to the number with the even code"
    say(f"A value exactly on a decision point {ties}.")


def _show_codes(format: Format) -> None:
    """Every code, and where rounding decides."""
    table = make_table("code", "bits", "value")
    for code, value in enumerate(format.values):
        table.add_row(str(code), f"{code:0{format.bits}b}", f"{value:.10g}")
    show(table)
    table = make_table("from", "up to", "becomes")
    edges = [float("-inf"), *format.decision_points, float("inf")]
    for low, high, value in zip(edges, edges[1:], format.grid, strict=False):
        table.add_row(f"{low:.10g}", f"{high:.10g}", f"{value:.10g}")
    show(table)


def _show_range(format: Format) -> None:
    """How many codes and numbers there are, and between which magnitudes."""
    nan, infinite = sum(map(math.isnan, format.values)), sum(map(math.isinf, format.values))
    zero = f"{next(p for p in format.decision_points if p > 0):.10g}" if 0 in format.grid else "none, there is no zero"
    opposite = " and its negative" if format.min == -format.max else f", down to {format.min:.10g}"
    say(
        f"codes:             {len(format.values)}, of them {nan} NaN and {infinite} infinite\n"
        f"numbers:           {len(format.grid)}\n"
        f"smallest:          {format.smallest:.10g}\n"
        f"largest:           {format.max:.10g}{opposite}\n"
        f"threshold of zero: {zero}"
    )


def _show_binades(format: Format) -> None:
    """The positive numbers from power of two to power of two: how many, how far apart, first and last code."""
    table = make_table("from", "up to", "numbers", "apart", "first code", "last code")
    binades: dict[int, list[float]] = {}
    for value in format.grid:
        if value > 0:
            binades.setdefault(math.frexp(value)[1], []).append(value)
    for numbers in binades.values():
        ends = (numbers[0], numbers[-1])
        apart = f"{numbers[1] - numbers[0]:.10g}" if len(numbers) > 1 else "-"
        codes = [f"{format.encode(value):0{format.bits}b}" for value in ends]
        table.add_row(*(f"{value:.10g}" for value in ends), str(len(numbers)), apart, *codes)
    show(table)


def draw(format: Format, path: Path) -> Path:
    """Write the picture of a format to `path`, which keeps what it held if that fails.

    Raises:
        UserError: the name is not that of a PNG file, or it could not be written.
    """
    from fourbit.report import draw_number_line

    if path.suffix.lower() != ".png":
        raise UserError(f"{path} is not the name of a PNG file: give one that ends in .png.")
    picture = io.BytesIO()
    draw_number_line(format).savefig(picture, format="png")
    try:
        replace_file(path, picture.getvalue())
    except OSError as error:
        raise UserError(f"{path} could not be written: {problem(error, path)}.") from error
    return path
