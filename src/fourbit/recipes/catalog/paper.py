"""The method of the paper, its variations, and LUQ, which shares its layer rules.

Shared choices, where the paper is silent: weights INT4 with 15 levels and SAWB's zero-aligned coefficients; activations
PACT, unsigned after ReLU and symmetric where the inputs go negative; FP8 gradients are 1-5-2 and share GradScale; the
FP16 layers keep their operands in 1-6-9 with GradScale on the gradient; results of all three GEMMs rounded to 1-6-9.
"""

from __future__ import annotations

from dataclasses import replace

from fourbit import formats as f
from fourbit.formats import Format
from fourbit.nn import MatMul
from fourbit.ops import REUSE, Accumulation, LayerSpec
from fourbit.quantizers import Amax, ClipValue, GradScale, LossScaled, QuantSpec, Rounding, Sawb
from fourbit.recipes._rule import Recipe, Rule, Selector, depthwise, first, kernel_size, last, widens
from fourbit.recipes._schedule import Phase, Rate
from fourbit.recipes.catalog._base import CATALOG

PAPER = "Sun et al., Ultra-Low Precision 4-bit Training of Deep Neural Networks, NeurIPS 2020"
CHUNKS_PAPER = "Wang et al., Training Deep Neural Networks with 8-bit Floating Point Numbers, NeurIPS 2018"
LUQ_PAPER = "Chmiel et al., Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats, ICLR 2023"

PACT = QuantSpec(f.UINT4, ClipValue())
SAWB = QuantSpec(f.INT4_SYM, Sawb())

INT4_FORWARD = LayerSpec(x_fprop=PACT, w_fprop=SAWB)
"""INT4 forward; the backward GEMMs see the same INT4 numbers and an FP32 gradient."""


def _gradient(format: Format) -> QuantSpec:
    return QuantSpec(format, GradScale())


TPR = replace(INT4_FORWARD, g_dgrad=_gradient(f.FP4_R4_EVEN), g_wgrad=_gradient(f.FP4_R4_ODD), output=f.FP16_169)
"""Two-phase rounding: radix-4 FP4 gradients, even phase for dgrad, odd phase for wgrad."""

FP8_GRADIENTS = replace(TPR, g_dgrad=_gradient(f.FP8_152), g_wgrad=REUSE)
"""INT4 forward, 1-5-2 FP8 gradients in both backward GEMMs."""

FP16 = LayerSpec(
    x_fprop=QuantSpec(f.FP16_169),
    w_fprop=QuantSpec(f.FP16_169),
    g_dgrad=_gradient(f.FP16_169),
    g_wgrad=REUSE,
    output=f.FP16_169,
)
"""FP16 1-6-9 everywhere: first, last and depthwise layers."""


ATTENTION = replace(TPR, w_fprop=PACT)
"""The products of attention: queries by keys, probabilities by values; both operands are activations."""


def _ibm(
    name: str,
    summary: str,
    spec: LayerSpec = TPR,
    fp8_where: Selector | None = None,
    base: LayerSpec = FP16,
    source: str = PAPER,
) -> Recipe:
    """The paper's layer rules around one 4-bit spec, with FP8 gradients where a selector says so."""
    rules = [
        Rule(base, where=first(1) | last(1), label="first and last"),
        Rule(base, when=depthwise(), optional=True, label="depthwise"),
    ]
    if fp8_where is not None:
        rules.append(Rule(FP8_GRADIENTS, when=fp8_where, label="FP8 gradients"))
    rules.append(Rule(spec, label="4-bit"))
    return CATALOG.add(name, Recipe(name, tuple(rules), summary, source))


def _one_phase(format: Format) -> LayerSpec:
    return replace(TPR, g_dgrad=_gradient(format), g_wgrad=REUSE)


FP32 = CATALOG.add("fp32", Recipe("fp32", (Rule(None, label="full precision"),), "no quantization: the model as it is"))

INT4_FWD = CATALOG.add(
    "int4-fwd",
    Recipe(
        "int4-fwd",
        (
            Rule(None, where=first(1) | last(1), label="first and last"),
            Rule(None, when=depthwise(), optional=True, label="depthwise"),
            Rule(INT4_FORWARD, label="INT4 forward"),
        ),
        "INT4 weights and activations, FP32 backward",
        PAPER,
    ),
)
IBM2020 = _ibm(
    "ibm2020", "the paper's 4-bit training: INT4 forward, radix-4 FP4 gradients, GradScale, two-phase rounding"
)
IBM2020_ATTENTION = CATALOG.add(
    "ibm2020-attention",
    Recipe(
        "ibm2020-attention",
        (Rule(ATTENTION, types=(MatMul,), optional=True, label="attention"), *IBM2020.rules),
        "the two products of activations inside attention in 4 bits as well",
        PAPER,
    ),
)
IBM2020_DW8 = _ibm(
    "ibm2020-dw8",
    "dgrad in radix-4 FP4, wgrad in FP8 1-5-2",
    replace(TPR, g_wgrad=_gradient(f.FP8_152)),
)
IBM2020_1X1FP8 = _ibm("ibm2020-1x1fp8", "FP8 gradients in all 1x1 convolutions", fp8_where=kernel_size(1))
IBM2020_BOTTOM1X1FP8 = _ibm(
    "ibm2020-bottom1x1fp8",
    "FP8 gradients in the 1x1 convolutions that reduce channels (our reading of 'bottom': next to a bottleneck block's input)",
    fp8_where=kernel_size(1) & ~widens(),
)
IBM2020_TOP1X1FP8 = _ibm(
    "ibm2020-top1x1fp8",
    "FP8 gradients in the 1x1 convolutions that expand channels",
    fp8_where=kernel_size(1) & widens(),
)
IBM2020_3X3FP8 = _ibm(
    "ibm2020-3x3fp8", "FP8 gradients in the 3x3 convolutions instead of the 1x1", fp8_where=kernel_size(3)
)

