"""Where later papers contradict one another: one small language model, one thing changed at a time."""

from __future__ import annotations

from statistics import fmean

from benchmarks.claims._claim import Claim, Group, Table, claim
from benchmarks.claims._read import reproduced
from fourbit.reproduce import rows_of

SCALE = (
    "A small language model early in training (1.1 million parameters besides the embedding, 400 steps of 512 tokens). "
    "Nothing follows for 10^9 parameters."
)
METHOD = (
    "`gpt` on Shakespeare in 512 pieces of words, the same order of sequences for all. AdamW at a learning rate of "
    "0.002, if no other is named: the best of 0.0015, 0.002, 0.003 and 0.004 for FP32 with seed 0. Perplexity of the test "
    "text: lower is better, and a positive difference is a loss.",
)


def _debate(
    row: str,
    title: str,
    parts: tuple[tuple[str, str, float | None, float | None], ...],
    asked: str,
    why: tuple[str, ...] = (),
    lr: float | None = None,
    tables: tuple[Table, ...] = (),
) -> Claim:
    """A claim about a row of `fourbit reproduce debates`.

    Args:
        parts: (recipe, other, least, most): that the difference of their perplexities lies above and below. What else the row
            compares stands beside.
        lr: of the row `rates`, which has several.
        tables: shown as well.
    """
    runs = reproduced("debates", row, f"Small language model, row `{row}`", lr)
    decide = tuple(runs.part(a, b, least, most) for a, b, least, most in parts)
    compared = [(recipe, "fp32") for recipe in runs.columns if recipe != "fp32"]
    compared += [pair for pair in rows_of("debates")[row].pairs if set(pair) <= set(runs.columns)]
    beside = tuple(runs.part(a, b) for a, b in compared if (a, b) not in [part[:2] for part in parts])
    shown = tuple(runs.columns)
    return Claim(
        title, decide, asked, (SCALE,), beside=beside, runs=((runs, shown),), why=why, method=METHOD, tables=tables
    )


@claim(Group.DEBATES)
def radix_4_or_blocks() -> Claim:
    return _debate(
        "families",
        "Radix-4 FP4 with one scale per tensor costs a language model more than MXFP4's block scales.",
        (("ibm2020", "mxfp4-ceil-sr-g", 0.0, None),),
        "The paper of 2020 gives a whole tensor one scale. MXFP4 gives each 32 numbers one, NVFP4 each 16. "
        "`mxfp4-ceil-sr-g` has MXFP4 in all six operands, with stochastic gradients. A number takes 4 bits in the "
        "first, 4.25 with MXFP4's scales, and 4.5 with NVFP4's.",
        (
            "`int4-fwd` has a backward pass in FP32 and is behind FP32 as well. So one scale for a whole tensor of "
            "activations is what this network minds, more than the grid of its gradients.",
        ),
    )


@claim(Group.DEBATES)
def nvfp4_or_mxfp4() -> Claim:
    return _debate(
        "families",
        "NVFP4 trains a language model better than MXFP4.",
        (("nvfp4-fqt", "mxfp4-ceil-sr-g", None, 0.0),),
        "NVFP4 has smaller blocks and finer scales. `nvfp4-fqt` has it in all products, `mxfp4-ceil-sr-g` has MXFP4; "
        "both round gradients at random.",
    )


@claim(Group.DEBATES)
def which_product() -> Claim:
    return _debate(
        "gemms",
        "The forward product costs more than either backward product, when it alone is in 4 bits.",
        (("mxfp4-ceil-fprop", "mxfp4-ceil-dgrad", 0.0, None), ("mxfp4-ceil-fprop", "mxfp4-ceil-wgrad", 0.0, None)),
        "NVIDIA (arXiv 2509.25149) blames the forward pass, Chmiel et al. (2505.19115) the backward pass, AMD "
        "(2605.09825) wgrad. Each recipe has MXFP4, rounded to nearest, in one product alone.",
        ("The scatter of seeds is larger for one product alone than for all three together. Three seeds are too few.",),
    )


