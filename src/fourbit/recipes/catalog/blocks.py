"""Recipes with block-scaled 4-bit formats, for language models first of all.

What they share: blocks run along the axis that each product sums over; results stay in float32 (bfloat16 under autocast);
norms, embeddings and attention's products stay as they are. The last layer is the head of a language model and stays high.
Depthwise convolutions have nothing to share a scale with along their sums, and stay high too.

Where a paper leaves something open, or the six slots cannot say it, `summary` or the comment at the constant names our choice.
"""

from __future__ import annotations

from dataclasses import replace

from fourbit import formats as f
from fourbit.nn import OsciReset, OutControl, QEma, QRamping, UpkeepSpec
from fourbit.ops import REUSE, LayerSpec
from fourbit.quantizers import Block, BlockScale, Hadamard, QuantSpec, Rounding, Tile
from fourbit.recipes._rule import Recipe, Rule, Selector, depthwise, last, last_share
from fourbit.recipes._schedule import GradientNoise, Phase, Rate
from fourbit.recipes.catalog._base import CATALOG

MX_PAPER = "OCP Microscaling Formats (MX) Specification v1.0"
NVIDIA_PAPER = "NVIDIA, Pretraining Large Language Models with NVFP4, arXiv 2509.25149"
TSENG_PAPER = "Tseng et al., Training LLMs with MXFP4, arXiv 2502.20586"
FQT_PAPER = "Chmiel et al., FP4 All the Way: Fully Quantized Training of LLMs, arXiv 2505.19115"
QUARTET_PAPER = "Castro et al., Quartet: Native FP4 Training Can Be Optimal for Large Language Models, arXiv 2505.14669"
QUARTET2_PAPER = "Panferov et al., Quartet II, arXiv 2601.22813"
TETRAJET_PAPER = "Chen et al., Oscillation-Reduced MXFP4 Training for Vision Transformers, arXiv 2502.20853"
TETRAJET2_PAPER = "TetraJet-v2: Accurate NVFP4 Training for Large Language Models, arXiv 2510.27527"
FOUR_OVER_SIX_PAPER = "Cook et al., Four Over Six, arXiv 2512.02010"
UFP4_PAPER = "Zhao et al., Rethinking Shrinkage Bias in LLM FP4 Pretraining, arXiv 2606.20381"
HIFLOAT4_PAPER = "Taghian et al., HiFloat4 Format for Language Model Pre-training on Ascend NPUs, arXiv 2604.08826"
AMD_PAPER = "AMD, MXFP4 training, arXiv 2605.09825"

_E4M3 = f.FP8_E4M3FN

MXFP4 = QuantSpec(f.FP4_E2M1, BlockScale(f.E8M0, "floor"), Block(32))
"""OCP's MXFP4: E2M1, blocks of 32, E8M0 scales from the exponent of the largest number."""
_NVFP4_SCALE = BlockScale(_E4M3, "nearest", tensor_bound=448)
NVFP4 = QuantSpec(f.FP4_E2M1, _NVFP4_SCALE, Block(16))
"""NVFP4: E2M1, blocks of 16, E4M3 scales over a float32 scale of the tensor."""
NVFP4_SQUARE = replace(NVFP4, granularity=Tile(16, 16))
NVFP4_4OVER6 = replace(NVFP4, scaling=BlockScale(_E4M3, "nearest", tensor_bound=256, targets=(6.0, 4.0)))

TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The one sign vector of TransformerEngine's NVFP4 recipe."""


def everywhere(spec: QuantSpec) -> LayerSpec:
    """The same for all six operands."""
    return LayerSpec(spec, spec, spec, spec, spec, spec)


def _drawn(spec: QuantSpec) -> QuantSpec:
    return replace(spec, rounding=Rounding.STOCHASTIC)


def _of_fprop(spec: QuantSpec) -> QuantSpec:
    return replace(spec, source="fprop")


def _again(spec: QuantSpec, back: QuantSpec) -> LayerSpec:
    """One format forward, another for the gradient and for the forward's operands again."""
    return LayerSpec(spec, spec, back, _of_fprop(back), back, _of_fprop(back))


def _turned(spec: QuantSpec, by: Hadamard) -> QuantSpec:
    return replace(spec, transform=by)


def block_rules(spec: LayerSpec, high: Selector) -> tuple[Rule, ...]:
    """`spec` for all layers but those that stay in high precision."""
    return (
        Rule(None, where=high, label="high precision"),
        Rule(None, when=depthwise(), optional=True, label="depthwise"),
        Rule(spec, label="4-bit"),
    )


def _recipe(
    name: str,
    summary: str,
    spec: LayerSpec,
    source: str,
    high: Selector | None = None,
    phases: tuple[Phase, ...] = (),
    upkeep: tuple[UpkeepSpec, ...] = (),
) -> Recipe:
    return CATALOG.add(name, Recipe(name, block_rules(spec, high or last(1)), summary, source, phases, upkeep))


