"""What rounding leaves of the gradients of weights, layer by layer: tables of `fourbit fidelity`."""

from __future__ import annotations

from benchmarks.claims._claim import Claim, Group, Lines, Table, claim, every
from benchmarks.claims._read import fidelity, trained

NETWORKS = {
    "ResNet-20": "cifar10-resnet20/fidelity.md",
    "VGG16": "reproduce/table1-vgg16-small/fidelity.md",
    "MobileNetV2": "reproduce/table1-mobilenet_v2-small/fidelity.md",
    "Transformer": "reproduce/table3-wmt-small/fidelity.md",
}
PROJECTION = (
    "The projection <dw_q, dw>/|dw|^2 of the weight gradient on the exact one is 1 if rounding neither shrinks nor "
    "stretches it. Every recipe is compared with its own INT4 forward pass and exact gradients, so that only the format "
    "of the gradient differs."
)


def _spread(name: str, recipe: str) -> tuple[str, ...]:
    values = fidelity(NETWORKS[name]).get(recipe, {}).values()
    if not values:
        return "-", "-"
    projections, cosines = zip(*values, strict=True)
    return f"{min(projections):.2f} to {max(projections):.2f}", f"{min(cosines):.2f} to {max(cosines):.2f}"


def _fidelity_tables(recipes: tuple[str, ...]) -> tuple[Table, ...]:
    return tuple(
        Table(
            f"{name}, all layers but the last ([layer by layer](../{path}))",
            ("recipe", "projection", "cosine"),
            tuple((f"`{r}`", *_spread(name, r)) for r in recipes if r in fidelity(path)),
        )
        for name, path in NETWORKS.items()
    )


def _fidelity_lines(recipes: tuple[str, ...], title: str) -> Lines:
    found = fidelity(NETWORKS["ResNet-20"])
    layers = tuple(next(iter(found.values())))
    return Lines(title, layers, {r: tuple(found[r][x][0] for x in layers) for r in recipes}, "projection")


FIDELITY = (
    "fourbit fidelity runs/reproduce/networks-small/resnet20/fp32-seed0 --data-dir data/cifar10 \\\n"
    "        --recipes ibm2020,ibm2020-no-tpr,ibm2020-radix2,ibm2020-dw8,ibm2020-m185,ibm2020-corrected,ibm2020-luq,fourbit",
)


@claim(Group.FIGURES)
def gradients_shrink() -> Claim:
    recipes = ("ibm2020", "ibm2020-no-tpr", "ibm2020-dw8", "ibm2020-m185", "ibm2020-corrected")
    flags = [p < 1 for path in NETWORKS.values() for p, _ in fidelity(path)["ibm2020"].values()]
    return Claim(
        "The paper's rounding shrinks the weight gradient in every layer but the last.",
        (every("layers of four networks whose projection is below 1", flags, "layers"),),
        "The paper shows a variance of the gradients that decays toward the input (its Fig. 6a), and answers with FP8 "
        "in the 1x1 convolutions. " + PROJECTION,
        (
            "One point of training of each network, one batch.",
            "That the shrinking costs accuracy is another claim: see [correction](correction.md).",
        ),
        tables=_fidelity_tables(recipes),
        picture=_fidelity_lines(
            ("ibm2020", "ibm2020-no-tpr", "ibm2020-dw8", "ibm2020-m185", "ibm2020-corrected"),
            "ResNet-20: what is left of the weight gradient, from the input to the output",
        ),
        why=(
            "Rounding to the nearest power of four makes a gradient smaller on average, more so where much underflows, "
            "and the losses multiply on the way to the input. The direction stays good. A multiplier of 1.85 in place "
            "of 1.6, or one correction behind each product, takes the shrinking away and hardly changes the direction. "
            "FP8 in wgrad changes little near the input: what arrives there has passed the FP4 of the layers behind.",
            "That our products are right was checked apart: `tests/ops/test_contract.py` compares all three with "
            "float64, operand by operand.",
        ),
        method=(trained("resnet20", ("fp32",), (0,)),),
        commands=FIDELITY,
    )


@claim(Group.FIGURES)
def unbiased_gradients() -> Claim:
    recipes = ("ibm2020-luq", "fourbit", "ibm2020-radix2", "ibm2020")
    found = fidelity(NETWORKS["ResNet-20"])
    tables = [fidelity(path) for path in NETWORKS.values()]
    better = [
        table["fourbit"][layer][1] >= cosine for table in tables for layer, (_, cosine) in table["ibm2020-luq"].items()
    ]
    flags = [abs(p - 1) <= 0.101 for p, _ in found["ibm2020-luq"].values()]
    return Claim(
        "LUQ's gradients keep the length of ResNet-20's weight gradients within a tenth at every depth.",
        (every("layers of ResNet-20 with a projection of 0.9 to 1.1", flags, "layers"),),
        "Rounding at random can have the right mean. " + PROJECTION,
        ("One point of training, one batch.", "MobileNetV2 is deeper, and its projections go further from 1 (above)."),
        tables=_fidelity_tables(recipes),
        picture=_fidelity_lines(
            recipes, "ResNet-20: what is left of the weight gradient, from the input to the output"
        ),
        why=(
            "LUQ rounds at random everywhere. `fourbit` does so only where a gradient underflows, and to the nearest "
            f"number elsewhere: its cosine is at least LUQ's in {sum(better)} of {len(better)} layers of these networks.",
            "Radix 2 to nearest shrinks less per layer than radix 4. But its range of 2^6 loses small gradients, and the "
            "direction suffers.",
        ),
        method=(trained("resnet20", ("fp32",), (0,)),),
        commands=FIDELITY,
    )
