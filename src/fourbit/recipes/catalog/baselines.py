"""What 4-bit training is compared with: 8 bits, and 4 bits in the forward pass alone."""

from __future__ import annotations

from dataclasses import replace

from fourbit import formats as f
from fourbit.ops import REUSE, LayerSpec
from fourbit.quantizers import DGE, Amax, Block, BlockScale, Hadamard, QuantSpec, Rounding, StepSize
from fourbit.recipes._rule import Recipe, Rule, depthwise, first, last
from fourbit.recipes.catalog._base import CATALOG
from fourbit.recipes.catalog.blocks import MX_PAPER, MXFP4, NVFP4, everywhere
from fourbit.recipes.catalog.paper import FP16

HFP8_PAPER = (
    "Sun et al., Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks, NeurIPS 2019"
)
FP8_PAPER = "Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433"

FP4_PAPER = "Wang et al., Optimizing Large Language Model Training Using FP4 Quantization, arXiv 2501.17116"


def _recipe(name: str, summary: str, spec: LayerSpec, source: str, high: LayerSpec | None = None, n: int = 1) -> Recipe:
    where = last(1) if n == 0 else first(n) | last(n)
    rules = (
        Rule(high, where=where, label="high precision"),
        Rule(high, when=depthwise(), optional=True, label="depthwise"),
        Rule(spec, label="low precision"),
    )
    return CATALOG.add(name, Recipe(name, rules, summary, source))


_143, _152 = QuantSpec(f.FP8_143, Amax()), QuantSpec(f.FP8_152, Amax())
HFP8 = _recipe(
    "hfp8",
    "FP8 1-4-3 forward, 1-5-2 gradients, results in FP16 1-6-9; first and last layer FP16 (scales by amax: our choice)",
    LayerSpec(_143, _143, _152, REUSE, REUSE, REUSE, output=f.FP16_169),
    HFP8_PAPER,
    FP16,
)
_MXFP8 = QuantSpec(f.FP8_E4M3FN, BlockScale(f.E8M0, "ceil"), Block(32))
MXFP8 = _recipe(
    "mxfp8",
    "E4M3 in blocks of 32 with E8M0 scales, rounded up so that nothing saturates, in all six operands",
    everywhere(_MXFP8),
    MX_PAPER,
    n=0,
)
_E4M3, _E5M2 = QuantSpec(f.FP8_E4M3FN, Amax()), QuantSpec(f.FP8_E5M2, Amax())
FP8_TENSORWISE = _recipe(
    "fp8-tensorwise",
    "E4M3 forward, E5M2 gradients, one scale per tensor from its largest number",
    LayerSpec(_E4M3, _E4M3, _E5M2, REUSE, REUSE, REUSE),
    FP8_PAPER,
    n=0,
)
_ROW = QuantSpec(f.FP8_E4M3FN, Amax(), "row")
FP8_ROWWISE = _recipe(
    "fp8-rowwise",
    "E4M3 with a scale for each row of each operand, in all six of them",
    everywhere(_ROW),
    FP8_PAPER,
    n=0,
)
NVFP4_QAT = _recipe(
    "nvfp4-qat",
    "NVFP4 weights and activations, backward in full precision",
    LayerSpec(NVFP4, NVFP4),
    "quantization-aware training with the format of NVIDIA, arXiv 2509.25149",
    n=0,
)
MXFP4_QAT = _recipe(
    "mxfp4-qat",
    "MXFP4 weights and activations, backward in full precision",
    LayerSpec(MXFP4, MXFP4),
    f"quantization-aware training with the format of {MX_PAPER}",
    n=0,
)
FP4_ROWWISE = QuantSpec(f.FP4_E2M1, Amax(), "row")
FP4_FORWARD = _recipe(
    "fp4-forward",
    "E2M1 with a scale per token and per output channel, backward in full precision (fp4-dge-occ without DGE and OCC)",
    LayerSpec(FP4_ROWWISE, FP4_ROWWISE, None, None, None, None),
    FP4_PAPER,
    n=0,
)
FP4_DGE_OCC = _recipe(
    "fp4-dge-occ",
    "E2M1 with a scale per token and per output channel; dw times the slope of a power curve (DGE, k = 5, at most 3); what "
    "lies beyond a token's quantile 0.99 in high precision (OCC); backward in the model's precision, not FP8",
    LayerSpec(replace(FP4_ROWWISE, outliers=0.99), replace(FP4_ROWWISE, estimator=DGE()), None, None, None, None),
    FP4_PAPER,
    n=0,
)
LSQ = QuantSpec(f.INT4_SYM, StepSize())
INT4_QAT = _recipe(
    "int4-qat",
    "INT4 weights and activations with learned step sizes (LSQ); backward in full precision, with the forward's operands",
    LayerSpec(LSQ, LSQ),
    "Esser et al., Learned Step Size Quantization, ICLR 2020",
    n=0,
)
_LSQ_HADAMARD = QuantSpec(f.INT4_SYM, StepSize(), transform=Hadamard(32))
_SPLIT = QuantSpec(f.INT4_PAIR, Amax(), rounding=Rounding.STOCHASTIC, leverage=0.5)
INT4_LSS = _recipe(
    "int4-lss",
    "INT4 with learned step sizes behind a Hadamard transform of 32 (LSQ); gradients split into two INT4 parts, of whose rows "
    "dgrad and wgrad take half in expectation, by leverage scores (blocks of 32 in all layers, -7 .. 7 for -8 .. 7, the parts "
    "taken from the rounded sum, last layer in full precision, samples as the rows of convolutions: our choices)",
    LayerSpec(_LSQ_HADAMARD, _LSQ_HADAMARD, _SPLIT, REUSE, REUSE, REUSE),
    "Xi et al., Training Transformers with 4-bit Integers, NeurIPS 2023, arXiv 2306.11987",
    n=0,
)