IBM2020_NO_TPR = _ibm("ibm2020-no-tpr", "one phase for both backward GEMMs (even grid)", _one_phase(f.FP4_R4_EVEN))
IBM2020_SWAPPED = _ibm(
    "ibm2020-swapped",
    "phases swapped: odd for dgrad, even for wgrad",
    replace(TPR, g_dgrad=_gradient(f.FP4_R4_ODD), g_wgrad=_gradient(f.FP4_R4_EVEN)),
)
IBM2020_CHANNEL = _ibm(
    "ibm2020-channel-gradscale",
    "one GradScale per output channel (a question of the paper's reviewers)",
    replace(
        TPR,
        g_dgrad=QuantSpec(f.FP4_R4_EVEN, GradScale(), granularity="channel"),
        g_wgrad=QuantSpec(f.FP4_R4_ODD, GradScale(), granularity="channel"),
    ),
)
IBM2020_RADIX2 = _ibm("ibm2020-radix2", "radix-2 [1,3,0] gradients with GradScale", _one_phase(f.FP4_R2))
IBM2020_121 = _ibm("ibm2020-121", "radix-2 [1,2,1] gradients with GradScale", _one_phase(f.FP4_121))
IBM2020_RADIX8 = _ibm("ibm2020-radix8", "radix-8 [1,3,0] gradients with GradScale", _one_phase(f.FP4_R8))
IBM2020_RADIX16 = _ibm("ibm2020-radix16", "radix-16 [1,3,0] gradients with GradScale", _one_phase(f.FP4_R16))
IBM2020_FP5 = _ibm(
    "ibm2020-fp5",
    "5-bit radix-2 [1,4,0] gradients, one phase: the grids of both phases in one format",
    _one_phase(f.FP5_R2),
)


def _two_phases(even: QuantSpec, odd: QuantSpec) -> LayerSpec:
    return replace(TPR, g_dgrad=even, g_wgrad=odd)


IBM2020_M185 = _ibm(
    "ibm2020-m185",
    "two phases that decide at 4^n/1.85 instead of 4^n/1.6: larger errors, but the mean magnitude is kept",
    _two_phases(_gradient(f.FP4_R4_EVEN_185), _gradient(f.FP4_R4_ODD_185)),
)
IBM2020_CORRECTED = _ibm(
    "ibm2020-corrected",
    "two-phase rounding, the results of both backward GEMMs multiplied by what the rounding has shrunk",
    _two_phases(
        replace(_gradient(f.FP4_R4_EVEN), compensate="magnitude"),
        replace(_gradient(f.FP4_R4_ODD), compensate="magnitude"),
    ),
)
IBM2020_ZEROSUM = _ibm(
    "ibm2020-zerosum",
    "two-phase rounding, the sum of each channel of the gradient restored (not 4 bits: an experiment)",
    _two_phases(
        replace(_gradient(f.FP4_R4_EVEN), compensate="sum"), replace(_gradient(f.FP4_R4_ODD), compensate="sum")
    ),
)
IBM2020_NO_TPR_ZEROSUM = _ibm(
    "ibm2020-no-tpr-zerosum",
    "one phase, the sum of each channel of the gradient restored (not 4 bits: an experiment)",
    replace(TPR, g_dgrad=replace(_gradient(f.FP4_R4_EVEN), compensate="sum"), g_wgrad=REUSE),
)
IBM2020_STOCHASTIC = _ibm(
    "ibm2020-stochastic",
    "radix-4 gradients with stochastic rounding instead of two phases",
    replace(TPR, g_dgrad=replace(_gradient(f.FP4_R4_EVEN), rounding=Rounding.STOCHASTIC), g_wgrad=REUSE),
)


def _loss_scaled(spec: LayerSpec) -> LayerSpec:
    """The same formats with one loss scale instead of a scale per layer."""

    def unscaled(slot: QuantSpec) -> QuantSpec:
        return replace(slot, scaling=LossScaled(max=limit))

    assert isinstance(spec.g_dgrad, QuantSpec)
    limit = spec.g_dgrad.format.max
    g_wgrad = spec.g_wgrad if not isinstance(spec.g_wgrad, QuantSpec) else unscaled(spec.g_wgrad)
    return replace(spec, g_dgrad=unscaled(spec.g_dgrad), g_wgrad=g_wgrad)


