"""What the arithmetic is worth as circuits: from the results of synthesis that the package holds."""

from __future__ import annotations

import json

from benchmarks.claims._claim import Claim, Group, Part, Table, claim
from benchmarks.claims._read import RESULTS, reproduced
from fourbit.errors import UserError
from fourbit.hardware import Results, stored
from fourbit.reproduce import rows_of

PAPER = 7.3
PERIODS = (3000.0, 4000.0, 6000.0, None)
HEAD = ("", "3 ns", "4 ns", "6 ns", "each at its best")
DENSITY = (
    "Density is multiply-accumulates per second and area, against an FP16 1-6-9 multiply-add in the same library at the "
    "same clock. The paper says that a four-way INT4 x FP4 unit has 7.3 times (0.55 of the area at four times the "
    "throughput)."
)
LIMITS = (
    "Mapping is a search: small changes move an area or a delay by several percent, and a point on a clock target can "
    "jump by ten. Differences below that say nothing.",
    "Two libraries of 130 nm, without wires, placement and control. [More](../../hardware.md).",
)
METHOD = (
    "Circuits in Amaranth HDL, simulated against exact rational arithmetic, synthesised by yosys and ABC with IHP "
    "SG13G2 and SKY130. [How](../../hardware.md#what-is-compared).",
)
COMMANDS = ("fourbit hardware units", "fourbit hardware report --out hardware.html --runs docs/results/reproduce")


def _densities(results: Results, unit: str, shared: int = 32) -> list[float | None]:
    found: list[float | None] = []
    for period in PERIODS:
        try:
            found.append(results.density(unit, period, shared=shared))
        except UserError:
            found.append(None)
    return found


