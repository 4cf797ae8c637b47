"""Random words as a function of (seed, step, layer, slot): counter-based, the same on every device, replayable.

Word pair i of a stream is SplitMix64's output function applied to `key + (i + 1) * golden` (Steele, Lea and Flood, Fast
Splittable Pseudorandom Number Generators, OOPSLA 2014): no generator state, so a resumed run draws the same words, and a
test can ask for any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix64(value: int) -> int:
    """SplitMix64's finalizer on one 64-bit integer: a bijection in which every input bit reaches every output bit."""
    z = value & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def stream_key(*coordinates: int) -> int:
    """A 64-bit key for a tuple of integers, e.g. (seed, step, layer, slot, use); order matters.

    >>> stream_key(0, 1) != stream_key(1, 0)
    True
    """
    key = _GOLDEN
    for coordinate in coordinates:
        key = mix64((key ^ mix64((coordinate + _GOLDEN) & _MASK)) + _GOLDEN)
    return key


def random_words(key: int, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Uniform int32 words, one per element of `shape`, all 32 bits random; a pure function of `key` and position."""
    num = 1
    for size in shape:
        num *= size
    pairs = torch.arange((num + 1) // 2, dtype=torch.int64, device=device)
    return _pairs_at(key, pairs).view(torch.int32)[:num].view(shape)


def words_at(key: int, index: Tensor) -> Tensor:
    """The words of `random_words` at any positions, int64.

    >>> bool((words_at(7, torch.tensor([4, 1])) == random_words(7, (5,))[[4, 1]]).all())
    True
    """
    pairs = _pairs_at(key, index >> 1)
    return torch.where(index & 1 == 1, pairs >> 32, pairs).to(torch.int32)


def _pairs_at(key: int, pair: Tensor) -> Tensor:
    """Word pairs by index, as int64: the even word in the lower half."""
    z = (pair + 1).mul_(_signed(_GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
