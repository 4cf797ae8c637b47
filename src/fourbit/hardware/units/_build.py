"""`build`: the circuit of a unit, by its class.

A class of one's own is entered with `@build.register`: a function of the unit, the module, its stages and its inputs.
"""

from __future__ import annotations

from functools import singledispatch

from amaranth.hdl import Module, Value

from fourbit.hardware._converter import Converter
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware._quantizer import Hadamard, Quantizer, RandomSource, Register
from fourbit.hardware._unit import Unit
from fourbit.hardware.units._bits import Live, Stages
from fourbit.hardware.units._inner import BUILD, Inputs, convert
from fourbit.hardware.units._quantize import hadamard, quantize, xorshift


@singledispatch
def build(unit: Unit, m: Module, stages: Stages, inputs: Inputs) -> dict[str, Value]:
    """The circuit: outputs of inputs."""
    raise TypeError(f"no circuit is known of {type(unit).__name__}")


@build.register
def _(unit: InnerProduct, m: Module, stages: Stages, inputs: Inputs) -> dict[str, Value]:
    return {"y": BUILD[unit.style](unit, m, stages, inputs)}


@build.register
def _(unit: Converter, m: Module, stages: Stages, inputs: Inputs) -> dict[str, Value]:
    return {"y": convert(unit, m, stages, inputs)}


@build.register
def _(unit: RandomSource, m: Module, stages: Stages, inputs: Inputs) -> dict[str, Value]:
    return {"next": xorshift(inputs["state"])}


@build.register
def _(unit: Register, m: Module, stages: Stages, inputs: Inputs) -> dict[str, Value]:
    return {"y": stages.cut("hold", Live(x=inputs["x"])).x}


build.register(Quantizer, quantize)
build.register(Hadamard, hadamard)
