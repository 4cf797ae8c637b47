"""The operations that `quantizers.py` times: the bytes that each must move, its data, our call, and the peers' nearest.

Bytes count what has to go through memory for a tensor that no cache holds: SAWB and LUQ read twice, because their scale
needs the whole tensor before the first element can be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import _peers, _plain
from benchmarks._harness import Call
from fourbit import formats
from fourbit.quantizers import (
    Amax,
    Block,
    BlockScale,
    ClipValue,
    GradScale,
    Hadamard,
    QuantSpec,
    Rotation,
    Rounding,
    Sawb,
    amax_of,
    quantize,
    quantize_pair,
    request_for,
    run,
)

Build = Callable[[Tensor], Call]


@dataclass(frozen=True)
class Operation:
    """One quantization.

    Args:
        reads, writes: bytes per element.
        data: a tensor of so many elements, as a network would have it.
        ours: our call on a tensor.
        plain: a function of the tensor with the same arithmetic, for torch.compile; None where there is none.
        others: {library: (what it computes, its call)}; building a call may raise `Skip`.
    """

    title: str
    reads: float
    writes: float
    data: Callable[[int], Tensor]
    ours: Build
    plain: Callable[[Tensor], _plain.Function] | None
    others: dict[str, tuple[str, Build]] = field(default_factory=dict)

    @property
    def bytes_moved(self) -> float:
        """Reads and writes together."""
        return self.reads + self.writes


def _activations(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).relu_()


def _weights(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1)).mul_(0.05)


def _gradients(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(2)).pow_(3).mul_(1e-4)


def _exponent(g: Tensor) -> Tensor:
    return GradScale().first_exponent(amax_of(g))


def _grad_scale(g: Tensor) -> float:
    return 2.0 ** int(_exponent(g))


def _pact(x: Tensor) -> Call:
    spec, alpha = QuantSpec(formats.UINT4, ClipValue(init=2.0)), torch.tensor(2.0)
    return lambda: run(request_for(x, spec, stored=alpha, save=True))


def _sawb(w: Tensor) -> Call:
    spec = QuantSpec(formats.INT4_SYM, Sawb())
    return lambda: run(request_for(w, spec, save=True))


def _pair(g: Tensor) -> Call:
    even, odd = (QuantSpec(format, GradScale()) for format in (formats.FP4_R4_EVEN, formats.FP4_R4_ODD))
    exponent = _exponent(g)
    return lambda: quantize_pair(g, even, odd, stored=exponent)


def _luq(g: Tensor) -> Call:
    spec = QuantSpec(formats.FP4_R2, Amax(), rounding=Rounding.STOCHASTIC)
    return lambda: quantize(g, spec, key=1)


def _fp8(g: Tensor) -> Call:
    spec, exponent = QuantSpec(formats.FP8_152, GradScale()), _exponent(g)
    return lambda: quantize(g, spec, stored=exponent)


def _fp16(x: Tensor) -> Call:
    spec = QuantSpec(formats.FP16_169)
    return lambda: quantize(x, spec)


_MX, _NV = BlockScale(formats.E8M0, "floor"), BlockScale(formats.FP8_E4M3FN, "nearest", tensor_bound=448)


def _blocks(scaling: BlockScale, size: int, rotated: int = 0, stochastic: bool = False) -> Build:
    """E2M1 in blocks along rows of 1024 or less, in bfloat16; what is rounded to nearest is packed as well."""
    rounding = Rounding.STOCHASTIC if stochastic else Rounding.NEAREST
    spec = QuantSpec(formats.FP4_E2M1, scaling, Block(size), rounding)
    rotation = Rotation(Hadamard(rotated, "fresh"), 1) if rotated else None

    def build(x: Tensor) -> Call:
        x = x.view(1, -1, 1, min(1024, x.numel()))
        request = request_for(x, spec, Block(size), key=1, save=not stochastic, rotation=rotation)
        return lambda: run(request)

    return build


def _block_operations() -> dict[str, Operation]:
    found = {}
    for name, scaling, size, reads, others in (
        ("mxfp4", _MX, 32, 4, {"microxcaling": _BACKWARD["microxcaling"], "torchao MXFP4": _TORCHAO["torchao MXFP4"]}),
        ("nvfp4", _NV, 16, 4 + 4, {"torchao NVFP4": _TORCHAO["torchao NVFP4"]}),
    ):
        writes = 2 + 0.5 + 1 / size
        title = f"{name.upper()} in blocks of {size}"
        nearest = Operation(f"{title}, packed", reads, writes, _weights, _blocks(scaling, size), None, others)
        rotated = _blocks(scaling, size, rotated=size)
        drawn = _blocks(scaling, size, stochastic=True)
        found[name] = nearest
        found[f"{name}-rht"] = Operation(f"{title}, rotated, packed", reads, writes, _weights, rotated, None)
        found[f"{name}-sr"] = Operation(f"{title}, stochastic", reads, 2, _gradients, drawn, None)
    return found


def _fake_quantize(low: int, high: int) -> Build:
    """torch's fake_quantize with a scale that is known beforehand: float32 out, no codes (and a mask that it throws away)."""
    return lambda x: lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, low, high)


