"""Sums as hardware with a narrow accumulator takes them: rounded after every addition, in chunks.

    s = 0;  for each term p of a chunk:  s = round(s + p)
    y = 0;  for each chunk:              y = round(y + s)

A product of K terms in 16 bits loses what it adds once the sum has grown: with 9 mantissa bits, a term below 2^-10 of the
sum vanishes ("swamping"). Chunks keep both the sums of terms and the number of chunk sums short (Wang et al., Training Deep
Neural Networks with 8-bit Floating Point Numbers, NeurIPS 2018: chunks of 64, FP16 1-6-9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.backends import Operation
from fourbit.errors import UserError
from fourbit.formats import FP16_169, Format, get
from fourbit.quantizers import Rounding, round_to_format, words_at


@dataclass(frozen=True)
class Accumulation:
    """How the sums of a matrix product are taken: in which format, in chunks of how many terms, with which rounding.

    Args:
        format: a Format with a zero, or the name of one; every sum is rounded to it.
        chunk: terms per chunk; None adds all terms one after another.
        rounding: a `Rounding` or its value: "nearest", "stochastic" or "truncate".

    Raises:
        UserError: a format without zero, a chunk below 1, or an unknown rounding.

    >>> print(Accumulation())
    fp16_169 after every addition, chunks of 64
    >>> print(Accumulation(chunk=None, rounding="stochastic"))
    fp16_169 after every addition, no chunks, stochastic
    """

    format: Format = FP16_169
    chunk: int | None = 64
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get(self.format))
        if 0.0 not in self.format.grid:
            raise UserError(f"accumulation in {self.format.name} has no zero to start from: use a format with a zero")
        if self.chunk is not None and (
            not isinstance(self.chunk, int) or isinstance(self.chunk, bool) or self.chunk < 1
        ):
            raise UserError(
                f"chunk must be a whole number of terms, 1 or more, or None for no chunks, not {self.chunk!r}"
            )
        try:
            object.__setattr__(self, "rounding", Rounding(self.rounding))
        except ValueError:
            names = ", ".join(repr(r.value) for r in Rounding)
            raise UserError(f"rounding must be one of {names}, not {self.rounding!r}") from None

    @property
    def stochastic(self) -> bool:
        """Whether it needs random words."""
        return self.rounding is Rounding.STOCHASTIC

    def __str__(self) -> str:
        parts = [f"{self.format.name} after every addition", f"chunks of {self.chunk}" if self.chunk else "no chunks"]
        if self.rounding is not Rounding.NEAREST:
            parts.append(self.rounding.value)
        return ", ".join(parts)


def accumulate(a: Tensor, b: Tensor, accumulation: Accumulation, key: int | None = None) -> Tensor:
    """Matrix products y[g, m, n] = sum over k of a[g, m, k] b[g, k, n], rounded after every addition.

    Products are taken in float32: exact for all formats with at most 11 mantissa bits. Each sum is the exact sum of two
    numbers rounded to the format; stochastic rounding goes by the float32 sum, so a term below 2^-25 of it has no chance.

    Args:
        a, b: [G, M, K] and [G, K, N], any floating dtype.
        key: stream key of the random words, for stochastic rounding. With C chunks and e the index of the result element,
            in order, the addition of term k draws word e * A + k and that of the sum of chunk c word e * A + K + c, where
            A is K + C made even.

    Returns:
        [G, M, N], float32, on the grid of the format, never -0. Numbers beyond its range saturate, or become infinite where
        its `overflow` says so. NaN and infinity in a or b stay what they are, as in any sum. Zero where K is 0.

    Raises:
        UserError: stochastic rounding without a key.

    >>> ones = torch.ones(1, 1, 4096)
    >>> [float(accumulate(ones, ones.mT, Accumulation(chunk=chunk))) for chunk in (64, None)]
    [4096.0, 1024.0]
    """
    if accumulation.stochastic and key is None:
        raise UserError("stochastic accumulation needs a key: pass key=stream_key(seed, ...)")
    a, b = a.detach().to(torch.float32), b.detach().to(torch.float32)
    found = ACCUMULATE(a, b, accumulation, key)
    return found if found is not None else _reference(a, b, accumulation, key)


ACCUMULATE: Operation[[Tensor, Tensor, Accumulation, int | None], Tensor] = Operation(
    "accumulate", reference="ops._accumulation._reference"
)
"""[G, M, K] times [G, K, N] in float32, to [G, M, N] with rounded sums."""


def _reference(a: Tensor, b: Tensor, accumulation: Accumulation, key: int | None) -> Tensor:
    """All chunks at once, term by term."""
    G, M, K = a.shape
    N = b.shape[2]
    chunk = min(accumulation.chunk or K, K)
    num_chunks = -(-K // chunk) if chunk else 0
    # A term 0 changes no sum, so the last chunk is filled up with them.
    fill = num_chunks * chunk - K
    a_GMCk = torch.nn.functional.pad(a, (0, fill)).view(G, M, num_chunks, chunk)
    b_GCkN = torch.nn.functional.pad(b, (0, 0, 0, fill)).view(G, num_chunks, chunk, N)
    add = _Adder(accumulation, key, G * M * N, K + num_chunks, a.device)
    first = torch.arange(num_chunks, device=a.device) * chunk
    s_CGMN = a.new_zeros(num_chunks, G, M, N)
    for k in range(chunk):
        products = a_GMCk[..., k].permute(2, 0, 1).unsqueeze(-1) * b_GCkN[:, :, k].transpose(0, 1).unsqueeze(2)
        s_CGMN = add(s_CGMN, products, first + k)
    y_GMN = a.new_zeros(G, M, N)
    for c in range(num_chunks):
        y_GMN = add(y_GMN, s_CGMN[c], torch.tensor(K + c, device=a.device))
    return y_GMN


class _Adder:
    """round(s + p), for the sums of many chains at once."""

    def __init__(self, accumulation: Accumulation, key: int | None, num_chains: int, num_additions: int, device):
        self.accumulation, self.key = accumulation, key
        self.starts = torch.arange(num_chains, device=device) * (num_additions + num_additions % 2)

    def __call__(self, s: Tensor, p: Tensor, addition: Tensor) -> Tensor:
        """`addition`: its index in each chain, one number, or one for each entry of the first axis."""
        format, rounding = self.accumulation.format, self.accumulation.rounding
        if rounding is not Rounding.STOCHASTIC:
            total, words = _add_odd(s, p), None
        else:
            assert self.key is not None
            total = s + p
            words = words_at(self.key, (addition.unsqueeze(-1) + self.starts).view(total.shape))
        return torch.where(total.isinf(), total, round_to_format(total, format, rounding, words))


def _add_odd(s: Tensor, p: Tensor) -> Tensor:
    """s + p in float32 with the last bit set unless the sum is exact (rounding to odd).

    Rounding that once more, to a format of 22 bits or fewer, gives what rounding the exact sum would (Boldo and Melquiond,
    Emulation of a FMA and correctly rounded sums, IEEE Transactions on Computers, 2008).
    """
    total = s + p
    q = total - s
    error = (s - (total - q)) + (p - q)  # exact: Knuth's two-sum
    bits = total.view(torch.int32)
    outward = (error < 0) == (total < 0)
    inexact = total.isfinite() & (error != 0) & (bits & 1 == 0)
    return torch.where(inexact, torch.where(outward, bits + 1, bits - 1), bits).view(torch.float32)
