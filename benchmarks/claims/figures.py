"""The paper's figures and arguments, measured on networks that a CPU trains."""

from __future__ import annotations

import re

from benchmarks.claims._claim import Claim, Group, Part, Table, claim, every, seeds
from benchmarks.claims._read import RESULTS, head_of, markdown_rows, trained
from fourbit.reproduce._statistics import paired

WEIGHTS = (
    "In Figures 1b and 2b and in the channel sums the weights are those of ResNet-20 after three epochs in full "
    "precision (`small`), the gradients those of one batch of 128."
)
ONE_NETWORK = (
    "One network after three epochs, one batch. A count over its layers has no scatter of seeds, and says nothing about "
    "other networks."
)
CIFAR = "--data-dir data/cifar10 --threads 1"


@claim(Group.FIGURES)
def least_error() -> Claim:
    rows = [row for row in markdown_rows("figures/fig2b.md", "gradient of") if "normal" not in row[0]]
    biases = [float(row[4]) for row in rows]
    unbiased = [float(row[2]) for row in rows]
    return Claim(
        "The squared error of radix-4 rounding is least at a multiplier of 1.6 in every layer.",
        (
            every(
                "convolutions of ResNet-20 with the least error at 1.60",
                [row[1] == "1.60" for row in rows],
                "convolutions",
            ),
        ),
        "The paper decides between powers of four at 4^n/1.6, because that makes the squared error least (its Fig. 2b, "
        "16 convolutions of ResNet-18).",
        (ONE_NETWORK, "The least error is not the best training: see [multiplier](multiplier.md)."),
        picture=("figures/fig2b.png", "Multiplier against error and bias"),
        tables=(
            Table(
                "All convolutions ([layer by layer](../figures/fig2b.md))",
                ("", "least", "largest"),
                (
                    ("mean magnitude at 1.6, change in %", f"{max(biases):.1f}", f"{min(biases):.1f}"),
                    ("multiplier that keeps the mean magnitude", f"{min(unbiased):.2f}", f"{max(unbiased):.2f}"),
                ),
            ),
        ),
        method=(WEIGHTS, trained("resnet20", ("fp32",), (0,))),
        commands=(f"fourbit reproduce fig2b {CIFAR}",),
    )


@claim(Group.FIGURES)
def range_within_layers() -> Claim:
    rows = markdown_rows("figures/fig1b.md", "layer")
    spans = [high - low for low, high in (map(float, row[2].split(" to ")) for row in rows)]
    between = re.search(r"medians differ by 2\^([\d.]+)", (RESULTS / "figures/fig1b.md").read_text())
    assert between is not None
    return Claim(
        "The gradients of one layer span more than radix 4 can represent.",
        (
            every(
                "layers of ResNet-20 in which 98 % of the gradients span more than 2^12",
                [s > 12 for s in spans],
                "layers",
            ),
        ),
        "Three bits of exponent reach over 2^6 in radix 2 and over 2^12 in radix 4. The paper shows the range of the "
        "gradients of ResNet-18 (its Fig. 1b).",
        (ONE_NETWORK,),
        picture=("figures/fig1b.png", "The range of the output gradients of each layer"),
        tables=(
            Table(
                "log2 of a range ([layer by layer](../figures/fig1b.md))",
                ("", "least", "largest"),
                (
                    ("within a layer, 1 to 99 %, third epoch", f"{min(spans):.1f}", f"{max(spans):.1f}"),
                    ("between the medians of the layers", between[1], between[1]),
                ),
            ),
        ),
        why=("Most of the spread is inside the layers, where no scale per layer can help.",),
        method=(WEIGHTS, trained("resnet20", ("fp32",), (0,))),
        commands=(
            "fourbit reproduce fig1a",
            f"fourbit reproduce fig1b {CIFAR}",
            f"fourbit reproduce fig3 {CIFAR} --seeds 1",
        ),
    )


