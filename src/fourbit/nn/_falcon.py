"""The linear layer of transformers' Falcon, whose `forward` is torch's in other words. Imported when a model has one."""

from __future__ import annotations

from transformers.models.falcon.modeling_falcon import FalconLinear as _FalconLinear

from fourbit.nn._base import swaps
from fourbit.nn._layers import Linear


@swaps(_FalconLinear)
class FalconLinear(Linear, _FalconLinear):
    """transformers' FalconLinear with quantized operands: y = Q(x) Q(w)^T + b."""