_RHT64 = Hadamard(64, "fresh")
_TSENG = _drawn(replace(_turned(MXFP4, _RHT64), scaling=BlockScale(f.E8M0, "floor", prescale=0.75)))
MXFP4_RHT_SR = _recipe(
    "mxfp4-rht-sr",
    "forward in the model's precision; both operands of dgrad and wgrad MXFP4, random Hadamard 64, stochastic, times 3/4",
    LayerSpec(None, None, _TSENG, _TSENG, _TSENG, _TSENG),
    TSENG_PAPER,
)
MXFP4_AMD = _recipe(
    "mxfp4-amd",
    "MXFP4 in all six operands, wgrad's rotated by Hadamard 32 without signs (rounding to nearest: our reading)",
    LayerSpec(MXFP4, MXFP4, MXFP4, MXFP4, _turned(MXFP4, Hadamard(32)), _turned(MXFP4, Hadamard(32))),
    AMD_PAPER,
)

_NVFP4_WGRAD = Hadamard(16, TE_SIGNS)
NVFP4_RECIPE = _recipe(
    "nvfp4",
    "weights in 16x16 tiles, gradients stochastic, wgrad rotated by Hadamard 16 with one sign vector; last 15 % of layers high",
    LayerSpec(
        x_fprop=NVFP4,
        w_fprop=NVFP4_SQUARE,
        g_dgrad=_drawn(NVFP4),
        w_dgrad=REUSE,
        g_wgrad=_drawn(_turned(NVFP4, _NVFP4_WGRAD)),
        x_wgrad=_turned(NVFP4, _NVFP4_WGRAD),
    ),
    NVIDIA_PAPER,
    last_share(0.15),
)
NVFP4_BF16_END = _recipe(
    "nvfp4-bf16-end",
    "as nvfp4, with the forward pass in the model's precision for the last 18 % of the steps",
    NVFP4_RECIPE.rules[-1].spec or LayerSpec(),
    NVIDIA_PAPER,
    last_share(0.15),
    (Phase(0.82, ("fprop",)),),
)
NVFP4_4OVER6_RECIPE = _recipe(
    "nvfp4-4over6",
    "as nvfp4, each block with the better of two scales (largest number 6 or 4); the last sixth of layers high",
    LayerSpec(
        x_fprop=NVFP4_4OVER6,
        w_fprop=replace(NVFP4_4OVER6, granularity=Tile(16, 16)),
        g_dgrad=_drawn(NVFP4),  # stochastic rounding with two candidates would be biased: the choice looks at the error
        w_dgrad=REUSE,
        g_wgrad=_drawn(_turned(NVFP4, _NVFP4_WGRAD)),
        x_wgrad=_turned(NVFP4_4OVER6, _NVFP4_WGRAD),
    ),
    FOUR_OVER_SIX_PAPER,
    last_share(1 / 6),
)
NVFP4_FQT = _recipe(
    "nvfp4-fqt",
    "NVFP4 everywhere: to nearest in fprop and for w in dgrad, stochastic for g and for x in wgrad",
    LayerSpec(NVFP4, NVFP4, _drawn(NVFP4), NVFP4, _drawn(NVFP4), _drawn(NVFP4)),
    FQT_PAPER,
)

NVFP4_FQT_QAF = _recipe(
    "nvfp4-fqt-qaf",
    "as nvfp4-fqt, with the backward pass in the model's precision for the last tenth of the steps (its length: our choice), "
    "in which the learning rate starts again: 40 steps of warm-up, then a cosine",
    NVFP4_FQT.rules[-1].spec or LayerSpec(),
    FQT_PAPER,
    phases=(Phase(0.9, ("dgrad", "wgrad"), Rate(40)),),
)
NVFP4_FQT_TRIGGER = _recipe(
    "nvfp4-fqt-trigger",
    "as nvfp4-fqt-qaf, from the step on at which the gradient is below sqrt(3) times the noise of its rounding (measured every "
    "100 steps, on one batch: our choice)",
    NVFP4_FQT.rules[-1].spec or LayerSpec(),
    FQT_PAPER,
    phases=(Phase(GradientNoise(), ("dgrad", "wgrad"), Rate(40)),),
)

_QUEST = QuantSpec(f.FP4_E2M1, BlockScale(f.E8M0, "nearest", clip_rms=2.92247856), Block(32), transform=Hadamard(32))
_QUARTET_BACK = _turned(replace(MXFP4, scaling=BlockScale(f.E8M0, "floor", prescale=0.75)), Hadamard(32, "fresh"))
QUARTET = _recipe(
    "quartet",
    "forward MXFP4 after Hadamard 32, clipped at 2.92 RMS; backward the forward's operands again, freshly rotated, times 3/4",
    LayerSpec(_QUEST, _QUEST, _QUARTET_BACK, _of_fprop(_QUARTET_BACK), _QUARTET_BACK, _of_fprop(_QUARTET_BACK)),
    QUARTET_PAPER,
)
_EDEN = QuantSpec(
    f.FP4_E2M1,
    BlockScale(_E4M3, "stochastic", tensor_bound=255.99, targets=(6 / (17 / 16 * 0.93),), corrected=32),
    Block(16),
    transform=Hadamard(32, "fresh"),
)
QUARTET2 = _recipe(
    "quartet2",
    "forward NVFP4 with four over six; backward the forward's operands again, all four by MS-EDEN after a fresh Hadamard 32",
    LayerSpec(NVFP4_4OVER6, NVFP4_4OVER6, _EDEN, _of_fprop(_EDEN), _EDEN, _of_fprop(_EDEN)),
    QUARTET2_PAPER,
)