def _part(what: str, values: list[float | None]) -> Part:
    known = [v for v in values if v is not None]
    middle = sorted(known)[len(known) // 2]
    return Part(
        what, middle, min(known), max(known), "times FP16", f"{len(known)} clocks, least to largest", least=PAPER
    )


def _row(title: str, values: list[float | None]) -> tuple[str, ...]:
    return (title, *("-" if v is None else f"{v:.1f}" for v in values))


def _table(results: Results, *units: tuple[str, str]) -> Table:
    return Table(results.library, HEAD, tuple(_row(title, _densities(results, unit)) for title, unit in units))


UNITS = (
    ("INT4 x FP4 radix 4, 4 ways, FP16 sums", "int4_fp4"),
    ("the same, 8 ways", "int4_fp4_8"),
    ("the same with a 26-bit register, a converter for 32 units", "int4_fp4_fixed"),
    ("INT4 x FP4 radix 2, FP16 sums", "int4_fp4r2"),
    ("INT4 x INT4, FP16 sums", "int4_int4"),
    ("FP8 1-4-3 x 1-5-2, 2 ways", "fp8"),
)


@claim(Group.HARDWARE)
def seven_times() -> Claim:
    results = stored("sg13g2")
    return Claim(
        "A four-way INT4 x FP4 unit with FP16 sums has more than 7.3 times the density of an FP16 unit.",
        (_part("density of four ways with FP16 sums, SG13G2", _densities(results, "int4_fp4")),),
        DENSITY,
        LIMITS,
        picture=("hardware/density.png", "Density of units against the clock period"),
        tables=(_table(results, *UNITS), _table(stored("sky130"), *UNITS)),
        why=(
            "What is left after the multiplier has gone is an adder over the range of the products and of the sum, a "
            "normaliser and a rounder. Radix 4 needs a wide one: seven powers of four times an integer are 16 bits. The "
            "density that the paper names is that of eight ways, or of radix 2.",
        ),
        method=METHOD,
        commands=COMMANDS,
    )


@claim(Group.HARDWARE)
def fixed_point_register() -> Claim:
    results = stored("sg13g2")
    return Claim(
        "With the exact sum in a register, the same unit has more than 7.3 times the density of an FP16 unit.",
        (_part("density of four ways with a 26-bit register, SG13G2", _densities(results, "int4_fp4_fixed")),),
        DENSITY
        + (
            " Nothing forces a rounding to FP16 every cycle: here products are added into two's complement, wide enough "
            "for 256 cycles of the largest, and a converter that 32 units share makes FP16 of the sum."
        ),
        LIMITS,
        picture=("hardware/density.png", "Density of units against the clock period"),
        tables=(
            _table(
                results,
                *UNITS[:1],
                UNITS[2],
                ("INT4 x FP4 radix 2, 20-bit register", "int4_fp4r2_fixed"),
                ("INT4 x INT4, 17-bit register", "int4_int4_fixed"),
            ),
        ),
        why=(
            "The choice of the accumulator is worth more than that of the format. FP8 cannot have such a register: its "
            "products span too wide a range.",
        ),
        method=METHOD,
        commands=COMMANDS,
    )


@claim(Group.HARDWARE)
def conversion_cost() -> Claim:
    results = stored("sg13g2")
    base = results.densest("int4_fp4").area
    rows, shares = [], {}
    for unit, title in (
        ("quantize_fp4", "GradScale, x1.6, radix-4 FP4, both phases"),
        ("quantize_fp4_even", "one phase"),
    ):
        small = min(results.points_of(unit), key=lambda p: p.area)
        shares[unit] = small.area / base / 32 * 100
        rows.append((title, f"{small.area:,.0f}", f"{small.area / base * 100:.1f}", f"{shares[unit]:.2f}"))
    share = shares["quantize_fp4"]
    return Claim(
        "Conversion to radix 4, both phases and GradScale take less than one percent of an array's area.",
        (
            Part(
                "area of both phases with GradScale, one per column of 32 units",
                share,
                share,
                share,
                "%",
                "smallest form, SG13G2",
                most=1.0,
            ),
        ),
        "LUQ's authors say that the conversion of radix needs a multiplication. The paper counts 1.6 % of the "
        "operations for conversion and scaling.",
        LIMITS,
        picture=("hardware/area.png", "Area and clock period of every form"),
        tables=(
            Table(
                "Per element and cycle",
                ("circuit", "um2", "% of one four-way unit", "% of a column of 32"),
                tuple(rows),
            ),
        ),
        why=(
            "floor(log4(1.6 x)) is half of floor(log2 x), one more where the fraction of x is at least 1/4, which is an "
            "OR of its two highest bits. GradScale is an addition to the exponent. [All "
            "quantizers](../../hardware.md#what-conversion-two-phases-and-gradscale-cost).",
        ),
        method=METHOD,
        commands=COMMANDS,
    )


NETWORKS = {
    "resnet20": ("ResNet-20, 3 epochs", ("questions", "luq"), ("questions", "phases"), ("questions", "radix")),
    "resnet29": ("ResNet-29, 3 epochs", ("questions", "fp8")),
    "vgg16": ("VGG16, 3 epochs", ("table1", "vgg16")),
    "mobilenet_v2": ("MobileNetV2, 2 epochs", ("table1", "mobilenet_v2")),
}
"""Title of a network whose energy is kept, and the rows that have its accuracies."""
IMAGES = 50_000
"""Of CIFAR-10, in an epoch."""


def energy_table() -> Table:
    """Energy of training and accuracy of each recipe that has both."""
    joules = json.loads((RESULTS / "hardware" / "energy.json").read_text())["joules_per_sample"]
    rows = []
    for model, (title, *sources) in NETWORKS.items():
        tables = [reproduced(table, name, "") for table, name in sources]
        for recipe, per_sample in joules[model].items():
            column = next((runs.columns[recipe] for runs in tables if recipe in runs.columns), None)
            if column is not None and column.mean is not None:
                energy = f"{per_sample * IMAGES * column.epochs:,.0f}"
                rows.append((title, f"`{recipe}`", energy, f"{column.mean:.1f}", str(len(column.values))))
    return Table("", ("network", "recipe", "J", "accuracy %", "seeds"), tuple(rows), words=2)


@claim(Group.HARDWARE)
def accuracy_and_energy() -> Claim:
    joules = json.loads((RESULTS / "hardware" / "energy.json").read_text())["joules_per_sample"]["resnet20"]
    runs = reproduced("questions", "luq", "ResNet-20 on CIFAR-10, 3 epochs, row `luq`")
    ratio = joules["ibm2020-luq"] / joules["ibm2020"]
    return Claim(
        "On ResNet-20, LUQ's gradients are ahead of the paper's in accuracy and in energy.",
        (
            runs.part("ibm2020-luq", "ibm2020", least=0.0),
            Part(
                "energy of training with LUQ's gradients over that with the paper's",
                ratio,
                ratio,
                ratio,
                "times",
                "estimate",
                most=1.0,
            ),
        ),
        "LUQ's gradients are radix 2, which needs a narrower adder than radix 4. `ibm2020-luq` has them with the "
        "paper's forward pass.",
        (
            "Energy is an estimate of an array with memory ([networks](../../hardware.md#networks)). Differences of a "
            "few percent say nothing.",
            "Three epochs of one network. Energy at equal accuracy is another question.",
        ),
        runs=((runs, ("fp32", "ibm2020", "ibm2020-luq", "luq", "fourbit")),),
        tables=(energy_table(),),
        picture=("hardware/pareto.png", "Accuracy against energy"),
        why=("In a trace of a training most gradients are zero in the range of radix 2, and a zero switches nothing.",),
        method=METHOD,
        commands=("python -m benchmarks.energy",),
    )


@claim(Group.HARDWARE)
def blocks_and_energy() -> Claim:
    joules = json.loads((RESULTS / "hardware" / "energy.json").read_text())["joules_per_sample"]["gpt"]
    runs = reproduced("debates", "families", "Small language model, row `families`")
    ratio = joules["mxfp4-ceil-sr-g"] / joules["ibm2020"]
    settings = rows_of("debates")["families"].scales["small"]
    samples = settings["max_steps"] * settings["batch_size"]
    rows = [
        (f"`{recipe}`", f"{joules[recipe] * samples:.1f}", f"{column.mean:.2f}", str(len(column.values)))
        for recipe, column in runs.columns.items()
        if recipe in joules and column.mean is not None
    ]
    return Claim(
        "MXFP4's block scales make a small language model better, for less than ten percent more energy.",
        (
            runs.part("mxfp4-ceil-sr-g", "ibm2020", most=0.0),
            Part(
                "energy of training with MXFP4 over that with the paper's recipe",
                ratio,
                ratio,
                ratio,
                "times",
                "estimate",
                most=1.1,
            ),
        ),
        "A block scale has to be found, kept, and added to the exponent of each product of blocks. The model of an array "
        "with memory counts all three, and rotations too.",
        (
            "Energy is an estimate of an array with memory ([networks](../../hardware.md#networks)). Differences of a "
            "few percent say nothing.",
            "A model of 1.1 million parameters, 400 steps. Energy at equal perplexity is another question.",
        ),
        runs=((runs, tuple(runs.columns)),),
        tables=(Table("Energy of the 400 steps", ("recipe", "J", "perplexity", "seeds"), tuple(rows)),),
        why=(
            "The last layer, which all these recipes leave in a wide format, is a large share of so small a model's "
            "energy.",
        ),
        method=METHOD,
        commands=("python -m benchmarks.energy",),
    )
