"""What the paper leaves open, and its reviewers asked."""

from __future__ import annotations

from scipy.special import stdtrit

from benchmarks.claims._claim import Claim, Group, Part, Table, claim, seeds
from benchmarks.claims._read import Runs, change, digits, half_resnet_lars, markdown_rows, reproduced, trained
from fourbit.reproduce._statistics import ERROR, paired

SHORT = (
    "Three epochs with one learning rate for all recipes. What a full schedule shows may differ ([the gap "
    "closes](gap-closes.md))."
)
SIZES = "ResNet-20 on CIFAR-10, and six layers on digits. Larger networks were not trained."
EPOCHS = "ResNet-20, 3 epochs"
EIGHT = "digits, 8 epochs"


def better(
    title: str, row: str, recipe: str, other: str, asked: str, why: tuple[str, ...], shown: tuple[str, ...] = ()
) -> Claim:
    """One recipe is better than another on ResNet-20; the same on digits stands beside."""
    runs, small = reproduced("questions", row, f"ResNet-20 on CIFAR-10, 3 epochs, row `{row}`"), digits(8)
    recipes = tuple(dict.fromkeys(("fp32", other, recipe, *shown)))
    return Claim(
        title,
        (runs.part(recipe, other, least=0.0, where=EPOCHS),),
        asked,
        (SHORT, SIZES),
        beside=(
            *((small.part(recipe, other, where=EIGHT),) if recipe in small.columns else ()),
            *_against_fp32(runs, recipe, other),
        ),
        runs=(
            (runs, recipes),
            *(((small, tuple(r for r in recipes if r in small.columns)),) if recipe in small.columns else ()),
        ),
        why=why,
    )


def _against_fp32(runs: Runs, *recipes: str) -> tuple[Part, ...]:
    return tuple(runs.part(recipe, where=EPOCHS) for recipe in recipes)


@claim(Group.QUESTIONS)
def two_phases() -> Claim:
    return better(
        "Two phases train better than one.",
        "phases",
        "ibm2020",
        "ibm2020-no-tpr",
        "The paper rounds each gradient twice, on the even powers of two for dgrad and on the odd ones for wgrad ([two phases]"
        "(../../concepts/phases.md)). `ibm2020-no-tpr` uses the even grid for both.",
        (
            "The paper's own reason, that two phases keep the means before batch normalization from running away, is "
            "looked at in [batch means](batch-means.md).",
        ),
        ("ibm2020-swapped",),
    )


@claim(Group.QUESTIONS)
def phase_order() -> Claim:
    return better(
        "It matters which phase goes to which product: even for dgrad is better than odd.",
        "phases",
        "ibm2020",
        "ibm2020-swapped",
        "The paper takes the even grid for dgrad and the odd one for wgrad. `ibm2020-swapped` has them the other way round.",
        (),
    )


@claim(Group.QUESTIONS)
def a_fifth_bit() -> Claim:
    return better(
        "A fifth bit trains better than two phases of four bits.",
        "phases",
        "ibm2020-fp5",
        "ibm2020",
        "The two grids together are one grid of five bits. So two phases might be taken for a fifth bit that costs "
        "nothing. `ibm2020-fp5` has that grid in both products.",
        ("A five-bit unit is larger: [hardware](../../hardware.md#the-answer) has its density.",),
    )


@claim(Group.QUESTIONS)
def stochastic_rounding() -> Claim:
    return better(
        "With the same four bits, stochastic rounding trains better than two phases.",
        "phases",
        "ibm2020-stochastic",
        "ibm2020",
        "Stochastic rounding goes up or down at random, so that the mean is right. `ibm2020-stochastic` keeps the "
        "radix-4 grid and rounds so.",
        (
            "It keeps the length of the gradient, which rounding to nearest [shrinks](gradients-shrink.md). The price "
            "is random bits.",
        ),
    )


@claim(Group.QUESTIONS)
def luq_gradients() -> Claim:
    return better(
        "At equal bits, LUQ's gradients train better than the paper's.",
        "luq",
        "ibm2020-luq",
        "ibm2020",
        "LUQ (Chmiel et al.) rounds gradients to powers of two, at random below the smallest and between the others. "
        "`ibm2020-luq` has them with the paper's forward pass, so that all else is equal; `luq` has LUQ's forward pass "
        "too.",
        ("LUQ's rounding has no bias: it [keeps the length](unbiased-gradients.md) of the gradient at every depth.",),
        ("luq",),
    )


