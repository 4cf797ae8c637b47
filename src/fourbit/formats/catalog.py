"""The formats by name. A new format is one constant here; lists, documentation and tests follow by themselves.

Gradient formats are placed so that their largest magnitude is 64 (32 for the odd phase, 48 for [1,2,1]), because
GradScale keeps the largest gradient in (32, 64]. Any other placement is a matter of the scale.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from fourbit._registry import Registry
from fourbit.formats._base import Codebook, Format, IntFormat
from fourbit.formats._blocks import BlockFormat
from fourbit.formats._float import FloatFormat, midpoint_multiplier

CATALOG: Registry[Format] = Registry("format")
"""Every format of this module, by name."""

BLOCKS: Registry[BlockFormat] = Registry("block format")
"""Every block-scaled format of this module, by name."""

_PAPER = "Sun et al., Ultra-Low Precision 4-bit Training of Deep Neural Networks, NeurIPS 2020"
_MX = "OCP Microscaling Formats (MX) Specification v1.0"
_OFP8 = "OCP 8-bit Floating Point Specification v1.0"
_HFP8 = "Sun et al., Hybrid 8-bit Floating Point (HFP8) Training and Inference, NeurIPS 2019"
_DLFLOAT = "Agrawal et al., DLFloat: A 16-b Floating Point Format, ARITH 2019"
_IEEE = "IEEE 754"
_SPLIT = "Xi et al., Training Transformers with 4-bit Integers, arXiv 2306.11987"
_SAWB = "Choi et al., Accurate and Efficient 2-bit Quantized Neural Networks, MLSys 2019"
_E3M4 = "LLVM APFloat, Float8E3M4; a block scale in Chmiel et al., FP4 All the Way, arXiv 2505.19115"
_CUDA = "CUDA Math API 13.4, __nv_fp8_ue5m3"
_HIFLOAT4 = "Luo et al., HiFloat4 Format for Language Model Inference, arXiv 2602.11287"


def _logarithmic(
    name: str,
    radix: int,
    bias: int,
    summary: str,
    source: str,
    log2_shift: int = 0,
    multiplier: Fraction | None = None,
    exponent_bits: int = 3,
) -> FloatFormat:
    """[1,3,0]: a sign, seven powers of the radix, and zero; rounded by the radix's multiply-and-truncate rule."""
    return FloatFormat(
        name,
        summary,
        source,
        exponent_bits,
        0,
        bias,
        radix,
        subnormals=False,
        multiplier=multiplier or midpoint_multiplier(radix),
        log2_shift=log2_shift,
    )


def _add(format: Format) -> Format:
    return CATALOG.add(format.name, format)


