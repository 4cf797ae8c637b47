"""Estimates the energy of training of the networks that have kept runs, for docs/hardware.md.

    python -m benchmarks.energy

Writes docs/results/hardware/energy.json (joules per image) and pareto.png beside it, from the stored results of synthesis.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks._harness import ROOT
from fourbit.cli._hardware import step_products
from fourbit.hardware import Machine, estimate, in_full_precision, stored
from fourbit.report import Plot, style
from fourbit.reproduce import _hardware_networks

FOLDER = ROOT / "docs" / "results" / "hardware"
BATCH = 128
RECIPES: dict[str, tuple[str, ...]] = {
    "resnet20": (
        "int4-fwd",
        "ibm2020",
        "ibm2020-fp5",
        "ibm2020-stochastic",
        "ibm2020-luq",
        "luq",
        "fourbit",
        "ibm2020-121",
    ),
    "resnet29": ("int4-fwd", "ibm2020", "ibm2020-dw8", "ibm2020-bottom1x1fp8", "ibm2020-3x3fp8", "ibm2020-1x1fp8"),
    "vgg16": ("int4-fwd", "ibm2020", "ibm2020-dw8"),
    "mobilenet_v2": ("int4-fwd", "ibm2020", "ibm2020-dw8", "ibm2020-bottom1x1fp8", "ibm2020-luq"),
}
"""By network; besides, each in full precision, as FP32."""


def joules(model: str, recipes: Sequence[str]) -> dict[str, float]:
    """{recipe: joules of a training step per image}, sums in FP16; `fp32`: the same products in FP16."""
    results, found = stored("sg13g2"), {}
    for recipe in recipes:
        products = step_products(model, recipe, None, None, BATCH)
        found.setdefault("fp32", estimate(in_full_precision(products), Machine(), results).joules / BATCH)
        found[recipe] = estimate(products, Machine(), results).joules / BATCH
    return found


def main() -> None:
    """Write both files."""
    found = {model: joules(model, recipes) for model, recipes in RECIPES.items()}
    content = {"command": "python -m benchmarks.energy", "joules_per_image": found}
    (FOLDER / "energy.json").write_text(json.dumps(content, indent=1) + "\n")
    with style():
        shown = _hardware_networks.accuracy(stored("sg13g2"), step_products, [ROOT / "docs" / "results" / "reproduce"])
        plot = next(block for block in shown if isinstance(block, Plot))
        plot.figure.savefig(FOLDER / "pareto.png", dpi=100)


if __name__ == "__main__":
    main()