@claim(Group.QUESTIONS)
def luq_forward() -> Claim:
    return better(
        "The paper's forward pass trains better than LUQ's.",
        "luq",
        "ibm2020-luq",
        "luq",
        "Both recipes have LUQ's gradients. `ibm2020-luq` has trained clip values (PACT) for activations; `luq` scales "
        "them by SAWB.",
        ("The likely reason: signed SAWB wastes half of its levels after ReLU.",),
    )


@claim(Group.QUESTIONS)
def fourbit_recipe() -> Claim:
    return better(
        "At equal bits, the gradients of the recipe `fourbit` train better than the paper's.",
        "luq",
        "fourbit",
        "ibm2020",
        "`fourbit` is this project's own recipe: radix-2 FP4 gradients, random only where they underflow, else to the "
        "nearest number without bias.",
        ("Its gradients have the best directions of the 4-bit formats ([unbiased gradients](unbiased-gradients.md)).",),
        ("ibm2020-luq",),
    )


@claim(Group.QUESTIONS)
def fourbit_or_luq() -> Claim:
    return better(
        "The gradients of the recipe `fourbit` train better than LUQ's.",
        "luq",
        "fourbit",
        "ibm2020-luq",
        "Both have four bits and the same forward pass. `fourbit` draws random bits only where a gradient underflows, "
        "LUQ for every element.",
        (
            "Better directions at one point of training ([unbiased gradients](unbiased-gradients.md)) have not been "
            "shown to pay.",
        ),
    )


@claim(Group.QUESTIONS)
def correction() -> Claim:
    return better(
        "Correcting the magnitude behind each GEMM trains better than the paper's rounding alone.",
        "luq",
        "ibm2020-corrected",
        "ibm2020",
        "`ibm2020-corrected` multiplies the results of both backward GEMMs by what the rounding has shrunk. The grids "
        "stay those of the paper.",
        (
            "The correction takes out [the shrinking of the gradient](gradients-shrink.md) and hardly changes its direction.",
        ),
    )


@claim(Group.QUESTIONS)
def multiplier() -> Claim:
    rates = {
        lr: reproduced("questions", "multiplier", f"ResNet-20, learning rate {lr:g}", lr) for lr in (0.05, 0.1, 0.2)
    }
    small = digits(8)
    rows = tuple(
        (f"`{recipe}`", *(f"{runs.columns[recipe].values[0]:.2f}" for runs in rates.values()))
        for recipe in ("fp32", "ibm2020", "ibm2020-m185", "ibm2020-corrected")
    )
    return Claim(
        "The multiplier without bias (1.85) trains better than the one with the least error (1.6).",
        (rates[0.1].part("ibm2020-m185", "ibm2020", least=0.0, where="ResNet-20, 3 epochs, learning rate 0.1"),),
        "The paper's rounding decides at 4^n/1.6, which makes [the squared error least](least-error.md). `ibm2020-m185` "
        "decides at 4^n/1.85, which keeps the mean magnitude. It costs nothing in hardware.",
        (
            SHORT,
            SIZES,
            "At the learning rates 0.05 and 0.2 there is one seed. The best rate of each recipe was chosen on the test "
            "data, for all alike.",
        ),
        beside=(
            small.part("ibm2020-m185", "ibm2020", where=EIGHT),
            rates[0.1].part("ibm2020-m185", "ibm2020-corrected", where=EPOCHS),
            small.part("ibm2020-m185", "ibm2020-corrected", where=EIGHT),
        ),
        runs=(
            (rates[0.1], ("fp32", "ibm2020", "ibm2020-m185", "ibm2020-corrected")),
            (small, ("fp32", "ibm2020", "ibm2020-m185", "ibm2020-corrected")),
        ),
        tables=(Table("Test accuracy %, seed 0, by learning rate", ("recipe", *(f"{lr:g}" for lr in rates)), rows),),
        why=("With 1.85 the gradients [keep their length](gradients-shrink.md). Their directions hardly change.",),
    )


@claim(Group.QUESTIONS)
def channel_sums_restored() -> Claim:
    return better(
        "Restoring the channel sums of the gradient trains better.",
        "zerosum",
        "ibm2020-zerosum",
        "ibm2020",
        "Behind batch normalization the exact gradient sums to zero in each channel, and [rounding breaks "
        "that](channel-sums.md). `ibm2020-zerosum` restores the sums. That takes more than 4 bits: it is an experiment.",
        ("It keeps [the batch means](batch-means.md) small, but accuracy does not follow them.",),
    )