_TETRAJET = replace(MXFP4, scaling=BlockScale(f.E8M0, "ceil"))
TETRAJET = _recipe(
    "tetrajet",
    "MXFP4 with scales that truncate nothing; backward the forward's operands again, stochastic (without Q-EMA and Q-Ramping)",
    _again(_TETRAJET, _drawn(_TETRAJET)),
    TETRAJET_PAPER,
)
TETRAJET_QEMA = _recipe(
    "tetrajet-qema",
    "as tetrajet, weights rounded to the side of their average, decay 0.9983 (the authors' for DeiT-T)",
    _again(_TETRAJET, _drawn(_TETRAJET)),
    TETRAJET_PAPER,
    upkeep=(QEma(),),
)
TETRAJET_QRAMPING = _recipe(
    "tetrajet-qramping",
    "as tetrajet, weights that oscillate updated less often and by more; found every 1000 steps, in 30 steps that count (the "
    "authors': every epoch, in steps that are taken back)",
    _again(_TETRAJET, _drawn(_TETRAJET)),
    TETRAJET_PAPER,
    upkeep=(QRamping(),),
)
_TETRAJET2 = _drawn(_turned(NVFP4, Hadamard(32, "fresh")))
TETRAJET2 = _recipe(
    "tetrajet2",
    "NVFP4 (the outer scale of the tensor, not of 128); backward the forward's operands again, rotated and stochastic (without "
    "OsciReset and OutControl)",
    _again(NVFP4, _TETRAJET2),
    TETRAJET2_PAPER,
)
_OUTER = replace(NVFP4, scaling=replace(_NVFP4_SCALE, outer=128))
_OUTER_BACK = _drawn(_turned(_OUTER, Hadamard(32, "fresh")))
TETRAJET2_OUTER = _recipe(
    "tetrajet2-outer",
    "as tetrajet2, with a float32 scale for each 128 numbers along the sums, as published",
    _again(_OUTER, _OUTER_BACK),
    TETRAJET2_PAPER,
)
TETRAJET2_OSCIRESET = _recipe(
    "tetrajet2-oscireset",
    "as tetrajet2-outer, weights that oscillate set to their rounding, from step 8000 on (ratio 8, as in the authors' runs)",
    _again(_OUTER, _OUTER_BACK),
    TETRAJET2_PAPER,
    upkeep=(OsciReset(ratio=8.0),),
)
_MXFP8 = QuantSpec(_E4M3, BlockScale(f.E8M0, "ceil"), Block(32))
TETRAJET2_FULL = _recipe(
    "tetrajet2-full",
    "as tetrajet2-oscireset, and the tenth of the channels of x with the largest norms in MXFP8 from step 551 on (dgrad NVFP4 "
    "as for all; rounding of MXFP8 to nearest, with scales that truncate nothing: our reading)",
    _again(_OUTER, _OUTER_BACK),
    TETRAJET2_PAPER,
    upkeep=(
        OsciReset(ratio=8.0),
        OutControl(LayerSpec(_MXFP8, _MXFP8, _OUTER_BACK, _of_fprop(_OUTER_BACK), _MXFP8, _of_fprop(_MXFP8))),
    ),
)

_UNIFORM = QuantSpec(
    f.INT4_SYM, BlockScale(_E4M3, "nearest", tensor_bound=448), Block(16), transform=Hadamard(16, "fresh")
)
UFP4 = _recipe(
    "ufp4",
    "a uniform grid of 15 numbers with NVFP4's scales, all three products rotated, gradients alone stochastic",
    LayerSpec(_UNIFORM, _UNIFORM, _drawn(_UNIFORM), _UNIFORM, _drawn(_UNIFORM), _UNIFORM),
    UFP4_PAPER,
)

HIF4 = QuantSpec(f.S1P2, BlockScale(f.UE6M2, "nearest", micro=(8, 4)), Block(64))
"""HiFloat4: S1P2, blocks of 64, E6M2 scales with a factor of 1 or 2 for each 8 and for each 4 numbers."""
_HIF4_BACK = _turned(HIF4, Hadamard(64, "fresh"))
HIFLOAT4 = _recipe(
    "hifloat4",
    "HiFloat4 in all six operands, to nearest; dgrad and wgrad rotated by a random Hadamard 64 (which products: our reading)",
    LayerSpec(HIF4, HIF4, _HIF4_BACK, _HIF4_BACK, _HIF4_BACK, _HIF4_BACK),
    HIFLOAT4_PAPER,
)
