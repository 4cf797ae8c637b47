"""Leverage-score sampling: which rows of a gradient in two parts a product is computed with.

    g = scale (2 h high + low),     high and low integers of -h .. h     (bit splitting; h = 7: two INT4 numbers)
    p_i = min(1, c v_i),            sum p_i = leverage * 2 N             over the N rows of high and the N rows of low

Row i is kept with probability p_i and divided by it, so that the product of the kept rows has the mean of the whole one. The
score v_i is |g_i| in dgrad, and |g_i| |x_i| in wgrad. A row is a token of a linear layer, a sample of a convolution.

Source: Xi et al., Training Transformers with 4-bit Integers, arXiv 2306.11987.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.ops._contraction import Contraction, LinearMap, Matmul
from fourbit.ops._product import Operand
from fourbit.quantizers import half_of, random_words


def sampled(a: Operand, contraction: Contraction, leverage: float, key: int, x: Operand | None) -> Operand:
    """The gradient of a product with the rows that are kept, divided by their probability, in full precision.

    Args:
        a: as the product takes it, in a format of two parts.
        key: of the random words, one for each row of high, then of low.
        x: the other operand of wgrad; None in dgrad.

    Raises:
        UserError: a product of two activations.
    """
    if isinstance(contraction, Matmul):
        raise UserError("leverage is for layers with weights: give products of two activations a spec without it")
    assert a.format is not None
    half = half_of(a.format)
    assert half is not None
    q = a.to(torch.float32)
    high = (q / (2 * half)).round_()
    low = q - high * (2 * half)
    norms = torch.cat((2 * half * _norms(high, contraction), _norms(low, contraction)))
    if x is not None:
        norms = norms * _norms(x.to(torch.float32), contraction).repeat(2)
    limits = thresholds(norms, leverage * norms.numel())
    words = random_words(key, norms.shape, norms.device).to(torch.int64) & 0xFFFFFFFF
    factors = torch.where(words < limits, 2.0**32 / limits.clamp_min(1), 0.0).to(torch.float32)
    for_high, for_low = (f.view(_rows_shape(q, contraction)) for f in factors.chunk(2))
    return Operand(high.mul_(for_high * (2 * half)).add_(low.mul_(for_low)))


def thresholds(scores: Tensor, total: float) -> Tensor:
    """min(1, c v_i) * 2^32, rounded up, int64, with c such that the probabilities sum to `total` (or all that are not 0 are 1).

    Args:
        scores: v, float64, not negative.
        total: at most their number.

    >>> (thresholds(torch.tensor([6.0, 1.0, 1.0, 0.0], dtype=torch.float64), 2.0) / 2.0**32).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    if not scores.numel():
        return scores.to(torch.int64)
    scores = scores.nan_to_num()
    v = scores.sort(descending=True).values
    tails = v.flip(0).cumsum(0).flip(0)
    left = total - torch.arange(len(v), dtype=v.dtype, device=v.device)
    first = (v * left <= tails).to(torch.int8).argmax()  # those before it have the probability 1
    c = left[first] / tails[first]
    return (torch.where(scores > 0, (scores * c).clamp(0, 1), 0.0) * 2.0**32).ceil().to(torch.int64)


def _norms(t: Tensor, contraction: Contraction) -> Tensor:
    """Of each row, float64."""
    rows = t.reshape(-1, t.shape[-1]) if isinstance(contraction, LinearMap) else t.flatten(1)
    return rows.double().square().sum(1).sqrt()


def _rows_shape(t: Tensor, contraction: Contraction) -> tuple[int, ...]:
    """A number for each row, to be multiplied with the operand."""
    return (*t.shape[:-1], 1) if isinstance(contraction, LinearMap) else (t.shape[0], *(1 for _ in t.shape[1:]))
