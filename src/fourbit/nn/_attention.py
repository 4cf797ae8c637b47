"""Multi-head attention in low precision: a drop-in subclass of torch's own, so that its Transformer layers convert whole.

Parts: `q_proj`, `k_proj`, `v_proj` multiply the inputs by their thirds of torch's in_proj_weight; `scores` and `values` are the
products of activations, in full precision unless a recipe has a rule for `fourbit.nn.MatMul`; `out_proj` is a layer of its own.
softmax, biases and masks stay in full precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fourbit.errors import UserError
from fourbit.nn._base import require_input, swaps, traced
from fourbit.nn._layers import Linear
from fourbit.nn._parts import Composed, PartInfo
from fourbit.nn.functional import scaled_dot_product_attention
from fourbit.ops import LinearMap, Matmul, ProductSize, contract

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@swaps(NonDynamicallyQuantizableLinear)
class OutProjection(Linear, NonDynamicallyQuantizableLinear):
    """The linear layer behind attention."""


@swaps(nn.MultiheadAttention)
class MultiheadAttention(Composed, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with quantized products:

        out_proj(concat_h softmax(q_h k_h^T / sqrt(E / heads) + mask) v_h),   q = Q(query) Q(w_q)^T + b_q, and so on

    >>> from fourbit import LayerSpec, QuantSpec, Sawb
    >>> attention = MultiheadAttention(8, 2, spec=LayerSpec(w_fprop=QuantSpec("int4_sym", Sawb())))
    >>> x = torch.ones(5, 3, 8)
    >>> attention(x, x, x, need_weights=False)[0].shape
    torch.Size([5, 3, 8])
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        spec = kwargs.get("spec")
        if spec is not None:
            self.out_proj.__class__ = OutProjection
            seed, index = kwargs.get("seed", 0), kwargs.get("index", 0) + len(self.parts())
            cast("OutProjection", self.out_proj).attach(spec, seed, index, kwargs.get("products", "fast"))

    def parts(self) -> dict[str, PartInfo]:
        """Three projections with one position, and two products of activations."""
        one = self._qkv_same_embed_dim
        names = {name: "in_proj_weight" if one else f"{name}_weight" for name in PROJECTIONS}
        found = {name: PartInfo("in_proj", weight, self.embed_dim) for name, weight in names.items()}
        return found | {"scores": PartInfo("", "", 1), "values": PartInfo("", "", 1)}

    def part_weight(self, name: str) -> Tensor:
        """[embed_dim, size of the input]."""
        if not self._qkv_same_embed_dim:
            return getattr(self, f"{name}_weight")
        number, size = PROJECTIONS.index(name), self.embed_dim
        return self.in_proj_weight[number * size : (number + 1) * size]

    def sizes(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> list[tuple[str, ProductSize, bool]]:
        """Of the projections, the products of activations (one per sequence and head), and the projection behind."""
        query, key, value = (
            inputs[i] if len(inputs) > i else named[n] for i, n in enumerate(("query", "key", "value"))
        )
        E, rows = self.embed_dim, query.shape[:-1].numel()
        axis = 1 if self.batch_first and key.dim() == 3 else 0
        length, queries = key.shape[axis], query.shape[axis]
        heads = rows // max(1, queries) * self.num_heads

        def projection(t: Tensor) -> ProductSize:
            return one.size(t.shape, (E, t.shape[-1]), (*t.shape[:-1], E))

        d, one = self.head_dim, LinearMap()
        q, k, v = (heads, queries, d), (heads, d, length), (heads, length, d)
        products = heads, queries, length
        return [
            *((n, projection(t), t.requires_grad) for n, t in zip(PROJECTIONS, (query, key, value), strict=True)),
            ("scores", Matmul().size(q, k, products), True),
            ("values", Matmul().size(products, v, q), True),
            ("out_proj", one.size((rows, E), (E, E), (rows, E)), True),
        ]

    def _quantized(self) -> bool:
        behind = self.out_proj
        specs = [self.part(name).spec for name in self.parts()] + ([behind.spec] if isinstance(behind, Linear) else [])
        return any(not spec.is_identity for spec in specs)

    def _project(self, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        weight, part = self.part_weight(name), self.part(name)
        require_input(x, self, -1, weight.shape[1], (3,))
        y = F.linear(x, weight) if part.spec.is_identity else contract(x, weight, LinearMap(), part.quant)
        return y if bias is None else y + bias.to(y.dtype)

    def _heads(self, t: Tensor) -> Tensor:
        """[T, B, E] -> [B, heads, T, E / heads]."""
        length, batch, _ = t.shape
        return t.view(length, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: [T, B, E], [B, T, E] with batch_first, or [T, E]; the output, and the probabilities if needed."""
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if (node := traced(self, query, key, value, *options)) is not None:
            return node
        if not self._quantized():
            return super().forward(query, key, value, *options)
        batched = query.dim() == 3
        if {query.dim(), key.dim(), value.dim()} not in ({2}, {3}):
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise UserError(
                f"MultiheadAttention got query, key and value of shapes {shapes}, but needs 3 axes each, or 2"
            )
        if is_causal and attn_mask is None:
            raise UserError("MultiheadAttention needs attn_mask, too, where is_causal=True: pass the causal mask")
        q, k, v = (
            t.transpose(0, 1) if batched and self.batch_first else t if batched else t.unsqueeze(1)
            for t in (query, key, value)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (self._project(n, t, b) for n, t, b in zip(PROJECTIONS, (q, k, v), biases, strict=True))
        batch = q.shape[1]
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        extra = [t.expand(1, batch, -1) for t in (self.bias_k, self.bias_v) if t is not None]
        if extra:
            k, v = torch.cat((k, extra[0])), torch.cat((v, extra[1]))
        if self.add_zero_attn:
            k, v = (torch.cat((t, t.new_zeros(1, *t.shape[1:]))) for t in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[0] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        heads = (self._heads(q), self._heads(k), self._heads(v))
        scores, values = self.part("scores"), self.part("values")
        probabilities = None
        if scores.spec.is_identity and values.spec.is_identity and not need_weights:
            y = F.scaled_dot_product_attention(*heads, mask, dropout)
        else:
            y, probabilities = scaled_dot_product_attention(
                *heads,
                mask,
                dropout,
                scores=scores.spec,
                values=values.spec,
                scores_state=scores.quant,
                values_state=values.quant,
            )
        y = self.out_proj(y.permute(2, 0, 1, 3).reshape(*q.shape[:2], self.embed_dim))
        y = y.transpose(0, 1) if batched and self.batch_first else y if batched else y.squeeze(1)
        if probabilities is None or not need_weights:
            return y, None
        weights = probabilities.mean(1) if average_attn_weights else probabilities
        return y, weights if batched else weights.squeeze(0)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores [B, heads or 1, T, S]; True hides, as torch has it here."""
        batch, found = q.shape[1], None
        if mask is not None:
            mask = _added(mask, q.dtype)
            found = mask.view(batch, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None]
        if padding is not None:
            hidden = _added(padding, q.dtype).view(batch, 1, 1, k.shape[0])
            found = hidden if found is None else found + hidden
        return found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