FP4_R4_EVEN = _add(
    _logarithmic("fp4_r4_even", 4, 4, "radix-4 [1,3,0]: 0, +-{4^-3 .. 4^3}; dgrad phase, decides at 4^n/1.6", _PAPER)
)
FP4_R4_ODD = _add(
    _logarithmic(
        "fp4_r4_odd",
        4,
        4,
        "radix-4 [1,3,0], odd phase: half the even grid, +-{2^-7 .. 2^5}; wgrad",
        _PAPER,
        -1,
    )
)
_UNBIASED = Fraction(37, 20)
FP4_R4_EVEN_185 = _add(
    _logarithmic(
        "fp4_r4_even_185",
        4,
        4,
        "the even grid, deciding at 4^n/1.85: magnitudes of log-normal numbers keep their mean",
        "variation on " + _PAPER,
        multiplier=_UNBIASED,
    )
)
FP4_R4_ODD_185 = _add(
    _logarithmic(
        "fp4_r4_odd_185",
        4,
        4,
        "the odd phase of the same: half the grid of fp4_r4_even_185",
        "variation on " + _PAPER,
        -1,
        _UNBIASED,
    )
)
FP4_R2 = _add(_logarithmic("fp4_r2", 2, 1, "radix-2 [1,3,0]: 0, +-{2^0 .. 2^6}; also LUQ's format", _PAPER))
FP4_R2_139 = _add(
    _logarithmic(
        "fp4_r2_139",
        2,
        1,
        "the same, deciding at 23/16 of each number, not 3/2: gradients keep their magnitude over many layers",
        "variation on " + _PAPER,
        multiplier=Fraction(32, 23),
    )
)
FP4_R8 = _add(_logarithmic("fp4_r8", 8, 5, "radix-8 [1,3,0]: 0, +-{8^-4 .. 8^2}", "variation on " + _PAPER))
FP4_R16 = _add(
    _logarithmic("fp4_r16", 16, 6, "radix-16 [1,3,0]: 0, +-{2^-20 .. 2^4}, times 4", "variation on " + _PAPER, 2)
)
FP5_R2 = _add(
    _logarithmic(
        "fp5_r2",
        2,
        9,
        "radix-2 [1,4,0], five bits: 0, +-{2^-8 .. 2^6}: both phases of radix 4 in one grid",
        "variation on " + _PAPER,
        exponent_bits=4,
    )
)
FP4_R2_5 = _add(
    Codebook(
        "fp4_r2_5",
        "radix-2, five magnitudes: 0, +-{2^2 .. 2^6}; LUQ with alpha = max/16, as its Eq. 11 is printed",
        "Chmiel et al., Accurate Neural Training with 4-bit Matrix Multiplications, ICLR 2023",
        table=(0, 4, 8, 16, 32, 64, -4, -8, -16, -32, -64),
    )
)
FP4_121 = _add(
    FloatFormat(
        "fp4_121",
        "radix-2 [1,2,1] without subnormals: 0, +-{6, 8, 12, .. 48}, range 2^3",
        _PAPER,
        2,
        1,
        -2,
        subnormals=False,
    )
)
FP4_E2M1 = _add(FloatFormat("fp4_e2m1", "OCP E2M1: 0, +-{0.5, 1, 1.5, 2, 3, 4, 6}", _MX, 2, 1, 1))
FP4_E1M2 = _add(
    FloatFormat(
        "fp4_e1m2", "E1M2: 0, +-{0.25, 0.5 .. 1.75}, the even spacing of int4_sym in quarters", _HIFLOAT4, 1, 2, 1
    )
)
FP6_E2M3 = _add(FloatFormat("fp6_e2m3", "OCP E2M3: up to 7.5, every code a number", _MX, 2, 3, 1))
S1P2 = _add(
    FloatFormat(
        "s1p2",
        "HiFloat4's elements: 0, +-{0.25, 0.5 .. 1.75}, ties away from zero",
        _HIFLOAT4,
        1,
        2,
        1,
        ties="away",
    )
)
FP6_E3M2 = _add(FloatFormat("fp6_e3m2", "OCP E3M2: up to 28, every code a number", _MX, 3, 2, 3))

