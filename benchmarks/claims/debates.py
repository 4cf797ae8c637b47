"""Where later papers contradict one another: one small language model, one thing changed at a time."""

from __future__ import annotations

from benchmarks.claims._claim import Claim, Group, claim
from benchmarks.claims._read import reproduced
from fourbit.reproduce import rows_of

SCALE = (
    "A small language model early in training (1.1 million parameters besides the embedding, 400 steps of 512 tokens). "
    "Nothing follows for 10^9 parameters."
)
METHOD = (
    "`gpt` on Shakespeare in 512 pieces of words, the same order of sequences for all. AdamW at a learning rate of "
    "0.002, the best of 0.0015, 0.002, 0.003 and 0.004 for FP32 with seed 0. Perplexity of the test text: lower is "
    "better, and a positive difference is a loss.",
)


def _debate(
    row: str,
    title: str,
    parts: tuple[tuple[str, str, float | None, float | None], ...],
    asked: str,
    why: tuple[str, ...] = (),
    lr: float | None = None,
) -> Claim:
    """A claim about a row of `fourbit reproduce debates`.

    Args:
        parts: (recipe, other, least, most): that the difference of their perplexities lies above and below. What else the row
            compares stands beside.
        lr: of the row `rates`, which has several.
    """
    runs = reproduced("debates", row, f"Small language model, row `{row}`", lr)
    decide = tuple(runs.part(a, b, least, most) for a, b, least, most in parts)
    compared = [(recipe, "fp32") for recipe in runs.columns if recipe != "fp32"]
    compared += [pair for pair in rows_of("debates")[row].pairs if set(pair) <= set(runs.columns)]
    beside = tuple(runs.part(a, b) for a, b in compared if (a, b) not in [part[:2] for part in parts])
    shown = tuple(runs.columns)
    return Claim(title, decide, asked, (SCALE,), beside=beside, runs=((runs, shown),), why=why, method=METHOD)


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