@claim(Group.QUESTIONS)
def fp8_in_1x1() -> Claim:
    runs = reproduced("questions", "fp8", "ResNet-29 (bottleneck blocks) on CIFAR-10, 3 epochs")
    shown = (
        "fp32",
        "int4-fwd",
        "ibm2020",
        "ibm2020-dw8",
        "ibm2020-bottom1x1fp8",
        "ibm2020-top1x1fp8",
        "ibm2020-3x3fp8",
        "ibm2020-1x1fp8",
    )
    return Claim(
        "FP8 gradients in the 1x1 convolutions train better than in the 3x3 ones.",
        (runs.part("ibm2020-1x1fp8", "ibm2020-3x3fp8", least=0.0),),
        "The paper answers the loss of deep bottleneck networks with FP8 gradients in their 1x1 convolutions: all, or "
        "the 'bottom' ones, which reduce channels. It does not try the 3x3 ones.",
        (SHORT, "ResNet-29 stands for ResNet-50."),
        beside=(
            digits(8).part("ibm2020-1x1fp8", "ibm2020-3x3fp8", where=EIGHT),
            digits(8).part("ibm2020-1x1fp8", "ibm2020", where=EIGHT),
            digits(8).part("ibm2020-dw8", "ibm2020", where=EIGHT),
        ),
        runs=((runs, shown), (digits(8), ("fp32", "ibm2020", "ibm2020-1x1fp8", "ibm2020-3x3fp8", "ibm2020-dw8"))),
        why=(
            "[Fig. 6a](variance-by-depth.md) shows what each choice leaves of the gradient's variance at the first layer.",
        ),
        method=(
            "With 200 steps of warm-up. At a learning rate of 0.1 from the first step on, the noise of four bits grows "
            "through 29 layers, the first steps drive the loss up, and three epochs do not make up for it. The formats "
            "are not at fault: a trained FP32 network loses nothing under the INT4 forward pass, and both begin with "
            "the same loss. (The runs that showed this are not kept.)",
        ),
    )


@claim(Group.QUESTIONS)
def bias_of_classes() -> Claim:
    path = "figures/bias.md"
    parts = []
    for row in markdown_rows(path, "class"):
        by_seed = [float(x) for x in row[3].split(", ")]
        found = paired(by_seed)
        assert found is not None
        parts.append(seeds(f"`ibm2020` - FP32, class {row[0]}", found, "points"))
    totals = markdown_rows(path, "recipe")
    scatter = {row[0]: float(row[4]) for row in totals}
    rows = tuple((f"`{row[0]}`", *row[1:]) for row in totals)
    mean = {row[0]: float(row[1]) for row in totals}
    gap = mean["ibm2020"] - mean["fp32"]
    worst = min(parts, key=lambda part: part.value)
    assert worst.paired is not None and worst.paired.error is not None
    n = worst.paired.n
    half = float(stdtrit(n - 1, 1 - ERROR / 2 / len(parts))) * worst.paired.error  # it was picked among all classes
    decisive = Part(
        worst.what + ", the one that loses most",
        worst.value,
        worst.value - half,
        worst.value + half,
        "points",
        f"{n} seeds, 95 % for the worst of {len(parts)} classes",
        most=round(gap, 1),
    )
    return Claim(
        "4-bit training costs some classes more than the others.",
        (decisive,),
        "A reviewer's question: does training in 4 bits bias the model? The class that loses most must lose more than "
        "the mean of all classes, which is "
        f"{gap:.1f} points.",
        (
            "Two seeds. The interval counts that the worst of ten classes was picked afterwards (Bonferroni).",
            "Three epochs of one network.",
        ),
        beside=tuple(part for part in parts if part is not worst),
        tables=(
            Table(
                f"All classes, seeds 1 and 2 ([table](../{path}))",
                (
                    "recipe",
                    "accuracy %",
                    "calibration error %",
                    "negative log likelihood",
                    "scatter over classes, points",
                ),
                rows,
            ),
        ),
        why=(
            f"Beside their mean, the classes of `ibm2020` scatter by {scatter['ibm2020']:.2f} points about those of "
            f"FP32 (root mean square). Two runs of FP32 that differ in their seed scatter by {scatter['fp32']:.2f}.",
            "![Accuracy by class](../figures/bias.png)",
        ),
        method=(trained("resnet20", ("fp32", "int4-fwd", "ibm2020", "ibm2020-luq"), (1, 2)),),
        commands=("fourbit reproduce bias --data-dir data/cifar10 --threads 1 --seeds 1,2",),
    )