def _microxcaling(elements: str) -> Build:
    def build(x: Tensor) -> Call:
        _peers.microxcaling()
        from mx.mx_ops import quantize_mx_op  # type: ignore[import-not-found]

        specs, x = _peers.mx_specs(elements), x.view(-1, 32)
        return lambda: quantize_mx_op(x, specs, elem_format=elements, axes=[-1], block_size=32)

    return build


def _qpytorch_block(x: Tensor) -> Call:
    _, quant = _peers.qtorch()
    x = x.view(-1, 32)
    return lambda: quant.block_quantize(x, wl=4, dim=0, rounding="nearest")


def _qpytorch_float(exponent: int, fraction: int, rounding: str = "nearest") -> Build:
    def build(x: Tensor) -> Call:
        _, quant = _peers.qtorch()
        return lambda: quant.float_quantize(x, exp=exponent, man=fraction, rounding=rounding)

    return build


def _torchao_mx(x: Tensor) -> Call:
    tensor, x = _peers.torchao("prototype.mx_formats.mx_tensor").MXTensor, x.view(-1, 32)
    return lambda: tensor.to_mx(x, torch.float4_e2m1fn_x2, 32)


def _torchao_nv(x: Tensor) -> Call:
    tensor, x = _peers.torchao("prototype.mx_formats.nvfp4_tensor").NVFP4Tensor, x.view(-1, 32)
    return lambda: tensor.to_nvfp4(x)


_TORCHAO = {"torchao MXFP4": ("packed codes and scales", _torchao_mx), "torchao NVFP4": ("the same", _torchao_nv)}
_FORWARD = {
    "QPyTorch": ("4-bit block floating point", _qpytorch_block),
    "microxcaling": ("MXINT4", _microxcaling("int4")),
    **_TORCHAO,
}
_BACKWARD = {"microxcaling": ("MXFP4", _microxcaling("fp4_e2m1")), **_TORCHAO}

OPERATIONS = {
    "pact": Operation(
        "PACT to UINT4, packed, clip mask",
        4,
        1 + 0.5 + 0.125,
        _activations,
        _pact,
        lambda x: _plain.pact(2.0),
        {"torch": ("fake_quantize, given scale", _fake_quantize(0, 15)), **_FORWARD},
    ),
    "sawb": Operation(
        "SAWB to INT4, packed",
        4 + 4,
        1 + 0.5,
        _weights,
        _sawb,
        lambda w: _plain.sawb,
        {"torch": ("fake_quantize, given scale", _fake_quantize(-7, 7)), **_FORWARD},
    ),
    "pair": Operation(
        "radix-4 FP4, both phases, amax",
        4,
        2 + 2,
        _gradients,
        _pair,
        lambda g: _plain.pair(_grad_scale(g)),
        {"QPyTorch": ("[1,3,0], once", _qpytorch_float(3, 0)), **_BACKWARD},
    ),
    "luq": Operation(
        "LUQ: radix-2 FP4, stochastic",
        4 + 4,
        1,
        _gradients,
        _luq,
        None,
        {"QPyTorch": ("[1,3,0], stochastic", _qpytorch_float(3, 0, "stochastic")), **_BACKWARD},
    ),
    "fp8": Operation(
        "FP8 1-5-2",
        4,
        2,
        _gradients,
        _fp8,
        lambda g: _plain.binary(formats.FP8_152, _grad_scale(g), torch.bfloat16),
        {
            "torch": ("cast to float8_e5m2", lambda x: lambda: x.to(torch.float8_e5m2)),
            "QPyTorch": ("[1,5,2]", _qpytorch_float(5, 2)),
            "microxcaling": ("MXFP8", _microxcaling("fp8_e5m2")),
        },
    ),
    "fp16": Operation(
        "FP16 1-6-9",
        4,
        4,
        _activations,
        _fp16,
        lambda x: _plain.binary(formats.FP16_169, 1.0, torch.float32),
        {
            "torch": ("cast to float16", lambda x: lambda: x.to(torch.float16)),
            "QPyTorch": ("[1,6,9]", _qpytorch_float(6, 9)),
        },
    ),
    **_block_operations(),
}
"""By name."""
