"""Random words: reproducible, different where any coordinate differs, and statistically sound."""

from __future__ import annotations

import torch

from fourbit import formats
from fourbit.quantizers import Amax, QuantSpec, Rounding, mix64, quantize, random_words, stream_key


def test_words_are_those_of_splitmix64():
    """The published generator, seeded with 0: first outputs of SplitMix64."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    words = random_words(0, (6,)).view(torch.int64)
    assert [w & (2**64 - 1) for w in words.tolist()] == first
    assert mix64(0x9E3779B97F4A7C15) == first[0]


def test_words_depend_on_key_and_position_alone():
    assert torch.equal(random_words(7, (4, 5)).flatten(), random_words(7, (20,)))
    assert torch.equal(random_words(7, (20,))[:7], random_words(7, (7,)))
    assert not torch.equal(random_words(7, (20,)), random_words(8, (20,)))


def test_every_coordinate_changes_the_stream():
    keys = {stream_key(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(keys) == 512
    assert stream_key(1, 2) != stream_key(2, 1) != stream_key(2, 1, 0)


def test_every_bit_of_the_words_is_fair_and_neighbors_are_uncorrelated():
    n = 1 << 16
    words = random_words(stream_key(1, 2, 3), (n,))
    bits = (words.unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / n**0.5).all()
    u = ((words >> 8) & 0xFFFFFF).double() / 2**24 - 0.5
    for lag in (1, 2, 3, 64):
        assert abs(float((u[lag:] * u[:-lag]).mean()) * 12) < 5 / n**0.5
    neighbor = ((random_words(stream_key(1, 2, 4), (n,)) >> 8) & 0xFFFFFF).double() / 2**24 - 0.5
    assert abs(float((u * neighbor).mean()) * 12) < 5 / n**0.5


def test_averaging_samples_halves_the_variance_and_keeps_the_mean():
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 64
    one = QuantSpec(formats.FP4_R2, Amax(), rounding=Rounding.STOCHASTIC)
    two = QuantSpec(formats.FP4_R2, Amax(), rounding=Rounding.STOCHASTIC, samples=2)
    e1 = quantize(x, one, key=1).dequantize() - x
    e2 = quantize(x, two, key=1).dequantize() - x
    assert 0.45 < float(e2.var() / e1.var()) < 0.55
    assert abs(float(e1.mean())) < 5 * float(e1.std()) / len(x) ** 0.5
