"""Rounded sums: the definition against a scalar model in exact rational arithmetic, for every product of every contraction."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fourbit import Accumulation, Rounding, backends, formats
from fourbit.errors import UserError
from fourbit.formats import IntFormat
from fourbit.ops import accumulate
from fourbit.quantizers import random_words, round_to_format

INT16 = IntFormat("int16", width=16, low=-32768, high=32767)


def chain(products: list[Fraction], acc: Accumulation, words: list[int] | None = None) -> float:
    """One result element, addition by addition. Stochastic rounding sees the float32 of each sum."""
    format = acc.format

    def add(s: Fraction, p: Fraction, word: int) -> Fraction:
        if acc.rounding is Rounding.NEAREST:
            return Fraction(format.round(s + p))  # type: ignore[arg-type]
        if acc.rounding is Rounding.TRUNCATE:
            return Fraction(format.truncate(s + p))  # type: ignore[arg-type]
        total = Fraction(float(np.float32(float(s)) + np.float32(float(p))))
        low, high = (Fraction(v) for v in format.neighbors(total))  # type: ignore[arg-type]
        u = (word >> 8) & 0xFFFFFF
        return high if low < high and u * (high - low) < (total - low) * 2**24 else low

    words = words or [0] * (2 * len(products) + 1)
    chunk = acc.chunk or max(len(products), 1)
    y = Fraction(0)
    for c, begin in enumerate(range(0, len(products), chunk)):
        s = Fraction(0)
        for k in range(begin, min(begin + chunk, len(products))):
            s = add(s, products[k], words[k])
        y = add(y, s, words[len(products) + c])
    return float(y)


def modelled(a: torch.Tensor, b: torch.Tensor, acc: Accumulation, key: int | None = None) -> torch.Tensor:
    (G, M, K), N = a.shape, b.shape[2]
    num_additions = K + (-(-K // (acc.chunk or K)) if K else 0)
    num_additions += num_additions % 2
    words = random_words(key, (G * M * N, num_additions)).tolist() if key is not None else None
    y = torch.zeros(G, M, N)
    for e, (g, m, n) in enumerate(itertools.product(range(G), range(M), range(N))):
        products = [Fraction(p) for p in (a[g, m] * b[g, :, n]).tolist()]
        y[g, m, n] = chain(products, acc, words[e] if words else None)
    return y


def operands(kind: str, G: int = 2, M: int = 3, K: int = 70, N: int = 4, seed: int = 0):
    """Operands of several kinds; fp16 is the widest that has exact products."""
    r = torch.Generator().manual_seed(seed)
    a, b = torch.randn(G, M, K, generator=r), torch.randn(G, K, N, generator=r)
    powers = [2.0 ** torch.randint(-25, 15, t.shape, generator=r).float() for t in (a, b)]
    if kind == "int4":
        return (a * 4).round().clamp(-7, 7), (b.abs() * 8).round().clamp(0, 15)
    if kind == "fp4 x int4":
        return round_to_format(a * 8, formats.FP4_R4_ODD), (b * 4).round().clamp(-7, 7)
    if kind == "fp16":
        return round_to_format(a, formats.FP16_169), round_to_format(b, formats.FP16_169)
    if kind == "fp16, wide range":
        return tuple(round_to_format(t * p, formats.FP16_169) for t, p in zip((a, b), powers, strict=True))
    if kind == "float32":
        return a, b
    assert kind == "cancelling"  # sums come back to nearly nothing, again and again
    a = round_to_format(a * powers[0], formats.FP16_169)
    a[:, :, 1::2] = -a[:, :, : 2 * (K // 2) : 2]
    return a, torch.ones_like(b) + torch.randint(0, 2, b.shape, generator=r) * 2.0**-9


KINDS = ("int4", "fp4 x int4", "fp16", "fp16, wide range", "float32", "cancelling")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 64, 1000, None])
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_every_sum_is_the_exact_sum_rounded(kind, chunk, rounding):
    acc = Accumulation(chunk=chunk, rounding=rounding)
    a, b = operands(kind, G=1, M=2, N=3)
    with backends.without():
        assert torch.equal(accumulate(a, b, acc), modelled(a, b, acc))


@pytest.mark.parametrize(
    "format", ["fp8_152", "fp8_143", "fp8_e4m3fn", "fp4_e2m1", "fp4_r4_even", "binary16", "bfloat16", "int8", INT16]
)
def test_any_format_with_a_zero_can_accumulate(format):
    acc = Accumulation(format, chunk=5)
    for kind in ("int4", "fp16"):
        a, b = operands(kind, G=1, M=2, K=23, N=3)
        with backends.without():
            y = accumulate(a * 2, b, acc)
        assert torch.equal(y, modelled(a * 2, b, acc))
        assert set(y.flatten().tolist()) <= {*acc.format.grid, math.inf, -math.inf}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [3, 64, None])
def test_stochastic_sums_follow_the_documented_words(kind, chunk):
    acc = Accumulation(chunk=chunk, rounding="stochastic")
    a, b = operands(kind, M=2, K=21, N=3)
    with backends.without():
        assert torch.equal(accumulate(a, b, acc, key=99), modelled(a, b, acc, key=99))
        if kind == "float32":
            assert not torch.equal(accumulate(a, b, acc, key=99), accumulate(a, b, acc, key=100))


def test_float32_rounding_before_the_format_s_changes_nothing():
    """1 + (2^-10 + 2^-30) lies above the midpoint of 1 and 1 + 2^-9, but is that midpoint in float32, and would go to 1."""
    a = torch.tensor([1.0, 2.0**-10 + 2.0**-30]).view(1, 1, 2)
    for sign in (1.0, -1.0):
        y = accumulate(a, sign * torch.ones(1, 2, 1), Accumulation())
        assert float(y) == sign * (1 + 2.0**-9)
    below = torch.tensor([1 + 2.0**-9, 2.0**-10 - 2.0**-31]).view(1, 1, 2)
    assert float(accumulate(below, torch.ones(1, 2, 1), Accumulation())) == 1 + 2.0**-9


def test_swamping_stops_a_long_chain_and_chunks_prevent_it():
    ones = torch.ones(1, 1, 4096)
    assert float(accumulate(ones, ones.mT, Accumulation(chunk=None))) == 1024  # 1024 + 1 is a tie: to even
    assert float(accumulate(ones, ones.mT, Accumulation(chunk=64))) == 4096


def test_stochastic_sums_are_right_on_average():
    """Each addition errs by less than the gap G of the grid, with mean zero whatever came before (exact sums in float32): by
    Azuma and Hoeffding the mean of n chains of K additions errs by more than G sqrt(K ln(2 / d) / (2 n)) with probability d."""
    K, n, d = 2000, 4096, 1e-9
    a = torch.full((1, 1, K), 0.75)
    for chunk in (None, 64):
        y = accumulate(a, torch.ones(1, K, n), Accumulation(chunk=chunk, rounding="stochastic"), key=5)
        gap, num_additions = 2.0, K + (K // 64 + 1 if chunk else 0)  # sums stay below 2048
        assert float(y.max()) < 2048
        bound = gap * math.sqrt(num_additions * math.log(2 / d) / (2 * n))
        assert abs(float(y.double().mean()) - 0.75 * K) < bound < 5
    assert float(accumulate(a, torch.ones(1, K, 1), Accumulation(chunk=None))) < 0.75 * K / 1.4


def test_one_stochastic_addition_goes_up_for_exactly_its_share_of_words():
    """512.25 + 2^-k has a quarter, and so on, of the words: counted over one stream, and compared with the stream itself."""
    n = 1 << 14
    a, b = torch.tensor([[[512.0, 0.25]]]), torch.ones(1, 2, n)
    y = accumulate(a, b, Accumulation(chunk=None, rounding="stochastic"), key=3)
    u = (random_words(3, (n, 4))[:, 1] >> 8) & 0xFFFFFF  # K + 1 additions, made even: 4
    assert torch.equal(y.flatten() == 513, u < 2**22)


def test_nan_and_infinity_pass_and_numbers_beyond_the_range_saturate():
    nan, inf = math.nan, math.inf
    largest = formats.FP16_169.max
    for rounding in Rounding:
        acc = Accumulation(chunk=3, rounding=rounding)

        def total(*terms: float, acc: Accumulation = acc) -> float:
            return float(accumulate(torch.tensor([[terms]]), torch.ones(1, len(terms), 1), acc, key=0))

        assert math.isnan(total(1.0, nan, 2.0, 3.0)) and math.isnan(total(inf, 1.0, 1.0, -inf))
        assert total(1.0, inf, 2.0, 3.0) == inf and total(1.0, 2.0, 3.0, -inf) == -inf
        assert total(3e38, 1.0) == largest and total(largest, largest, -largest) == 0.0
        assert total(largest, largest, 0.0, largest) == largest
    assert total(*[-largest] * 5) == -largest
    binary16 = Accumulation("binary16", chunk=2)
    assert total(60000.0, 60000.0, -60000.0, acc=binary16) == inf


def test_nothing_to_add_gives_zero_and_no_chain_gives_minus_zero():
    for acc in (Accumulation(), Accumulation(chunk=None), Accumulation(rounding="stochastic")):
        y = accumulate(torch.ones(2, 3, 0), torch.ones(2, 0, 4), acc, key=1)
        assert y.shape == (2, 3, 4) and not y.any()
        for shape in ((0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 5, 0)):
            G, M, K, N = shape
            assert accumulate(torch.ones(G, M, K), torch.ones(G, K, N), acc, key=1).shape == (G, M, N)
        zero = accumulate(torch.tensor([[[-1.0, 1e-30]]]), torch.tensor([[[0.0], [-1e-30]]]), acc, key=1)
        assert zero.view(torch.int32).tolist() == [[[0]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 0}, "1 or more, or None"),
        ({"chunk": 2.5}, "whole number"),
        ({"rounding": "up"}, "one of 'nearest', 'stochastic', 'truncate'"),
        ({"format": "e8m0"}, "has no zero"),
        ({"format": "fp17"}, "unknown format"),
    ],
)
def test_bad_accumulations_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        Accumulation(**arguments)
    assert "\n" not in str(error.value)


def test_stochastic_sums_without_a_key_are_refused():
    with pytest.raises(UserError, match="pass key="):
        accumulate(torch.ones(1, 1, 2), torch.ones(1, 2, 1), Accumulation(rounding="stochastic"))
