"""The units by name. A new unit is one entry here; simulation, synthesis, tables and tests follow by themselves.

Formats of operands are those of `fourbit.formats`. Units whose name ends in `_fixed` add into a fixed-point register that
holds 256 cycles of the largest products without overflow; `converter` turns such a register into FP16.
"""

from __future__ import annotations

from dataclasses import replace

from fourbit.formats import (
    BFLOAT16,
    BINARY16,
    E8M0,
    FP4_121,
    FP4_E2M1,
    FP4_R2,
    FP4_R4_EVEN,
    FP4_R4_EVEN_185,
    FP4_R4_ODD,
    FP4_R4_ODD_185,
    FP4_R8,
    FP4_R16,
    FP5_R2,
    FP8_143,
    FP8_152,
    FP8_E4M3FN,
    FP16_169,
    INT4_SYM,
    UINT4,
    Format,
    IntFormat,
)
from fourbit.hardware._converter import Converter
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware._quantizer import Hadamard, Quantizer, RandomSource, Register
from fourbit.hardware._unit import UNITS, Unit

CYCLES = 256
"""That a fixed-point register must hold."""
INT5 = IntFormat("int5", "-8 .. 15: one operand for signed and unsigned 4-bit numbers", "", 5, -16, 15)


def _add(unit: Unit) -> Unit:
    return UNITS.add(unit.name, unit)


def _pair(name: str, title: str, a: Format, b: Format, ways: int) -> None:
    """Adding into FP16 every cycle, and into a wide register."""
    unit = InnerProduct(name, f"{title}, FP16 sums", a, b, ways)
    _add(unit)
    width = unit.sum_bits + (CYCLES - 1).bit_length()
    _add(replace(unit, name=f"{name}_fixed", title=f"{title}, {width}-bit register", accumulator=width))


_add(InnerProduct("fma_fp16", "FP16 1-6-9 fused multiply-add: the baseline", FP16_169, FP16_169))
_add(InnerProduct("fma_binary16", "IEEE binary16 fused multiply-add", BINARY16, BINARY16, accumulator="binary16"))
_add(InnerProduct("fma_bf16", "bfloat16 x bfloat16 + FP32", BFLOAT16, BFLOAT16, accumulator="float32"))
_pair("int4_fp4", "4-way INT4 x FP4 radix-4", INT4_SYM, FP4_R4_EVEN, 4)
_pair("uint4_fp4", "4-way UINT4 x FP4 radix-4, odd phase", UINT4, FP4_R4_ODD, 4)
_pair("int4_int4", "4-way INT4 x INT4", INT4_SYM, INT4_SYM, 4)
_pair("uint4_int4", "4-way UINT4 x INT4", UINT4, INT4_SYM, 4)
_pair("int4_fp4r2", "4-way INT4 x FP4 radix-2 (LUQ)", INT4_SYM, FP4_R2, 4)
_pair("int4_fp4r8", "4-way INT4 x FP4 radix-8", INT4_SYM, FP4_R8, 4)
_pair("int4_fp4r16", "4-way INT4 x FP4 radix-16", INT4_SYM, FP4_R16, 4)
_pair("int4_fp4_121", "4-way INT4 x FP4 [1,2,1]", INT4_SYM, FP4_121, 4)
_pair("int4_fp5r2", "4-way INT4 x FP5 radix-2", INT4_SYM, FP5_R2, 4)
_add(InnerProduct("int4_fp8", "2-way INT4 x FP8 1-5-2, FP16 sums", INT4_SYM, FP8_152, 2))
_add(InnerProduct("uint4_fp8", "2-way UINT4 x FP8 1-5-2, FP16 sums", UINT4, FP8_152, 2))
_add(InnerProduct("int4_fp8_4", "4-way INT4 x FP8 1-5-2, FP16 sums", INT4_SYM, FP8_152, 4))
_add(InnerProduct("fp8", "2-way FP8 1-4-3 x FP8 1-5-2, FP16 sums", FP8_143, FP8_152, 2))
_add(InnerProduct("fp8_4", "4-way FP8 1-4-3 x FP8 1-5-2, FP16 sums", FP8_143, FP8_152, 4))
_add(InnerProduct("fp8_8", "8-way FP8 1-4-3 x FP8 1-5-2, FP16 sums", FP8_143, FP8_152, 8))
for _ways, _suffix in ((4, ""), (16, "_16")):
    for _name, _scale, _words in (("mxfp4", E8M0, "E8M0"), ("nvfp4", FP8_E4M3FN, "E4M3")):
        _title = f"{_ways}-way E2M1 x E2M1 with {_words} scales, FP16 sums"
        _add(InnerProduct(f"{_name}{_suffix}", _title, FP4_E2M1, FP4_E2M1, _ways, scale=_scale))
for _ways in (1, 8, 16):
    _pair(f"int4_fp4_{_ways}", f"{_ways}-way INT4 x FP4 radix-4", INT4_SYM, FP4_R4_EVEN, _ways)
_pair("int5_fp4", "4-way INT5 (INT4 and UINT4) x FP4 radix-4", INT5, FP4_R4_EVEN, 4)
_add(Converter("converter", "converter of a 26-bit sum (int4_fp4_fixed) to FP16", width=26, lsb=-6))
_add(Quantizer("quantize_fp4", "GradScale, x1.6, radix-4 FP4 in both phases", targets=(FP4_R4_EVEN, FP4_R4_ODD)))
_add(Quantizer("quantize_fp4_185", "the same with x1.85", targets=(FP4_R4_EVEN_185, FP4_R4_ODD_185)))
_add(Quantizer("quantize_fp4_even", "the same with one phase", targets=(FP4_R4_EVEN,)))
_add(Quantizer("quantize_fp4r2", "GradScale, radix-2 FP4, nearest", targets=(FP4_R2,)))
_add(Quantizer("quantize_fp4r2_sr", "GradScale, radix-2 FP4, stochastic", targets=(FP4_R2,), stochastic=True))
_add(
    Quantizer("quantize_luq", "scale, radix-2 FP4, stochastic (LUQ)", targets=(FP4_R2,), scale="float", stochastic=True)
)
_add(Quantizer("quantize_e2m1", "scale, E2M1, nearest", targets=(FP4_E2M1,), scale="float"))
_add(Quantizer("quantize_mxfp4", "scale of 2^n, E2M1, nearest (MXFP4)", targets=(FP4_E2M1,)))
_add(Quantizer("quantize_e2m1_sr", "scale, E2M1, stochastic", targets=(FP4_E2M1,), scale="float", stochastic=True))
_add(Quantizer("quantize_fp8_152", "GradScale, FP8 1-5-2", targets=(FP8_152,)))
_add(Quantizer("quantize_fp8_143", "FP8 1-4-3 with a scale of 2^n", targets=(FP8_143,)))
_add(Quantizer("quantize_uint4", "scale and clip to UINT4 (PACT)", targets=(UINT4,), scale="float"))
_add(Quantizer("quantize_int4", "scale and clip to INT4 (SAWB)", targets=(INT4_SYM,), scale="float"))
_add(RandomSource("random", "32 random bits: xorshift"))
_add(Hadamard("hadamard", "Hadamard transform of 16 numbers, aligned to the largest"))
_add(Register("register", "16 flip-flops", cuts=("hold",)))
CATALOG = tuple(UNITS)
"""Names of the units above; whatever else UNITS holds was entered by a user."""
