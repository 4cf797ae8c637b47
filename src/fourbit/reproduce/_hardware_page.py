"""The page of `fourbit hardware report`: what the paper's 7.3x rests on, and what a training step costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fourbit.errors import UserError
from fourbit.hardware import (
    SPEEDS,
    UNITS,
    Results,
    figure_6c,
)
from fourbit.report import PALETTE, REFERENCE_COLOR, Chapter, Grid, Plot, Text, legend, panels, style
from fourbit.reproduce import _hardware_networks
from fourbit.reproduce._hardware_networks import Products

PAPER = 4 / 0.55
"""Of the paper, INT4 x FP4 against FP16."""
TABLE_PERIODS = (3000.0, 4000.0, 6000.0)
PERIODS = (2000.0, 2500.0, 3000.0, 4000.0, 5000.0, 6000.0, 8000.0)
MAIN_UNITS = ("int4_fp4", "int4_int4", "int4_fp4r2", "mxfp4", "nvfp4", "int4_fp8", "fp8")


def write(out: Path, results: Results, products: Products, runs: Sequence[Path]) -> Path:
    """Write the page.

    Args:
        out: where.
        results: of synthesis.
        products: (model, recipe, input, classes, batch size) -> the products of a step.
        runs: folders with training runs, for accuracy against energy.
    """
    from fourbit.report import write_page

    with style():
        accuracy = _hardware_networks.accuracy(
            results, products, runs
        )  # a wrong folder is told of before the long work
        networks = _hardware_networks.networks_of(products)
        chapters = [
            Chapter("answer", "Is 7.3 right?", _answer(results)),
            Chapter("units", "Units", _units(results)),
            Chapter("overheads", "What conversion, two phases and GradScale cost", _overheads(results)),
            Chapter("paper", "The paper's estimate, and ours in its place", _paper(results)),
            Chapter("networks", "Networks", _hardware_networks.costs(results, networks)),
            Chapter("accuracy", "Accuracy and energy", accuracy),
            Chapter("sensitivity", "What the conclusions depend on", _hardware_networks.sensitivity(results, networks)),
            Chapter("limits", "What is not modelled", _limits(results)),
        ]
    return write_page(out, "Arithmetic for 4-bit training", _summary(results), chapters)


def _ratio(results: Results, unit: str, period: float | None, registers: bool = True, shared: int = 32) -> str:
    try:
        return f"{results.density(unit, period, registers, shared):.2f}"
    except UserError:
        return "-"


def _summary(results: Results) -> str:
    fp16 = results.density("int4_fp4")
    fixed = results.density("int4_fp4_fixed")
    return (
        f"Multiply-accumulates per second and area of four-way INT4 x FP4, against an FP16 1-6-9 fused multiply-add in the "
        f"same library ({results.library}), each at its own best clock: {fp16:.1f} if sums are rounded to FP16 every cycle, "
        f"{fixed:.1f} if they are kept in a fixed-point register with a shared converter. The paper says 7.3."
    )


# Chapters


def _answer(results: Results) -> list[Text | Grid | Plot]:
    rows: list[tuple[str, ...]] = []
    for title, unit, registers, shared in (
        ("FP16 sums", "int4_fp4", True, 0),
        ("FP16 sums, without registers", "int4_fp4", False, 0),
        ("FP16 sums, odd phase, unsigned activations", "uint4_fp4", True, 0),
        ("FP16 sums, one operand for both kinds of activations (INT5)", "int5_fp4", True, 0),
        ("fixed-point register, a converter for 32 units", "int4_fp4_fixed", True, 32),
        ("fixed-point register, a converter for 8 units", "int4_fp4_fixed", True, 8),
        ("fixed-point register, a converter for each unit", "int4_fp4_fixed", True, 1),
        ("fixed-point register, without registers and converter", "int4_fp4_fixed", False, 0),
    ):
        cells = [_ratio(results, unit, p, registers, shared) for p in (*TABLE_PERIODS, None)]
        rows.append((title, *cells))
    ways = [f"int4_fp4{ways}{sums}" for ways in ("_1", "", "_8", "_16") for sums in ("", "_fixed")]
    ways += ["int4_int4", "int4_int4_fixed", "int4_fp4r2", "int4_fp4r2_fixed"]
    ways += ["int4_fp8", "int4_fp8_4", "fp8", "fp8_4", "fp8_8"]
    ways += ["mxfp4", "mxfp4_16", "nvfp4", "nvfp4_16", "fma_binary16", "fma_bf16"]
    ways = [u for u in ways if u in results.units]
    by_ways = []
    for unit in ways:
        by_ways.append(
            (
                UNITS[unit].title,
                str(UNITS[unit].macs),
                *(_ratio(results, unit, p) for p in (*TABLE_PERIODS, None)),
            )
        )
    head = ("INT4 x FP4 radix-4 against FP16", *(f"{p / 1000:g} ns" for p in TABLE_PERIODS), "each at its best")
    return [
        Text(
            "Ratio of multiply-accumulates per second and area at the same clock period; for each the smallest form that meets "
            "it, whatever its pipeline. '-': it misses the clock."
        ),
        Grid(head, rows),
        _density_plot(results),
        Text(
            "The same by the number of ways, and with other formats. One way of FP16, two of FP8 and four of FP4 read the "
            "same 16 bits per operand and cycle."
        ),
        Grid(("", "ways", *head[1:]), by_ways),
    ]


def _density_plot(results: Results) -> Plot:
    figure, axes = panels(
        2, f"Density against an FP16 multiply-add, {results.library}", columns=2, height=3.4, sharey=False
    )
    entries = {}
    for number, unit in enumerate(MAIN_UNITS):
        curves = [(axes[0], unit)]
        if f"{unit}_fixed" in results.units:
            curves.append((axes[1], f"{unit}_fixed"))
        for axis, name in curves:
            points = []
            for period in PERIODS:
                try:
                    points.append((period / 1000, results.density(name, period)))
                except UserError:
                    continue
            if points:
                entries[unit] = axis.plot(*zip(*points, strict=True), "o-", color=PALETTE[number], label=unit)[0]
    for axis, title in zip(axes, ("sums in FP16", "fixed-point register, converter shared by 32"), strict=True):
        entries["paper: 7.3"] = axis.axhline(PAPER, color=REFERENCE_COLOR, linestyle="--", linewidth=1)
        axis.set_title(title, loc="left")
        axis.set_xlabel("clock period, ns")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("MACs per second and area, FP16 = 1")
    legend(figure, entries)
    return Plot(
        "density", "Density", "Density of units with 4 and 8 bits at the same clock as the FP16 multiply-add.", figure
    )


def _units(results: Results) -> list[Text | Grid | Plot]:
    rows = []
    for unit in results.units:
        points = results.points_of(unit)
        small, fast = min(points, key=lambda p: p.area), min(points, key=lambda p: p.period)
        macs = UNITS[unit].macs
        rows.append(
            (
                UNITS[unit].title,
                f"{small.area:,.0f}",
                f"{small.area / results.gate_equivalent:,.0f}",
                f"{small.period / 1000:.2f}",
                f"{fast.area:,.0f}",
                f"{fast.period / 1000:.2f}",
                str(len(fast.cuts)),
                f"{small.energy / max(1, macs) / 1000:.2f}",
                _ratio(results, unit, None) if macs else "",
            )
        )
    head = (
        "unit",
        "smallest, um2",
        "gates",
        "ns",
        "fastest, um2",
        "ns",
        "registers deep",
        "pJ per MAC or cycle",
        "density",
    )
    figure, (axis,) = panels(1, "Area and clock period of every form", columns=1, height=3.6)
    entries = {}
    for unit in ("fma_fp16", "int4_fp4", "int4_fp4_fixed", "int4_fp8", "fp8", "nvfp4"):
        if unit not in results.units:
            continue
        points = results.points_of(unit)
        number = MAIN_UNITS.index(unit) if unit in MAIN_UNITS else len(MAIN_UNITS)
        color = REFERENCE_COLOR if unit == "fma_fp16" else PALETTE[number % len(PALETTE)]
        x, y = [p.period / 1000 for p in points], [p.area / 1000 for p in points]
        entries[unit] = axis.scatter(x, y, s=14, color=color, label=unit)
    axis.set_xlabel("clock period between registers, ns")
    axis.set_ylabel("area, 1000 um2")
    axis.set_xscale("log")
    axis.set_xticks([2, 3, 4, 6, 10, 20], ["2", "3", "4", "6", "10", "20"], minor=False)
    axis.set_xticks([], minor=True)
    legend(figure, entries)
    caption = "Of six units, every mapped form that no other of the same pipeline beats in area and clock period."
    plot = Plot("area", "Area", caption, figure)
    tools = ", ".join(f"{k} {v}" for k, v in results.tools.items())
    return [
        Text(
            f"Library {results.library} at {results.voltage:g} V, typical corner; {tools}. A gate is its NAND of two inputs, "
            f"{results.gate_equivalent:g} um2. Energy of the smallest form, from a trace of a training run, without glitches, "
            "wires and leakage."
        ),
        Grid(head, rows),
        plot,
    ]


def _overheads(results: Results) -> list[Text | Grid | Plot]:
    base = results.densest("int4_fp4")
    rows = []
    for unit in results.units:
        if UNITS[unit].macs or unit == "register":
            continue
        small = min(results.points_of(unit), key=lambda p: p.area)
        numbers = 16 if unit == "hadamard" else 1
        area, energy = small.area / numbers, small.energy / numbers
        rows.append(
            (
                UNITS[unit].title + (", a 16th of it" if numbers > 1 else ""),
                f"{area:,.0f}",
                f"{area / base.area:.2f}",
                f"{area / base.area / 32:.2%}",
                f"{energy / 1000:.2f}",
                f"{energy / base.energy_per_mac:.2f}",
            )
        )
    head = ("per element", "um2", "of an INT4 x FP4 unit", "of a column of 32", "pJ per element", "in MACs")
    return [
        Text(
            "Multiplying by 1.6 and truncating the exponent is one comparison: floor(log4(1.6 x)) is half of "
            "floor(log2 x), one "
            "more where the fraction of x is at least 1/4, which is an OR of two bits. So the conversion needs no "
            "multiplier, and "
            "the second phase is another half of the same exponent, plus one. What there is to pay is adding GradScale's power "
            "to the exponent and saturating."
        ),
        Grid(head, rows),
        Text(
            "One quantizer per column of the array keeps up with it. Each element of a gradient serves hundreds of "
            "multiply-accumulates, so energy per element divides by that."
        ),
    ]


def _paper(results: Results) -> list[Text | Grid | Plot]:
    ours = {
        "fp16": 1.0,
        "fp8": results.density("fp8"),
        "int4_fp8": results.density("int4_fp8"),
        "int4_fp4": results.density("int4_fp4"),
        "int4": results.density("int4_int4"),
    }
    fixed = ours | {"int4_fp4": results.density("int4_fp4_fixed"), "int4": results.density("int4_int4_fixed")}
    rows = []
    for theirs, a, b in zip(figure_6c(), figure_6c(ours), figure_6c(fixed), strict=True):
        for choice, value in theirs.ours.items():
            rows.append(
                (
                    f"{theirs.title}{f' ({choice})' if choice else ''}",
                    f"{theirs.paper:.1f}",
                    f"{value:.2f}",
                    f"{value / theirs.paper - 1:+.1%}",
                    f"{a.ours[choice]:.2f}",
                    f"{b.ours[choice]:.2f}",
                )
            )
    speeds = [
        (name, f"{SPEEDS[name]:.2f}", f"{ours[name]:.2f}", f"{fixed[name]:.2f}")
        for name in ("fp16", "fp8", "int4_fp8", "int4_fp4", "int4")
    ]
    return [
        Text(
            "The paper's Fig. 6c follows from speeds of units alone: the time of a step is the sum over the products of their "
            "share divided by the speed of their unit. Its network has a version and a 'bottom' that the paper does "
            "not settle; "
            "all readings are shown. First and last layers count like all others."
        ),
        Grid(("speed of a unit", "paper", "ours, FP16 sums", "ours, fixed point"), speeds),
        Grid(("forward, backward", "paper", "model", "difference", "ours, FP16 sums", "ours, fixed point"), rows),
    ]


def _limits(results: Results) -> list[Text | Grid | Plot]:
    return [
        Text(
            "Wires and placement: areas are sums of cells, delays have no wire load, and a systolic array adds registers for "
            "operands that are not counted. Glitches: energy counts one change per net and cycle at most, which flatters deep "
            "logic without registers. The densest FP16 unit has many registers instead, whose clock takes most of its energy, "
            "so ratios of energy depend on the clock (above). SRAM macros: energy per bit is from the literature, area is not "
            "counted. A modern node: both libraries are 130 nm; ratios between units move less than areas, but a wire costs "
            "relatively more in a small node. Control, instruction issue, the vector unit that normalizes, and the network "
            "between chips are left out. Multi-cycle accumulation: a unit with registers inside its addition needs as many "
            "independent sums as stages, which an array has whose sums move (ws, is), but not one whose sums stay (os). The "
            "adder per column that adds partial sums in memory is not counted."
        ),
        Text(
            "Formats of other recipes in place of a recipe's own (ibm2020/nvfp4) stand in the tables of cost without a word "
            "about accuracy. NVFP4's scale per tensor and the search for block maxima are not counted."
        ),
    ]