INT4_SYM = _add(IntFormat("int4_sym", "-7 .. 7, 15 levels with zero; SAWB's zero-aligned form", _SAWB, 4, -7, 7))
INT4 = _add(IntFormat("int4", "-8 .. 7, two's complement, 16 levels", "", 4, -8, 7))
INT4_MIDRISE = _add(IntFormat("int4_midrise", "+-{0.5 .. 7.5}, 16 levels without zero", _SAWB, 4, -7.5, 7.5))
INT4_PAIR = _add(
    IntFormat("int4_pair", "-98 .. 98: 14 high + low, two numbers of -7 .. 7 (bit splitting)", _SPLIT, 8, -98, 98)
)
UINT4 = _add(IntFormat("uint4", "0 .. 15; PACT after ReLU", "Choi et al., PACT, arXiv 1805.06085", 4, 0, 15))
INT2_SYM = _add(IntFormat("int2_sym", "-1 .. 1, ternary", _SAWB, 2, -1, 1))
INT2 = _add(IntFormat("int2", "-2 .. 1, two's complement", "", 2, -2, 1))
INT2_MIDRISE = _add(IntFormat("int2_midrise", "+-{0.5, 1.5}, 4 levels without zero", _SAWB, 2, -1.5, 1.5))
INT3_SYM = _add(IntFormat("int3_sym", "-3 .. 3, 7 levels", "", 3, -3, 3))
INT3 = _add(IntFormat("int3", "-4 .. 3, two's complement", "", 3, -4, 3))
INT3_MIDRISE = _add(IntFormat("int3_midrise", "+-{0.5 .. 3.5}, 8 levels without zero", _SAWB, 3, -3.5, 3.5))
INT8_SYM = _add(IntFormat("int8_sym", "-127 .. 127, 255 levels with zero", _SAWB, 8, -127, 127))
INT8 = _add(IntFormat("int8", "-128 .. 127, two's complement", "", 8, -128, 127))
UINT8 = _add(IntFormat("uint8", "0 .. 255", "", 8, 0, 255))

FP8_143 = _add(
    FloatFormat(
        "fp8_143",
        "1-4-3, IBM's bias 7 + 4 = 11: 1.125 * 2^-11 to 30, no subnormals, every code a number",
        _HFP8,
        4,
        3,
        11,
        subnormals=False,
    )
)
FP8_152 = _add(
    FloatFormat("fp8_152", "1-5-2, bias 15: 2^-16 (subnormal) to 1.75 * 2^16, every code a number", _HFP8, 5, 2, 15)
)
FP8_E4M3FN = _add(FloatFormat("fp8_e4m3fn", "OCP E4M3: up to 448, NaN, no infinity", _OFP8, 4, 3, 7, specials="nan"))
FP8_E5M2 = _add(
    FloatFormat("fp8_e5m2", "OCP E5M2: up to 57344, infinity and NaN, saturating", _OFP8, 5, 2, 15, specials="ieee")
)
FP8_E3M4 = _add(
    FloatFormat(
        "fp8_e3m4", "E3M4, as IEEE 754: up to 15.5, infinity and NaN, saturating", _E3M4, 3, 4, 3, specials="ieee"
    )
)
E8M0 = _add(
    FloatFormat(
        "e8m0",
        "OCP scale format: 2^-127 .. 2^127, no sign, no zero",
        _MX,
        8,
        0,
        127,
        sign_bits=0,
        subnormals=False,
        specials="nan",
        has_zero=False,
    )
)
UE5M3 = _add(
    FloatFormat(
        "ue5m3",
        "scale format without a sign: E5M3, 2^-17 (subnormal) to 114688, NaN, no infinity",
        _CUDA,
        5,
        3,
        15,
        sign_bits=0,
        specials="nan",
    )
)
UE6M2 = _add(
    FloatFormat(
        "ue6m2",
        "HiFloat4's scale format: E6M2, 2^-48 .. 1.5 * 2^15, no sign, no zero, no subnormals",
        _HIFLOAT4,
        6,
        2,
        48,
        sign_bits=0,
        subnormals=False,
        specials="nan",
        has_zero=False,
    )
)

FP16_169 = _add(
    FloatFormat(
        "fp16_169",
        "1-6-9, DLFloat16: bias 31, no subnormals, one code for NaN and infinity",
        _DLFLOAT,
        6,
        9,
        31,
        subnormals=False,
        specials="nan",
    )
)
BINARY16 = _add(
    FloatFormat("binary16", "IEEE half precision, 1-5-10", _IEEE, 5, 10, 15, specials="ieee", overflow="infinity")
)
BFLOAT16 = _add(
    FloatFormat(
        "bfloat16",
        "1-8-7, the upper half of float32",
        "Google Brain",
        8,
        7,
        127,
        specials="ieee",
        overflow="infinity",
    )
)


