"""Functional twins of the layers: pass operands, a LayerSpec, and (for scalings that remember) a LayerState.

Without a state every call starts afresh: GradScale takes its exponent from the gradient at hand, and PACT's clip value
from the data. Stochastic rounding needs a state, which counts the steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.errors import UserError
from fourbit.ops import Contraction, Convolution, LayerSpec, LayerState, LinearMap, Matmul, contract


def _run(x: Tensor, w: Tensor, contraction: Contraction, spec: LayerSpec, state: LayerState | None) -> Tensor:
    if state is None:
        if spec.stochastic:
            raise UserError(
                "stochastic rounding would repeat its random words: pass state=LayerState(spec) and keep it"
            )
        groups, rows, *_ = contraction.orientation("fprop", "w", w.shape).shape
        state = LayerState(spec, groups * rows).to(x.device)
    if state.spec != spec:
        raise UserError(
            "the state was made for another spec: make one with LayerState(spec) for each spec, and keep it"
        )
    return contract(x, w, contraction, state)


def matmul(input: Tensor, other: Tensor, spec: LayerSpec, state: LayerState | None = None) -> Tensor:
    """torch.matmul(input, other) under `spec`; the slots named w belong to `other`."""
    return _run(input, other, Matmul(), spec, state)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, spec: LayerSpec, state: LayerState | None = None
) -> Tensor:
    """F.linear under `spec`: [..., K], [N, K] -> [..., N]."""
    y = _run(input, weight, LinearMap(), spec, state)
    return y if bias is None else y + bias.to(y.dtype)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: LayerSpec,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    state: LayerState | None = None,
) -> Tensor:
    """F.conv1d, F.conv2d or F.conv3d under `spec`, by the number of dimensions of `weight`; batched input."""
    n = weight.dim() - 2
    y = _run(input, weight, Convolution((stride,) * n, (padding,) * n, (dilation,) * n, groups), spec, state)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * n)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    scores: LayerSpec,
    values: LayerSpec,
    scores_state: LayerState | None = None,
    values_state: LayerState | None = None,
) -> tuple[Tensor, Tensor]:
    """F.scaled_dot_product_attention with quantized products: softmax(Q(q) Q(k)^T scale + mask), times Q(v).

    Args:
        query, key, value: [..., T, E], [..., S, E], [..., S, V].
        attn_mask: added to the scores, or False where a key is hidden.
        is_causal: hide keys behind the query.
        scale: of the scores; None: 1 / sqrt(E).
        scores, values: specs of the two products; the slots named w belong to key and value. softmax is in full precision.
        scores_state, values_state: as of every functional twin.

    Returns:
        The attended values [..., T, V], and the probabilities [..., T, S] after dropout.
    """
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    products = matmul(query, key.transpose(-2, -1), scores, scores_state) * factor
    if is_causal:
        seen = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
        attn_mask = seen if attn_mask is None else attn_mask & seen if attn_mask.dtype == torch.bool else attn_mask
        if attn_mask.dtype != torch.bool:
            products = products.masked_fill(seen.logical_not(), -math.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        products = products.masked_fill(attn_mask.logical_not(), -math.inf) if hidden else products + attn_mask
    probabilities = F.dropout(products.softmax(-1), dropout_p) if dropout_p else products.softmax(-1)
    return matmul(probabilities, value, values, values_state), probabilities