@claim(Group.QUESTIONS)
def length_of_gradients() -> Claim:
    plain, lars = digits(8), digits(8, "lars", 0.01)
    resnet, resnet_lars = (
        reproduced("questions", "length", "Half a ResNet-20, pictures of 16x16, 3 epochs", scale="converged", epochs=3),
        half_resnet_lars(),
    )
    shown = ("fp32", "int4-fwd", "ibm2020", "ibm2020-corrected", "ibm2020-luq", "fourbit")
    small = ("fp32", "ibm2020", "ibm2020-luq")
    return Claim(
        "Under LARS, the paper's recipe loses less in a short training than under SGD.",
        tuple(
            seeds(
                f"gap of `ibm2020` under LARS less that under SGD, {where}",
                change(new, old, "ibm2020"),
                "points",
                least=0.0,
            )
            for where, new, old in (
                ("digits, 8 epochs", lars, plain),
                ("half a ResNet-20, 3 epochs", resnet_lars, resnet),
            )
        ),
        "Radix-4 rounding [shrinks gradients](gradients-shrink.md), by different factors in different layers. LARS gives each "
        "layer a step that is a share of its own length, whatever the length of its gradient. So what is left of a gap under "
        "LARS is in the directions of the gradients, or in the forward pass.",
        (
            "Two small networks, and one learning rate for each optimizer: SGD's is the default, LARS's the best of 0.0025, "
            "0.005, 0.01, 0.02 and 0.04 for FP32 on digits with four seeds, chosen on the test data.",
            "FP32 gains from LARS as well, on ResNet-20 more than the recipe does.",
        ),
        beside=(
            *(lars.part(recipe, where="digits, LARS") for recipe in shown[1:]),
            *(plain.part(recipe, where="digits, SGD") for recipe in shown[1:]),
            *(resnet_lars.part(recipe, where="ResNet-20, LARS") for recipe in small[1:]),
            *(resnet.part(recipe, where="ResNet-20, SGD") for recipe in small[1:]),
        ),
        runs=((lars, shown), (plain, shown), (resnet_lars, small), (resnet, small)),
        why=(
            "On digits most of the gap goes with the length of the gradients, and the recipe under LARS is where FP32 is under "
            "SGD. On ResNet-20 the accuracy of the recipe rises under LARS too, but FP32's rises more: there is more to the "
            "gap than the length.",
        ),
    )


@claim(Group.QUESTIONS)
def gap_from_3_to_10_epochs() -> Claim:
    early, late = (
        reproduced(
            "questions", "length", f"Half a ResNet-20, pictures of 16x16, {n} epochs", scale="converged", epochs=n
        )
        for n in (3, 10)
    )
    shown = ("fp32", "ibm2020", "ibm2020-luq", "fourbit")
    return Claim(
        "From 3 to 10 epochs the gap of the paper's recipe to FP32 becomes smaller, on half a ResNet-20.",
        (
            seeds(
                "gap of `ibm2020` after 10 epochs less that after 3",
                change(late, early, "ibm2020"),
                "points",
                least=0.0,
            ),
        ),
        "The paper trains for 160 epochs and reports gaps of a point. How long must a training be before its gaps are those? "
        "Each length has its whole schedule of learning rates. The same seeds are compared.",
        (
            "Lengths of 30, 80 and 160 epochs are there (`--scale converged`) and were not run to the end with several seeds.",
            "Half the channels, pictures at half the resolution, three seeds.",
        ),
        beside=(
            *(late.part(recipe, where="10 epochs") for recipe in shown[1:]),
            *(early.part(recipe, where="3 epochs") for recipe in shown[1:]),
            late.part("fourbit", "ibm2020", where="10 epochs"),
            late.part("ibm2020-luq", "ibm2020", where="10 epochs"),
        ),
        runs=((late, shown), (early, shown)),
        why=(
            "At 10 epochs `fourbit`, which has the same bits, is a point behind FP32 and the paper's recipe four. So "
            "it is not the four bits that are short of epochs, but radix 4.",
        ),
    )
