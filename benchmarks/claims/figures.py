"""The paper's figures and arguments, measured on networks that a CPU trains."""

from __future__ import annotations

import re

from benchmarks.claims._claim import Claim, Group, Lines, Part, Table, claim, every, seeds
from benchmarks.claims._read import RESULTS, fidelity, head_of, markdown_rows, trained
from fourbit.reproduce._statistics import paired

NETWORKS = {
    "ResNet-20": "cifar10-resnet20/fidelity.md",
    "VGG16": "reproduce/table1-vgg16-small/fidelity.md",
    "MobileNetV2": "reproduce/table1-mobilenet_v2-small/fidelity.md",
    "Transformer": "reproduce/table3-wmt-small/fidelity.md",
}
WEIGHTS = (
    "In Figures 1b and 2b and in the channel sums the weights are those of ResNet-20 after three epochs in full "
    "precision (`small`), the gradients those of one batch of 128."
)
ONE_NETWORK = (
    "One network after three epochs, one batch. A count over its layers has no scatter of seeds, and says nothing about "
    "other networks."
)
CIFAR = "--data-dir data/cifar10 --threads 1"
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


def _error(text: str) -> float:
    return float(text)


@claim(Group.FIGURES)
def swamping() -> Claim:
    rows = [[_error(x) for x in row] for row in markdown_rows("accumulation/table.md", "K")]
    long = [row for row in rows if 4096 <= row[0] <= 65536]
    return Claim(
        "Summing in chunks of 64 keeps an FP16 sum exact to 1 % up to 2^16 terms, where one chain loses half.",
        (
            every(
                "lengths from 2^12 to 2^16 at which chunks are within 1 %", [row[2] < 0.01 for row in long], "lengths"
            ),
            every(
                "lengths from 2^12 to 2^16 at which one chain loses half", [row[1] >= 0.5 for row in long], "lengths"
            ),
        ),
        "The paper adds in FP16 1-6-9 (9 bits of mantissa), in chunks of 64. Each addition is rounded. A sum of "
        "positive numbers stands still once its terms are below half the gap of its grid: that is swamping.",
        (
            "Positive terms around 1 are the worst case. Terms of a dot product of random vectors cancel, and do not "
            "stand still up to 2^18.",
        ),
        picture=("accumulation/swamping.png", "Error of sums in FP16 1-6-9 against the number of terms"),
        tables=(
            Table(
                "Relative error of sums of positive numbers ([more](../accumulation/table.md))",
                ("terms", "one chain", "chunks of 64", "one chain, stochastic", "chunks, stochastic"),
                tuple(tuple(cells) for cells in markdown_rows("accumulation/table.md", "K")),
            ),
        ),
        why=(
            "Numbers around 1 add up to about 1024 and no further. Chunks keep the error near one rounding (2^-10), and "
            "at 2^18 terms the sums of the chunks swamp among themselves. Stochastic rounding never stands still, "
            "because its errors cancel on average, but each is larger.",
        ),
        commands=("python benchmarks/swamping.py",),
    )


@claim(Group.FIGURES)
def rounded_sums() -> Claim:
    import math

    from fourbit._statistics import T_975

    rows = {row[0]: row for row in markdown_rows("accumulation/digits.md", "recipe")}
    n = int(rows["fp32"][3])

    def part(recipe: str, least: float | None = None) -> Part:
        mean, std = float(rows[recipe][4]), float(rows[recipe][5])
        half = T_975[n - 2] * std / math.sqrt(n)
        return Part(
            f"`{recipe}` - FP32, digits, 8 epochs",
            mean,
            mean - half,
            mean + half,
            "points",
            f"{n} seeds, 95 %",
            least,
        )

    return Claim(
        "With sums rounded to FP16 after every addition, the paper's recipe is less than one point behind FP32 on digits.",
        (part("ibm2020-acc", -1.0),),
        "`ibm2020-acc` rounds after every addition, in chunks of 64; `ibm2020-acc-nochunk` without chunks; `ibm2020` "
        "adds in float32.",
        (
            "The longest sums of this network, those of wgrad, have 8192 terms of both signs, most of them zero. A "
            "network with longer sums may differ.",
            "Three seeds; the runs are not kept, their means and standard deviations are.",
        ),
        beside=(part("ibm2020"), part("ibm2020-acc-nochunk")),
        tables=(
            Table(
                "Digits, 8 epochs",
                ("recipe", "test accuracy %", "std", "seeds", "to FP32", "std", "training loss"),
                tuple((f"`{r}`", *row[1:7]) for r, row in rows.items()),
            ),
        ),
        why=(
            "An epoch with rounded sums takes several times as long: half of it in the kernel, the rest in writing "
            "convolutions out as products of matrices ([speed of the kernel](../accumulation/table.md)).",
        ),
        commands=(
            "fourbit compare --model digits_cnn --data digits --epochs 8 --seeds 0,1,2 --threads 1 \\\n"
            "        --recipes fp32,ibm2020,ibm2020-acc,ibm2020-acc-nochunk --out runs/accumulation",
        ),
    )