IBM2020_GLOBAL = _ibm(
    "ibm2020-global-scale",
    "one loss scale for all layers instead of GradScale",
    _loss_scaled(TPR),
    base=_loss_scaled(FP16),
)
IBM2020_RADIX2_GLOBAL = _ibm(
    "ibm2020-radix2-global-scale",
    "radix-2 [1,3,0] gradients, one loss scale for all layers",
    _loss_scaled(_one_phase(f.FP4_R2)),
    base=_loss_scaled(FP16),
)


def _accumulated(name: str, summary: str, accumulation: Accumulation) -> Recipe:
    """The paper's method with rounded sums in its 4-bit and its FP16 layers."""
    spec, base = replace(TPR, accumulation=accumulation), replace(FP16, accumulation=accumulation)
    return _ibm(name, summary, spec, base=base, source=f"{PAPER}; {CHUNKS_PAPER}")


IBM2020_ACC = _accumulated(
    "ibm2020-acc",
    "ibm2020 with sums rounded to FP16 1-6-9 after every addition, in chunks of 64",
    Accumulation(f.FP16_169, chunk=64),
)
IBM2020_ACC_NOCHUNK = _accumulated(
    "ibm2020-acc-nochunk",
    "ibm2020 with sums rounded to FP16 1-6-9 after every addition, without chunks: small terms are swamped",
    Accumulation(f.FP16_169, chunk=None),
)


def _luq(format: Format = f.FP4_R2, samples: int = 1, around: LayerSpec | None = None) -> LayerSpec:
    """LUQ: logarithmic unbiased quantization of the gradient, one sample for dgrad, `samples` averaged for wgrad."""
    g = QuantSpec(format, Amax(), rounding=Rounding.STOCHASTIC)
    wgrad = REUSE if samples == 1 else replace(g, samples=samples)
    return replace(around or LayerSpec(x_fprop=SAWB, w_fprop=SAWB), g_dgrad=g, g_wgrad=wgrad)


def _luq_recipe(name: str, summary: str, spec: LayerSpec) -> Recipe:
    rules = (
        Rule(None, where=first(1) | last(1), label="first and last"),
        Rule(None, when=depthwise(), optional=True, label="depthwise"),
        Rule(spec, label="4-bit"),
    )
    return CATALOG.add(name, Recipe(name, rules, summary, LUQ_PAPER))


LUQ = _luq_recipe(
    "luq", "INT4 SAWB forward, radix-2 FP4 gradients (7 magnitudes), stochastic underflow and rounding", _luq()
)
LUQ_SMP2 = _luq_recipe("luq-smp2", "LUQ, wgrad from the mean of two samples", _luq(samples=2))
LUQ_FNT = CATALOG.add(
    "luq-fnt",
    replace(
        LUQ,
        name="luq-fnt",
        summary="LUQ, with all but the INT4 weights in full precision for the last tenth of the steps, in which the learning "
        "rate is a triangle (the share, and its peak, the base rate: our choice)",
        phases=(Phase(0.9, ("x_fprop", "g_dgrad", "g_wgrad"), Rate(0.5, "linear")),),
    ),
)
LUQ_EQ11 = _luq_recipe("luq-eq11", "LUQ with alpha = max/16 as Eq. 11 is printed: 5 magnitudes", _luq(f.FP4_R2_5))
IBM2020_LUQ = _ibm("ibm2020-luq", "ibm2020 with LUQ's gradients: all else equal, to compare the two", _luq(around=TPR))


FOURBIT_GRADIENT = QuantSpec(f.FP4_R2_139, Amax(), rounding=Rounding.UNDERFLOW)
FOURBIT = _ibm(
    "fourbit",
    "INT4 forward as ibm2020; radix-2 FP4 gradients, stochastic where they underflow, else to the nearest without bias",
    replace(TPR, g_dgrad=FOURBIT_GRADIENT, g_wgrad=REUSE),
    source="this project, from parts of the two papers above",
)

_X_ROWS, _W_ROWS = (QuantSpec(f.INT4_SYM, scaling, "row") for scaling in (Amax(), Sawb()))
_G_ROWS = replace(FOURBIT_GRADIENT, granularity="row")
FOURBIT_ROWS = _ibm(
    "fourbit-rows",
    "fourbit with a scale for each row of each operand, in all three products, which the product takes out again; activations "
    "by their largest magnitude",
    LayerSpec(
        x_fprop=_X_ROWS,
        w_fprop=_W_ROWS,
        g_dgrad=_G_ROWS,
        w_dgrad=_W_ROWS,
        g_wgrad=_G_ROWS,
        x_wgrad=_X_ROWS,
        output=TPR.output,
    ),
    source="this project, from parts of the two papers above",
)
