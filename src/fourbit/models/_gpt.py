"""A decoder-only Transformer as language models are built today, small enough to be trained on a desk.

Normalization before each sub-layer by RMSNorm (Zhang and Sennrich, arXiv 1910.07467), rotary positions (Su et al., arXiv
2104.09864), SwiGLU (Shazeer, arXiv 2002.05202), no biases; weights N(0, 0.02^2), those that write to the residual stream
divided by sqrt(2 depth) (Radford et al., "Language models are unsupervised multitask learners", 2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.models._base import register

ROUND_TO = 64
"""Widths of feed-forward networks are multiples of this, which all block sizes and rotations of the recipes divide."""
EPSILON = 1e-5
INIT_STD = 0.02


class Gpt(nn.Module):
    """Logits of the next token at every position.

    Args:
        num_tokens: size of the vocabulary.
        width: numbers per position.
        depth: blocks of attention and feed-forward network.
        heads: of the attention, each of width / heads numbers.
        context: tokens of the longest row.
        hidden: units of the feed-forward network; None: 8/3 width, rounded up to a multiple of 64.
        tied: whether the classifier's weights are those of the embedding.
        base: of the rotary positions.

    Raises:
        UserError: sizes below 1, or that do not divide each other.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        context: int = 256,
        hidden: int | None = None,
        tied: bool = True,
        base: float = 10_000.0,
    ):
        super().__init__()
        hidden = -(-8 * width // (3 * ROUND_TO)) * ROUND_TO if hidden is None else hidden
        sizes = {"width": width, "depth": depth, "heads": heads, "context": context, "hidden": hidden, "base": base}
        for name, value in sizes.items():
            if not value > 0:
                raise UserError(f"{name} of gpt is {value}, but must be more than 0.")
        if width % (2 * heads):
            raise UserError(
                f"width of gpt is {width}, but {heads} heads that turn pairs of numbers need a multiple of {2 * heads}: give "
                f"one, such as {max(1, round(width / (2 * heads))) * 2 * heads}."
            )
        self.context = context
        self.embedding = nn.Embedding(num_tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, EPSILON)
        self.classifier = nn.Linear(width, num_tokens, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, INIT_STD * ((2 * depth) ** -0.5 if writes else 1.0))
        if tied:
            self.classifier.weight = self.embedding.weight
        self.turns: Tensor
        self.register_buffer("turns", rotary_turns(context, width // heads, base), persistent=False)

    def forward(self, tokens: Tensor, state: tuple[()] = ()) -> tuple[Tensor, tuple[()]]:
        """Tokens [T, B] -> logits [T, B, num_tokens], and a state, which is empty: every window is read anew.

        Raises UserError for more tokens than the context has.
        """
        if len(tokens) > self.context:
            raise UserError(
                f"a row has {len(tokens)} tokens, but this gpt reads {self.context}: cut it, or build one with a larger "
                "context."
            )
        x, turns = self.embedding(tokens.t()), self.turns[:, : len(tokens)]
        for block in self.blocks:
            x = block(x, turns)
        return self.classifier(self.norm(x)).transpose(0, 1), ()


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); [B, T, width] -> the same."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width, EPSILON)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """`turns`: of `rotary_turns`, for the T positions."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(turned(q, turns), turned(k, turns), v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.hidden_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotary_turns(length: int, width: int, base: float = 10_000.0) -> Tensor:
    """cos and sin of position * base^(-2 i / width), float32 [2, length, width / 2]."""
    rates = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack((angles.cos(), angles.sin())).float()


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """The pairs (x_i, x_(i + width/2)) of each position turned by its angle i; x [..., T, width]."""
    cos, sin = turns
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


@register("gpt", "text")
def gpt(
    num_tokens: int,
    in_channels: int,
    *,
    width: int = 256,
    depth: int = 4,
    heads: int = 4,
    context: int = 256,
    hidden: int | None = None,
    tied: bool = True,
) -> nn.Module:
    """Decoder-only Transformer with rotary positions, RMSNorm and SwiGLU, as Llama has them: 3,213,568 parameters besides the
    embedding. Other sizes: gpt?width=128&depth=2&heads=2&context=64&hidden=384&tied=false.
    """
    return Gpt(num_tokens, width, depth, heads, context, hidden, tied)
