"""The CPU in place of a GPU: Triton's interpreter for the kernels, float32 for the tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels.cuda import _multiply, _products
from fourbit.kernels.cuda._device import DEVICES


def for_a_gpu() -> None:
    """Let the CUDA kernels take CPU tensors. Set TRITON_INTERPRET=1 before."""
    DEVICES["cpu"] = (9, 0)
    _products.bfloat16_mm = lambda a, b: a.float() @ b.float()
    _products.fp8_mm = _fp8_mm
    _multiply._FP8_SMALLEST = 64
    convert_as_hardware()


def _fp8_mm(a: Tensor, b: Tensor) -> Tensor:
    assert a.is_contiguous() and b.is_contiguous() and not a.dtype == b.dtype == torch.float8_e5m2
    return a.float() @ b.float().t()


def convert_as_hardware() -> None:
    """Triton's interpreter truncates where bfloat16 is rounded, and loses subnormals: put torch's conversion in its place."""
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, mode):
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
        if source.name not in kinds or target.name not in kinds:
            return theirs(data, source, target, mode)
        bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
        raw = torch.from_numpy(data.view(f"int{8 * data.itemsize}").copy()).view(kinds[source.name])
        found = raw.to(kinds[target.name])
        return found.view(bits[found.element_size()]).numpy().view(f"uint{8 * found.element_size()}")

    interpreter._convert_float = convert