def _block(
    name: str, element: Format, block: int, scale: Format, summary: str, source: str, **rest: Any
) -> BlockFormat:
    return BLOCKS.add(name, BlockFormat(name, element, block, scale, summary, source, **rest))


_NVFP4 = "NVIDIA, Pretraining Large Language Models with NVFP4, arXiv 2509.25149; TransformerEngine"
_FOUR_OVER_SIX = "Cook et al., Four Over Six, arXiv 2512.02010"

MXFP4 = _block(
    "mxfp4", FP4_E2M1, 32, E8M0, "OCP MXFP4: scale 2^(floor(log2 amax) - 2); 6 < amax/scale < 8 saturates", _MX
)
MXFP4_CEIL = _block(
    "mxfp4_ceil",
    FP4_E2M1,
    32,
    E8M0,
    "the smallest power of two with amax/scale <= 6: nothing saturates",
    "Chen et al., TetraJet, arXiv 2502.20853; cuBLAS, 1D block scaling",
    rule="ceil",
)
MXFP6_E2M3 = _block("mxfp6_e2m3", FP6_E2M3, 32, E8M0, "OCP MXFP6 with E2M3: scale 2^(floor(log2 amax) - 2)", _MX)
MXFP6_E3M2 = _block("mxfp6_e3m2", FP6_E3M2, 32, E8M0, "OCP MXFP6 with E3M2: scale 2^(floor(log2 amax) - 4)", _MX)
MXFP8_E4M3 = _block("mxfp8_e4m3", FP8_E4M3FN, 32, E8M0, "OCP MXFP8 with E4M3: scale 2^(floor(log2 amax) - 8)", _MX)
MXFP8_E5M2 = _block("mxfp8_e5m2", FP8_E5M2, 32, E8M0, "OCP MXFP8 with E5M2: scale 2^(floor(log2 amax) - 15)", _MX)
MXINT4 = _block(
    "mxint4", FP4_E1M2, 32, E8M0, "E1M2, that is -7 .. 7 in quarters: scale 2^floor(log2 amax)", "microxcaling, int4"
)
NVFP4 = _block(
    "nvfp4",
    FP4_E2M1,
    16,
    FP8_E4M3FN,
    "scale E4M3(amax/6) under a float32 scale of the tensor, amax/(6 * 448)",
    _NVFP4,
    rule="nearest",
    tensor_bound=448.0,
)
NVFP4_ONE_LEVEL = _block(
    "nvfp4_one_level", FP4_E2M1, 16, FP8_E4M3FN, "scale E4M3(amax/6), no tensor scale", _NVFP4, rule="nearest"
)
NVFP4_4OVER6 = _block(
    "nvfp4_4over6",
    FP4_E2M1,
    16,
    FP8_E4M3FN,
    "the better of E4M3(amax/6) and E4M3(amax/4) by squared error; tensor scale amax/(6 * 256)",
    _FOUR_OVER_SIX,
    rule="nearest",
    tensor_bound=256.0,
    targets=(6.0, 4.0),
    order="encode",
)
HIF4 = _block(
    "hif4",
    S1P2,
    64,
    UE6M2,
    "scale E6M2(amax/7) of 64, factors of 1 or 2 of each 8 and of each 4 in them, bfloat16 arithmetic",
    f"{_HIFLOAT4}; the authors' code",
    rule="nearest",
    micro=(8, 4),
)


def get(format: str | Format) -> Format:
    """The format of that name (a Format passes through).

    Raises:
        UserError: no such name; the message has the nearest ones.
    """
    return format if isinstance(format, Format) else CATALOG[format]


def get_block(format: str | BlockFormat) -> BlockFormat:
    """The block format of that name (a BlockFormat passes through).

    Raises:
        UserError: no such name; the message has the nearest ones.
    """
    return format if isinstance(format, BlockFormat) else BLOCKS[format]


def names() -> list[str]:
    """Names of all formats in the catalogue."""
    return list(CATALOG)
