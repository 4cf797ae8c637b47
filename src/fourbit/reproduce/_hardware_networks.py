"""The page of `fourbit hardware report`, the part about networks: what a training step costs, accuracy, sensitivity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fourbit.errors import UserError
from fourbit.hardware import LIBRARIES, Machine, Results, estimate, in_full_precision, separate_arrays, stored, unit_of
from fourbit.report import PALETTE, REFERENCE_COLOR, Grid, Plot, Text, legend, panels

if TYPE_CHECKING:
    from fourbit.hardware import Product, StepCost
    from fourbit.report import FinalResult

Products = Callable[..., "list[Product]"]
NETWORKS = {
    "resnet50_imagenet": ("ResNet-50, 224 pixels", 32),
    "mobilenet_v2_imagenet": ("MobileNetV2, 224 pixels", 32),
    "vgg16": ("VGG16, 32 pixels", 128),
    "transformer_base": ("Transformer-base, 20 tokens", 128),
    "lstm_650": ("LSTM 2 x 650, 35 tokens", 20),
}
"""Title and batch of each."""
EXTERNAL = {"hf:bert": ("BERT-base, 128 tokens", 4, "128"), "hf:gpt2": ("GPT-2 small, 128 tokens", 4, "128")}
"""Those that need transformers."""
RECIPES = (
    "ibm2020",
    "ibm2020-dw8",
    "ibm2020-bottom1x1fp8",
    "ibm2020-1x1fp8",
    "luq",
    "ibm2020/hfp8",
    "ibm2020/mxfp4",
    "ibm2020/nvfp4",
)
Networks = dict[str, tuple[str, int, "dict[str, list[Product]]"]]


def networks_of(products: Products) -> Networks:
    """Products of each network by recipe, of those that it has layers for."""
    found: Networks = {}
    entries = {name: (*value, None) for name, value in NETWORKS.items()} | EXTERNAL
    for name, (title, batch, shape) in entries.items():
        by_recipe = {}
        for recipe in RECIPES:
            try:
                classes = None if not name.endswith("_imagenet") else 1000
                by_recipe[recipe] = products(name, recipe, shape, classes, batch)
            except UserError:
                continue
        if by_recipe:
            found[name] = (title, batch, by_recipe)
    return found


def costs(results: Results, networks: Networks) -> list[Text | Grid | Plot]:
    """Time and energy of a step of each network by recipe, times better than FP16 on the same machine."""
    blocks: list[Text | Grid | Plot] = [
        Text(
            "A training step on systolic arrays (weights stay, 32 rows, the area of 32 x 32 FP16 units for every kind "
            "of unit in "
            "turn), 1 MB of memory on the chip, and one bit per cycle and FP16 unit from memory; the optimizer (SGD with "
            "momentum) is included. First, last and "
            "depthwise layers "
            "run in FP16. 'arithmetic alone': without waiting for memory. 'own silicon': the same if every kind of unit has a "
            "share of the "
            "area of its own, and the others wait. FP8: share of the multiply-accumulates."
        )
    ]
    for title, batch, by_recipe in networks.values():
        rows = []
        base = estimate(in_full_precision(next(iter(by_recipe.values()))), Machine(), results)
        alone = sum(p.compute for p in base.parts)
        for recipe, products in by_recipe.items():
            cells = [recipe, f"{_eight(products):.0%}"]
            for accumulator in ("fp16", "fixed"):
                cost = estimate(products, Machine(accumulator=accumulator), results)
                compute = sum(p.compute for p in cost.parts)
                cells += [
                    f"{alone / compute:.2f}",
                    f"{alone / compute / separate_arrays(_by_unit(cost).values()):.2f}",
                    f"{base.seconds / cost.seconds:.2f}",
                    f"{base.joules / cost.joules:.2f}",
                ]
            rows.append(tuple(cells))
        head = ("recipe", "FP8", *("arithmetic alone", "own silicon", "time", "energy") * 2)
        blocks += [
            Text(f"{title}, batch of {batch}: FP16 sums (left) and fixed point (right), times faster than FP16"),
            Grid(head, rows),
        ]
    return blocks


def _eight(products: Sequence[Product]) -> float:
    eight = sum(p.macs for p in products if unit_of(p, "fp16") in ("int4_fp8", "uint4_fp8", "fp8"))
    return eight / sum(p.macs for p in products)


def _by_unit(cost: StepCost) -> dict[str, float]:
    """Time of the products by unit; those for signed and for unsigned activations count as one."""
    found: dict[str, float] = {}
    for p in cost.parts:
        if p.unit:
            unit = p.unit.removeprefix("u")
            found[unit] = found.get(unit, 0.0) + p.compute
    return found


def accuracy(results: Results, products: Products, runs: Sequence[Path]) -> list[Text | Grid | Plot]:
    """Test accuracy of runs against the energy of their training."""
    from fourbit.report import final_results

    if not runs:
        return [Text("No training runs were named: give folders of runs with --runs.")]
    rows, points = [], []
    for (model, images, recipe), (mean, seeds) in _means(final_results(runs)).items():
        try:
            step = products(model, recipe, None, None, 128)
            costs = [estimate(step, Machine(accumulator=a), results).joules for a in ("fp16", "fixed")]
        except UserError:
            continue
        base = estimate(in_full_precision(step), Machine(), results).joules
        joules = [c / 128 * images for c in costs]
        points.append((f"{model}, {images / 1e6:.2f} M images", recipe, joules, mean))
        rows.append(
            (
                f"{model}, {images / 1e6:.2f} M images",
                recipe,
                str(seeds),
                f"{mean:.2f}",
                *(f"{j:.0f}" for j in joules),
                *(f"{mean / j:.3f}" for j in joules),
                *(f"{base / c:.2f}" for c in costs),
            )
        )
    if not rows:
        return [Text("None of the runs that were named reports an accuracy of a network whose cost can be estimated.")]
    head = ("network", "recipe", "seeds", "accuracy %", "J", "J, fixed", "% per J", "fixed", "FP16 / this", "fixed")
    return [
        Text(
            "Accuracy at the end of the runs, and the energy that their training would take on the machine above: forward and "
            "backward passes of all images and the optimizer, without evaluation; sums in FP16, or in fixed point ('fixed'). "
            "Full precision counts as FP16. Recipes that differ in rounding only cost nearly the same. Most have one seed. "
            "Left out: runs without an accuracy of images, of recipes that no unit is for, and of learning rates that few runs "
            "have."
        ),
        Grid(head, rows, words=2),
        _pareto(points),
    ]


def _means(results: Sequence[FinalResult]) -> dict[tuple[str, int, str], tuple[float, int]]:
    """Mean and seeds by network, length and recipe, of the learning rate that most runs of that network have."""
    from fourbit.models import kind_of

    found = [r for r in results if r.metric == "accuracy %" and r.images and kind_of(r.model) == "image"]
    found = [r for r in found if len({o.recipe for o in found if (o.model, o.images) == (r.model, r.images)}) > 1]
    rates = {}
    for key in {(r.model, r.images) for r in found}:
        rates[key] = Counter(r.lr for r in found if (r.model, r.images) == key).most_common(1)[0][0]
    groups: dict[tuple[str, int, str], list[FinalResult]] = {}
    for r in sorted(found, key=lambda r: (r.model, r.images or 0, r.recipe)):
        if r.lr == rates[r.model, r.images]:
            groups.setdefault((r.model, r.images or 0, r.recipe), []).append(r)
    return {
        key: (sum(r.mean * r.seeds for r in rs) / sum(r.seeds for r in rs), sum(r.seeds for r in rs))
        for key, rs in groups.items()
    }


def _pareto(points: Sequence[tuple[str, str, Sequence[float], float]]) -> Plot:
    networks = list(dict.fromkeys(network for network, *_ in points))
    figure, axes = panels(len(networks), "Accuracy against the energy of training", columns=3, height=3.8, sharey=False)
    recipes = sorted({recipe for _, recipe, *_ in points})
    entries = {}
    for axis, network in zip(axes, networks, strict=True):
        mine = [(recipe, joules, mean) for name, recipe, joules, mean in points if name == network]
        for recipe, joules, mean in mine:
            number = recipes.index(recipe)
            color = REFERENCE_COLOR if recipe == "fp32" else PALETTE[number % len(PALETTE)]
            marker = "osD^v"[number // len(PALETTE)]
            entries[recipe] = axis.scatter([joules[0]], [mean], color=color, marker=marker, s=30)
            axis.scatter([joules[1]], [mean], facecolors="none", edgecolors=color, marker=marker, s=30)
        front: list[tuple[float, float]] = []
        for joules, mean in sorted((j, mean) for _, both, mean in mine for j in both):
            if not front or mean > front[-1][1]:
                front.append((joules, mean))
        axis.plot(*zip(*front, strict=True), color="#aaaaaa", linewidth=1, zorder=0, drawstyle="steps-post")
        axis.set_title(network, loc="left")
        axis.set_xlabel("energy of training, J")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("test accuracy, %")
    legend(figure, entries)
    caption = "Filled: sums in FP16; open: in fixed point. The line joins what no other run beats in both."
    return Plot("pareto", "Accuracy and energy", caption, figure)


def sensitivity(results: Results, networks: Networks) -> list[Text | Grid | Plot]:
    """The same of the first network, with one assumption changed at a time."""
    name = next(iter(networks))
    title, _, by_recipe = networks[name]
    products = by_recipe["ibm2020"]
    fp16 = in_full_precision(products)
    others = [other for other in (stored(library) for library in LIBRARIES) if other.library != results.library]
    choices: list[tuple[str, list[tuple[str, Machine, Results]]]] = [
        ("library", [(r.library, Machine(), r) for r in (results, *others)]),
        ("sums", [("FP16", Machine(), results), ("fixed point", Machine(accumulator="fixed"), results)]),
        (
            "clock",
            [(f"{p / 1000:g} ns", Machine(period=p), results) for p in (3000.0, 4000.0, 6000.0, 8000.0, 20000.0)],
        ),
        ("dataflow", [(d, Machine(dataflow=d), results) for d in ("os", "ws", "is")]),
        ("array", [(f"{n} x {n}", Machine(rows=n, columns=n), results) for n in (16, 32, 128)]),
        ("filling of the array", [("with", Machine(), results), ("hidden", Machine(overlapped=True), results)]),
        ("bits from memory", [(f"{b:g}", Machine(bandwidth=b), results) for b in (0.25, 1.0, 4.0, 1000.0)]),
        ("memory on the chip", [(f"{k} KB", Machine(sram_kb=k), results) for k in (128, 1024, 8192)]),
        (
            "energy of on-chip memory",
            [(f"{f:g} times", Machine(sram_bit=f * Machine.sram_bit), results) for f in (0.1, 1.0, 3.0)],
        ),
        (
            "energy of DRAM",
            [(f"{f:g} times", Machine(dram_bit=f * Machine.dram_bit), results) for f in (0.3, 1.0, 5.0)],
        ),
        (
            "optimizer, bits per weight",
            [(f"{b:g}", Machine(optimizer_bits=b), results) for b in (0.0, Machine.optimizer_bits, 208.0)],
        ),
    ]
    rows = []
    for what, entries in choices:
        for label, machine, library in entries:
            try:
                base, cost = (estimate(p, machine, library) for p in (fp16, products))
            except UserError:
                continue  # a unit that misses the clock
            compute = sum(p.compute for p in base.parts) / sum(p.compute for p in cost.parts)
            times = f"{compute:.2f}", f"{base.seconds / cost.seconds:.2f}", f"{base.joules / cost.joules:.2f}"
            rows.append((what, label, *times))
    return [
        Text(f"{title}, recipe ibm2020, times better than FP16 on the same machine; one choice changed at a time."),
        Grid(("choice", "", "arithmetic alone", "time", "energy"), rows, words=2),
    ]