@claim(Group.DEBATES)
def rotations() -> Claim:
    return _debate(
        "rotations",
        "Rotating the operands with random signs trains a language model better than no rotation.",
        (("mxfp4-ceil-rht", "mxfp4-ceil", None, 0.0),),
        "A Hadamard rotation spreads large numbers over their block. Tseng et al. (2502.20586) rotate with random "
        "signs, NVIDIA with fixed ones, AMD not at all. `mxfp4-ceil-rht` rotates both operands of all products, with "
        "fresh signs at every step.",
    )


@claim(Group.DEBATES)
def random_gradients() -> Claim:
    return _debate(
        "rounding",
        "Rounding gradients at random trains a language model better than rounding them to nearest.",
        (("mxfp4-ceil-sr-g", "mxfp4-ceil", None, 0.0),),
        "Tseng et al. (2502.20586), NVIDIA (2509.25149) and Chmiel et al. (2505.19115) round gradients at random, so "
        "that the rounding has no bias. AMD (2605.09825) rounds everything to nearest. Here all six operands are MXFP4.",
    )


@claim(Group.DEBATES)
def random_forward() -> Claim:
    return _debate(
        "rounding",
        "Rounding the operands of the forward pass at random costs a language model.",
        (("mxfp4-ceil-sr-fprop", "mxfp4-ceil", 0.0, None),),
        "No published recipe rounds the forward pass at random. `mxfp4-ceil-sr-fprop` does, `mxfp4-ceil` rounds it to "
        "nearest. A random rounding has no bias, and twice the variance or more.",
    )


@claim(Group.DEBATES)
def smaller_blocks() -> Claim:
    return _debate(
        "blocks",
        "With scales that are powers of two, smaller blocks train a language model better.",
        (
            ("e2m1-block16-e8m0", "mxfp4-ceil-sr-g", None, 0.0),
            ("mxfp4-ceil-sr-g", "e2m1-block64-e8m0", None, 0.0),
        ),
        "Chmiel et al. (2505.19115) settle on blocks of 16. MXFP4 (`mxfp4-ceil-sr-g`) has blocks of 32. The scales are "
        "E8M0, the gradients are rounded at random.",
    )


@claim(Group.DEBATES)
def finer_scales() -> Claim:
    return _debate(
        "blocks",
        "Block scales in E4M3 train a language model better than powers of two, in blocks of any size.",
        (
            ("ufp4-e2m1-plain", "e2m1-block16-e8m0", None, 0.0),
            ("e2m1-block32-e4m3", "mxfp4-ceil-sr-g", None, 0.0),
            ("e2m1-block64-e4m3", "e2m1-block64-e8m0", None, 0.0),
        ),
        "E4M3 has three bits of mantissa and a float32 scale for the tensor behind it, E8M0 is a power of two. Blocks "
        "are 16 (`ufp4-e2m1-plain`, `e2m1-block16-e8m0`), 32 and 64 numbers.",
    )


@claim(Group.DEBATES)
def scales_that_truncate_nothing() -> Claim:
    return _debate(
        "blocks",
        "Power-of-two scales rounded up train a language model better than rounded down.",
        (("mxfp4-ceil", "mxfp4", None, 0.0),),
        "OCP's rule (`mxfp4`) rounds the scale down: the largest numbers of a block may be clipped. TetraJet "
        "(`mxfp4-ceil`) rounds it up: none is clipped, and the grid is coarser for some blocks.",
    )


@claim(Group.DEBATES)
def forward_at_the_end() -> Claim:
    return _debate(
        "end",
        "For the last fifth of the steps, the forward pass gains more from high precision than the backward pass.",
        (("nvfp4-fqt-forward-end", "nvfp4-fqt-backward-end", None, 0.0),),
        "NVIDIA (2509.25149) takes the forward pass to BF16 for the last 18 % of the steps and finds that the backward "
        "pass alone gains nothing. Chmiel et al. (2505.19115) keep the forward pass in FP4 and take the backward pass to BF16.",
    )


