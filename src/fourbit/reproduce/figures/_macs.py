"""How much of the work is done in which precision: the share of the FP8 layers, network by network."""

from __future__ import annotations

from dataclasses import replace

from fourbit import models, recipes
from fourbit.recipes import Explanation, Recipe, explain
from fourbit.report import panels, style
from fourbit.reproduce.figures._base import Studio, register, table

NETWORKS = {
    "vgg16": 32,
    "resnet18": 32,
    "resnet50": 32,
    "densenet121": 32,
    "mobilenet_v2": 32,
    "resnet18_imagenet": 224,
    "resnet50_imagenet": 224,
    "mobilenet_v2_imagenet": 224,
}
"""Image size of each."""

RECIPES = ("ibm2020", "ibm2020-dw8", "ibm2020-bottom1x1fp8", "ibm2020-1x1fp8", "ibm2020-3x3fp8")
KINDS = ("4 x 4", "8 x 4", "16 x 16")
DEPTHWISE = "depthwise"
"""The rule of the recipes that keeps those layers in 16 bits."""


@register(
    "macs",
    "speed-ups of ResNet-50 with FP8 in all and in the bottom 1x1 convolutions, 4.0 and 5.2, are all it says of "
    "their share",
)
def macs(studio: Studio) -> str:
    """The share of multiply-accumulates in 4, 8 and 16 bits, for each choice of FP8 layers.

    A question of the paper's reviewers, which the paper answers by the speed-up of ResNet-50 only (4.0 and 5.2, its Fig.
    6c). All three GEMMs of a training step; the first layer has no dgrad. "8 x 4": INT4 by FP8 gradients. "16 x 16": first,
    last and depthwise layers, the depthwise ones also by themselves.
    """
    shares: dict[tuple[str, str], dict[str, float]] = {}
    names = [n for n in NETWORKS if studio.scale != "smoke" or NETWORKS[n] == 32]
    for name in names:
        size = NETWORKS[name]
        model = models.build(name, num_classes=10 if size == 32 else 1000)
        for recipe in RECIPES:
            rules = tuple(replace(rule, optional=True) for rule in recipes.get(recipe).rules)  # not all have 1x1 layers
            explanation = explain(model, Recipe(recipe, rules), (1, 3, size, size))
            found = explanation.shares()
            shares[name, recipe] = {kind: 100 * found.get(kind, 0.0) for kind in KINDS}
            shares[name, recipe][DEPTHWISE] = 100 * _depthwise(explanation)
    with style():
        figure, axes = panels(
            len(names), "Share of multiply-accumulates with 8-bit gradients, %", columns=4, height=2.2
        )
        for axis, name in zip(axes, names, strict=True):
            values = [shares[name, r]["8 x 4"] for r in RECIPES]
            axis.barh(range(len(RECIPES)), values, color="#0072B2")
            axis.set_yticks(range(len(RECIPES)), [r.removeprefix("ibm2020").lstrip("-") or "ibm2020" for r in RECIPES])
            axis.set_xlim(0, 100)
            axis.set_title(f"{name.removesuffix('_imagenet')}, {NETWORKS[name]} pixels", loc="left", fontsize=8)
        axes[0].invert_yaxis()  # all share it
    rows = [
        (name, f"`{recipe}`", *(f"{found[kind]:.1f}" for kind in (*KINDS, DEPTHWISE)))
        for (name, recipe), found in shares.items()
    ]
    return "\n\n".join(
        (studio.picture(figure, "macs"), table(("network", "recipe", *(f"{k}, %" for k in (*KINDS, DEPTHWISE))), rows))
    )


def _depthwise(explanation: Explanation) -> float:
    """Share of the depthwise layers."""
    macs = [sum(layer.num_macs.values()) for layer in explanation.layers if layer.num_macs and layer.rule == DEPTHWISE]
    return sum(macs) / explanation.num_macs
