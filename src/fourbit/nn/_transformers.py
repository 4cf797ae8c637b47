"""The linear layer of transformers' older models (GPT-2), which stores its weight transposed. Imported when a model has one."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D as _Conv1D

from fourbit.nn._base import QuantizedLayer, require_input, swaps, traced
from fourbit.ops import Contraction, LinearMap, contract


@swaps(_Conv1D)
class Conv1D(QuantizedLayer, _Conv1D):
    """transformers' Conv1D with quantized operands: y[..., n] = sum_k Q(x)[..., k] Q(w)[k, n] + b[n]."""

    @property
    def num_channels(self) -> int:
        """Outputs."""
        return self.nf

    def contraction(self) -> Contraction:
        """x w, with w handed over transposed."""
        return LinearMap()

    def forward(self, x: Tensor) -> Tensor:
        """[..., nx] -> [..., nf]."""
        if (node := traced(self, x)) is not None:
            return node
        if self.quant.is_identity:
            return super().forward(x)
        require_input(x, self, -1, self.nx)
        y = contract(x, self.weight.t(), self.contraction(), self.quant)
        return y + self.bias.to(y.dtype)