@claim(Group.FIGURES)
def batch_means() -> Claim:
    rows = {row[0]: [float(x) for x in row[1].split(", ")] for row in markdown_rows("figures/fig4.md", "recipe")}

    def part(a: str, b: str, least: float | None = None) -> Part:
        found = paired([x - y for x, y in zip(rows[a], rows[b], strict=True)])
        assert found is not None
        return seeds(f"largest batch mean of `{a}` - `{b}`", found, "", least)

    return Claim(
        "With one phase the means before batch normalization run away, and with two they do not.",
        (part("ibm2020-no-tpr", "ibm2020", 0.0),),
        "That is the paper's reason for two phases: at the end of training ResNet-18's means are near 0 in FP32 and "
        "with two phases, and reach thousands with one (its Figs. 4 and 5a).",
        ("Two seeds, three epochs. The paper trained for 100.",),
        beside=(
            part("ibm2020-no-tpr", "fp32"),
            part("ibm2020", "fp32"),
            part("ibm2020-no-tpr-zerosum", "ibm2020-no-tpr"),
            part("ibm2020-zerosum", "ibm2020"),
        ),
        tables=(
            Table(
                "ResNet-20 after three epochs, seeds 1 and 2 ([layer by layer](../figures/fig4.md))",
                ("recipe", "largest batch mean, by seed", "mean drift of the layers, by seed"),
                tuple((f"`{row[0]}`", *row[1:]) for row in markdown_rows("figures/fig4.md", "recipe")),
            ),
        ),
        why=(
            "Rounding breaks the [zero sums](channel-sums.md) of the gradient behind batch normalization. In both seeds "
            "the means stay small with one phase as well once the sums are restored (`ibm2020-no-tpr-zerosum`). "
            "[Accuracy does not follow](channel-sums-restored.md) the means. The drift of the running means is alike in "
            "all formats.",
            "![Batch means before batch normalization](../figures/fig4.png)",
        ),
        method=(
            trained(
                "resnet20", ("fp32", "ibm2020-no-tpr", "ibm2020-no-tpr-zerosum", "ibm2020", "ibm2020-zerosum"), (1, 2)
            ),
        ),
        commands=(f"fourbit reproduce fig4 {CIFAR} --seeds 1,2",),
    )


@claim(Group.FIGURES)
def sharp_minima() -> Claim:
    rows = [row for row in markdown_rows("figures/fig5.md", "recipe") if row[1] == "interpolated"]
    bump = {row[0]: float(row[4]) - max(float(row[2]), float(row[3])) for row in rows}
    found = paired([bump["ibm2020-no-tpr"] - bump["ibm2020"]])
    assert found is not None
    return Claim(
        "Without a second phase the loss rises between two checkpoints.",
        (seeds("rise of the loss between checkpoints, one phase less two phases", found, "of loss", least=0.0),),
        "The paper draws the loss on the line between two checkpoints (its Fig. 5b, c). With one phase it goes from 1.2 "
        "at both ends to above 20 between them; with two it is flat.",
        ("Two checkpoints of one seed, epochs 2 and 3. The paper's are of epochs after 80.",),
        picture=("figures/fig5.png", "The test loss on the line between two checkpoints"),
        tables=(
            Table(
                "Test loss ([table](../figures/fig5.md))",
                ("recipe", "statistics", "at epoch 3", "at epoch 2", "largest between"),
                tuple((f"`{row[0]}`", *row[1:]) for row in markdown_rows("figures/fig5.md", "recipe")),
            ),
        ),
        why=(
            "'Interpolated' takes the running statistics between those of both ends; 'recomputed' measures them anew at "
            "each point.",
        ),
        method=(trained("resnet20", ("fp32", "ibm2020-no-tpr", "ibm2020"), (1,)),),
        commands=(f"fourbit reproduce fig5 {CIFAR} --seeds 1",),
    )


