"""How far each recipe's gradients are from the exact ones, layer by layer, on one batch of real images.

    python benchmarks/gradient_fidelity.py runs/cifar10-resnet20/fp32-seed0 --data-dir data/cifar10

Every recipe gets the weights of that run and the same INT4 forward pass as `ibm2020`; only the format of the gradient
differs. The reference is the same forward pass with unquantized gradients. Printed for the weight gradient of each 4-bit
layer, from the input to the output: the projection <dw_q, dw> / |dw|^2 (1: unbiased, below 1: shrunk) and the cosine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import fourbit as fb
from fourbit import data, models

RECIPES = ("ibm2020", "ibm2020-no-tpr", "ibm2020-radix2", "ibm2020-dw8", "ibm2020-luq")


def exact_gradients(recipe: fb.Recipe) -> fb.Recipe:
    """The recipe with unquantized gradients and results."""
    rules = tuple(
        replace(rule, spec=replace(rule.spec, g_dgrad=None, g_wgrad=None, output=None)) if rule.spec else rule
        for rule in recipe.rules
    )
    return fb.Recipe("exact gradients", rules)


def weight_gradients(recipe: str | fb.Recipe, run: Path, images, x, y) -> dict[str, torch.Tensor]:
    config = json.loads((run / "config.json").read_text())
    model = models.build(
        config["model"], num_classes=images.num_classes, in_channels=images.channels, image_size=images.image_size
    )
    weights = load_file(next((run / "checkpoint").rglob("model.safetensors")))
    model.load_state_dict({k: v for k, v in weights.items() if ".quant." not in k})
    fb.convert(model, recipe)
    F.cross_entropy(model(x), y).backward()  # GradScale takes its exponent from this very gradient
    return {name: layer.weight.grad.double().flatten() for name, layer in fb.quantized_layers(model).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    config = json.loads((arguments.run / "config.json").read_text())
    images = data.load(config["data"], data_dir=arguments.data_dir)
    x, y = next(iter(data.batches(images, "train", 128, seed=1, epoch=0)))
    reference = weight_gradients(exact_gradients(fb.recipes.get("ibm2020")), arguments.run, images, x, y)
    found = {recipe: weight_gradients(recipe, arguments.run, images, x, y) for recipe in RECIPES}
    print("| layer |" + "".join(f" {recipe} |" for recipe in RECIPES) + "\n|---|" + "---|" * len(RECIPES))
    for name, exact in reference.items():
        cells = []
        for recipe in RECIPES:
            dw = found[recipe][name]
            projection, cosine = float(dw @ exact / (exact @ exact)), float(F.cosine_similarity(dw, exact, dim=0))
            cells.append(f" {projection:.2f}, {cosine:.2f} |")
        print(f"| {name} |" + "".join(cells))


if __name__ == "__main__":
    main()