@claim(Group.DEBATES)
def high_at_the_end() -> Claim:
    return _debate(
        "end",
        "High precision for the last fifth of the steps trains a language model better than NVFP4 to the end.",
        (
            ("nvfp4-fqt-forward-end", "nvfp4-fqt", None, 0.0),
            ("nvfp4-fqt-backward-end", "nvfp4-fqt", None, 0.0),
        ),
        "Both NVIDIA and Chmiel et al. report that the loss falls once one side is in BF16. Here every variant has the "
        "same steps; 400 of them may be too few for rounding to be what limits the loss.",
    )


@claim(Group.DEBATES)
def uniform_grid() -> Claim:
    return _debate(
        "grid",
        "A uniform grid trains a language model better than E2M1, rotated or not.",
        (("ufp4", "ufp4-e2m1", None, 0.0), ("ufp4-plain", "ufp4-e2m1-plain", None, 0.0)),
        "UFP4 says that numbers behind a rotation are spread so evenly that a uniform grid of 4 bits fits them better "
        "than E2M1's. NVIDIA's and OCP's formats have E2M1. Blocks are 16 numbers with E4M3 scales.",
    )


@claim(Group.DEBATES)
def rotation_for_the_uniform_grid() -> Claim:
    return _debate(
        "grid",
        "A uniform grid needs a rotation.",
        (("ufp4", "ufp4-plain", None, 0.0),),
        "UFP4 rotates all operands. `ufp4-plain` is the same without rotations.",
    )


@claim(Group.DEBATES)
def order_at_other_rates() -> Claim:
    rates = {lr: reproduced("debates", "rates", "", lr).columns for lr in (0.001, 0.002, 0.004)}
    means = {recipe: [fmean(c[recipe].values.values()) for c in rates.values()] for recipe in rates[0.002]}
    rows = tuple((f"`{recipe}`", *(f"{mean:.2f}" for mean in found)) for recipe, found in means.items())
    return _debate(
        "rates",
        "At half the learning rate, too, radix-4 FP4 with one scale per tensor costs a language model more than MXFP4.",
        (("ibm2020", "mxfp4-ceil-sr-g", 0.0, None), ("ibm2020-luq", "mxfp4-ceil-sr-g", 0.0, None)),
        "A recipe may look bad because the learning rate is another's. The debates above are held at FP32's best, 0.002. "
        "Here each recipe trains at half and double that as well.",
        (
            "FP32 and the block formats are at their best at 0.002, the recipes with one scale per tensor at 0.001, the lowest "
            "that was tried. Who gives them FP32's rate takes them to be worse than they are.",
            "At 0.004 all are worse, FP32 most, and nothing can be told apart.",
        ),
        lr=0.001,
        tables=(
            Table("Test perplexity, mean of 3 seeds, by learning rate", ("recipe", "0.001", "0.002", "0.004"), rows),
        ),
    )


@claim(Group.DEBATES)
def scale_for_each_row() -> Claim:
    return _debate(
        "rows",
        "With a scale for each row of each operand, `fourbit` trains a language model better than with one for the tensor.",
        (("fourbit-rows", "fourbit", None, 0.0),),
        "Each product can take the scales of the rows of both operands out again for free, because it does not sum over rows: "
        "tokens in fprop and dgrad, channels in wgrad. The bits of a number are the same, and so are the multipliers. Is that "
        "as good as blocks?",
        (
            "`fourbit-rows` scales activations by their largest magnitude, row by row, instead of a trained clip value. With "
            "rows for the gradients alone, or for gradients and weights, seed 0 ended at 36.1 and 35.6; `fourbit` ends at 35.5 "
            "(these two runs are not kept).",
            "On images it has not been judged: convolutions with scales of rows have no kernels, and take several times as "
            "long.",
        ),
    )