@claim(Group.FIGURES)
def variance_by_depth() -> Claim:
    rows = {row[0]: row[1:] for row in markdown_rows("figures/fig6.md", "recipe")}
    theirs = {"ibm2020": 53.0, "ibm2020-bottom1x1fp8": 15.0, "ibm2020-top1x1fp8": 16.0, "ibm2020-1x1fp8": 4.2}
    ours = {r: float(rows[r][0]) for r in theirs}
    order = sorted(ours, key=lambda r: -ours[r])
    halves = {order[1], order[2]} == {"ibm2020-bottom1x1fp8", "ibm2020-top1x1fp8"}
    steps = [order[0] == "ibm2020", halves, order[3] == "ibm2020-1x1fp8"]
    return Claim(
        "FP8 in the 1x1 convolutions restores the variance of the gradient at the first layer, in the order that the "
        "paper shows.",
        (
            every(
                "places of the order: least with none, then the bottom and the top half, most with all", steps, "places"
            ),
        ),
        "The paper's Fig. 6a shows the variance of the gradient by depth. In its ResNet-50 it is 53 times too small at "
        "the first layer with its recipe, 15 and 16 with FP8 in the bottom and top 1x1 convolutions, and 4.2 in all of "
        "them (read off the figure).",
        (
            "ResNet-29 after three epochs in full precision, one batch.",
            "The bottom and the top half are nearly alike in the paper, and are not told apart.",
        ),
        picture=("figures/fig6.png", "Variance of the gradients by depth"),
        tables=(
            Table(
                "ResNet-29 ([table](../figures/fig6.md))",
                (
                    "recipe",
                    "variance at the first layer too small by",
                    "projection of dW",
                    "cosine of dW",
                    "the paper's ResNet-50",
                ),
                tuple((f"`{r}`", *cells, f"{theirs[r]:g}" if r in theirs else "-") for r, cells in rows.items()),
            ),
        ),
        why=(
            "FP8 in the 3x3 convolutions is worth about as much as in the bottom ones here. What keeps the magnitudes "
            "in four bits makes the variance too large instead of too small.",
        ),
        method=(trained("resnet29", ("fp32",), (0,)),),
        commands=(f"fourbit reproduce fig6 {CIFAR}",),
    )


@claim(Group.FIGURES)
def channel_sums() -> Claim:
    names = head_of("figures/sums.md", "layer")[1:]
    rows = [[float(x) for x in row[1:]] for row in markdown_rows("figures/sums.md", "layer") if row[0] != "mean"]
    mean = next(row for row in markdown_rows("figures/sums.md", "layer") if row[0] == "mean")
    at = [i for i, name in enumerate(names) if name.startswith("fp4") or name in ("r4 stochastic", "LUQ")]
    flags = [row[i] > 1000 * row[0] for row in rows for i in at]
    return Claim(
        "Every 4-bit format breaks the zero sums of the gradient behind batch normalization.",
        (
            every(
                "cases (layer and 4-bit format) in which the sum is over a thousand times the exact one", flags, "cases"
            ),
        ),
        "Behind batch normalization the exact gradient of each channel sums to zero, but for the rounding of float32. "
        "Sums are given in percent of the gradient's magnitude.",
        (ONE_NETWORK,),
        picture=("figures/sums.png", "Channel sums of the gradient by layer and format"),
        tables=(
            Table(
                "Mean over the convolutions of ResNet-20, % ([layer by layer](../figures/sums.md))",
                ("format", "sum"),
                tuple((name, mean[i + 1]) for i, name in enumerate(names)),
            ),
        ),
        why=(
            "Radix 2, which loses the small numbers, leaves the largest sums, and FP8 the smallest. The multiplier "
            "makes no difference: what 1.85 gains in training is not gained here.",
        ),
        method=(WEIGHTS, trained("resnet20", ("fp32",), (0,))),
        commands=(f"fourbit reproduce sums {CIFAR}",),
    )


@claim(Group.FIGURES)
def share_of_fp16() -> Claim:
    rows = [
        row
        for row in markdown_rows("figures/macs.md", "network")
        if row[1] == "ibm2020" and row[0].startswith("mobilenet")
    ]
    resnet = [
        row for row in markdown_rows("figures/macs.md", "network") if row[0].startswith(("resnet50", "mobilenet"))
    ]
    return Claim(
        "In MobileNetV2 the layers that stay in FP16 are less than 3 % of the work.",
        (
            every(
                "versions (small and large pictures) in which FP16 takes less than 3 % of the multiply-accumulates",
                [float(row[4]) < 3 for row in rows],
                "versions",
            ),
        ),
        "The paper keeps depthwise, first and last layers in FP16, and says that the depthwise ones are less than 3 % "
        "of the multiply-accumulates.",
        (
            "A count of multiply-accumulates, exact. Time and energy are other questions ([hardware](../../hardware.md)).",
            "3.06 % is the share of depthwise layers in the first MobileNet (Howard et al., 2017, Table 2).",
        ),
        picture=("figures/macs.png", "Shares of the work in 4, 8 and 16 bits"),
        tables=(
            Table(
                "Shares of multiply-accumulates ([all networks](../figures/macs.md))",
                ("network", "recipe", "4 x 4, %", "8 x 4, %", "16 x 16, %", "depthwise, %"),
                tuple((row[0], f"`{row[1]}`", *row[2:]) for row in resnet),
            ),
        ),
        commands=("fourbit reproduce macs",),
    )
