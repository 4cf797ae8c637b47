"""Estimates the energy of training of the networks that have kept runs, for docs/hardware.md.

    python -m benchmarks.energy

Writes docs/results/hardware/energy.json (joules per sample: an image, or a window of text) and pareto.png beside it, from
the stored results of synthesis.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks._harness import ROOT
from fourbit.cli._hardware import step_products
from fourbit.hardware import Machine, estimate, in_full_precision, stored
from fourbit.report import Plot, style
from fourbit.reproduce import _hardware_networks, rows_of

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
    "gpt": (
        "int4-fwd",
        "ibm2020",
        "ibm2020-luq",
        "luq",
        "fourbit",
        "mxfp4-ceil-sr-g",
        "mxfp4-rht-sr",
        "nvfp4-fqt",
        "nvfp4",
        "quartet",
    ),
}
"""By network; besides, each in full precision, as FP32."""
GPT = rows_of("debates")["families"].scales["small"]
"""How the language model of the debates is trained."""


def joules(network: str, recipes: Sequence[str]) -> dict[str, float]:
    """{recipe: joules of a training step per sample}, sums in FP16; `fp32`: the same products in FP16."""
    results, found = stored("sg13g2"), {}
    model, classes, batch = network, None, BATCH
    if network == "gpt":
        model, classes, batch = GPT["model"], int(GPT["tokenizer"].removeprefix("bpe:")), GPT["batch_size"]
    for recipe in recipes:
        products = step_products(model, recipe, None, classes, batch)
        found.setdefault("fp32", estimate(in_full_precision(products), Machine(), results).joules / batch)
        found[recipe] = estimate(products, Machine(), results).joules / batch
    return found


def main() -> None:
    """Write both files."""
    found = {model: joules(model, recipes) for model, recipes in RECIPES.items()}
    content = {"command": "python -m benchmarks.energy", "joules_per_sample": found}
    (FOLDER / "energy.json").write_text(json.dumps(content, indent=1) + "\n")
    with style():
        shown = _hardware_networks.accuracy(stored("sg13g2"), step_products, [ROOT / "docs" / "results" / "reproduce"])
        plot = next(block for block in shown if isinstance(block, Plot))
        plot.figure.savefig(FOLDER / "pareto.png", dpi=100)


if __name__ == "__main__":
    main()
