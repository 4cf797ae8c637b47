"""Rotations of both operands of a product along the axis that it sums over: the product stays, outliers spread.

    a b^T = (a D H) (b D H)^T       H orthogonal, D a diagonal of signs, in blocks along the summed axis

Source: for training in 4 bits, Xi et al., NeurIPS 2023; random signs, Tseng et al., arXiv 2502.20586.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.errors import UserError
from fourbit.quantizers._words import random_words, stream_key

Signs = Literal["none", "fixed", "fresh"]


@dataclass(frozen=True)
class Hadamard:
    """Blocks of `size` neighbours times H / sqrt(size), H Sylvester's matrix of +-1.

    The float32 operations, in order: times the signs; for half = 1, 2, 4, .. size / 2 the pairs (a, b) that lie `half` apart
    become (a + b, a - b); times float32(1 / sqrt(size)).

    Args:
        size: a power of two, 2 to 1024.
        signs: "none"; "fixed": +-1 drawn once from `seed`; "fresh": drawn for each product of each step, the same for both
            operands. Or the signs themselves, `size` numbers +-1.
        seed: of the fixed signs.

    >>> Hadamard(4).apply(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    size: int
    signs: Signs | tuple[int, ...] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        size, signs = self.size, self.signs
        if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= 1024 or size & (size - 1):
            raise UserError(f"a Hadamard transform needs a size that is a power of two from 2 to 1024, not {size!r}")
        if isinstance(signs, (tuple, list)):
            object.__setattr__(self, "signs", tuple(signs))
            if len(signs) != size or any(s not in (-1, 1) for s in signs):
                raise UserError(f"the signs of a Hadamard transform of {size} are {size} numbers, each 1 or -1")
        elif signs not in ("none", "fixed", "fresh"):
            raise UserError(f"signs must be 'none', 'fixed', 'fresh' or a tuple of 1 and -1, not {signs!r}")

    @property
    def is_fresh(self) -> bool:
        """Whether the signs change from step to step."""
        return self.signs == "fresh"

    def require_divides(self, length: int, what: str) -> None:
        """Reject an axis that is not whole blocks.

        Raises:
            UserError: with the largest size that would do.
        """
        if length % self.size:
            fits = length & -length
            remedy = f"use {min(fits, 1024)}" if fits > 1 else "leave the transform out here"
            raise UserError(
                f"a Hadamard transform of {self.size} does not divide the {length} numbers that {what}: {remedy}"
            )

    def apply(self, t: Tensor, key: int | None = None) -> Tensor:
        """t D H along the last axis, float32; zeros are added where the last block is not full.

        Args:
            key: of the fresh signs.
        """
        return self._mixed(self._signed(_padded(t.to(torch.float32), self.size), key))

    def undo(self, t: Tensor, key: int | None = None) -> Tensor:
        """The inverse: t H D along the last axis, float32."""
        return self._signed(self._mixed(_padded(t.to(torch.float32), self.size)), key)

    def _signed(self, t: Tensor, key: int | None) -> Tensor:
        signs = self.signs_for(t.device, key)
        return t if signs is None else (t.unflatten(-1, (-1, self.size)) * signs).flatten(-2)

    def signs_for(self, device: torch.device, key: int | None) -> Tensor | None:
        """The signs of a block, float32; None: all 1."""
        if self.signs == "none":
            return None
        if isinstance(self.signs, tuple):
            return torch.tensor(self.signs, dtype=torch.float32, device=device)
        if self.is_fresh and key is None:
            raise UserError("a Hadamard transform with fresh signs needs a key: pass key=stream_key(seed, ...)")
        words = random_words(
            stream_key(self.seed, self.size) if key is None or not self.is_fresh else key, (self.size,), device
        )
        return 1.0 - 2.0 * (words & 1).to(torch.float32)

    def _mixed(self, t: Tensor) -> Tensor:
        shape = t.shape
        half = 1
        while half < self.size:
            a, b = t.reshape(*shape[:-1], -1, 2, half).unbind(-2)
            t = torch.stack((a + b, a - b), -2)
            half *= 2
        return t.reshape(shape) * torch.tensor(1.0 / math.sqrt(self.size), dtype=torch.float32, device=t.device)

    def __str__(self) -> str:
        kind = {"none": "", "fixed": ", fixed signs", "fresh": ", fresh signs"}
        signs = ", given signs" if isinstance(self.signs, tuple) else kind[self.signs]
        return f"Hadamard {self.size}{signs}"


class Rotation(NamedTuple):
    """A transform, and the key of its signs where they are fresh."""

    transform: Hadamard
    key: int | None

    def apply(self, t: Tensor) -> Tensor:
        """Along the last axis, float32."""
        return self.transform.apply(t, self.key)


def _padded(t: Tensor, size: int) -> Tensor:
    missing = -t.shape[-1] % size
    return F.pad(t, (0, missing)) if missing else t
