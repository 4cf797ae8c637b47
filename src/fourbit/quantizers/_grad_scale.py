"""Scales of gradients: GradScale's power of two per layer, one scale in the loss, and what a layer remembers of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, overload

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.quantizers._scaling import Scaling
from fourbit.quantizers._scaling_state import Pass, ScalingState, Stored
from fourbit.quantizers._statistics import Statistics
from fourbit.quantizers._tiles import Granularity

UNSET = -(2**31)
"""Exponent of a GradScale that has not seen a gradient."""

_EXPONENT_LIMIT = 100
"""Exponents stay in [-100, 100]: 2^100 lifts the smallest normal float32 gradients, and its reciprocal is still normal."""


def is_exponent(exponent: Tensor) -> Tensor:
    """Where it is a number that a GradScale can have: an integer in [-100, 100]."""
    return (exponent.abs() <= _EXPONENT_LIMIT) & (exponent == exponent.round())


def exponent_scale(exponent: Tensor) -> Tensor:
    """2^exponent in float32, an average of exponents rounded to an integer; 1 where UNSET."""
    if exponent.is_cpu and exponent.dim() == 0:  # the host is faster than torch with one number
        return torch.scalar_tensor(_power(exponent), dtype=torch.float32)
    return torch.exp2(torch.where(exponent == UNSET, 0, exponent).to(torch.float32).round())


def _power(exponent: Tensor) -> float:
    """The same of one exponent, on the host."""
    k = round(exponent.item())
    return 1.0 if k == UNSET else math.ldexp(1.0, k)


class LargestGradient(ScalingState):
    """What LossScaled remembers.

    Tensors:
        amax: largest gradient since the loss scale, or the exponent that it was scaled by, last moved; -1 where there was none.
    """

    amax = Stored()

    def tensors(self, format: Format) -> dict[str, Tensor]:
        """As above."""
        return {"amax": torch.full(self.shape, -1.0, dtype=torch.float32)}

    def see(self, amax: Tensor, now: Pass) -> Tensor | None:
        """Takes note."""
        if now.training:
            self._note(amax)
        return None

    def _note(self, amax: Tensor | float) -> None:
        noted = self.amax
        if isinstance(amax, Tensor):
            noted.copy_(torch.maximum(noted, amax))
        elif amax > noted.item() or math.isnan(amax):
            noted.fill_(amax)

    def fullness(self) -> float:
        """amax / max, once."""
        found = float(self.amax.max()) / self.scaling.max
        self.amax.fill_(-1.0)
        return found

    def votes(self) -> list[Tensor]:
        """amax."""
        return [self.amax]

    def agree(self, votes: list[Tensor], decisions: list[Tensor] | None) -> bool:
        """The largest of all processes."""
        self.amax.copy_(votes[0].amax(0))
        return True


class ExponentState(LargestGradient):
    """What GradScale remembers.

    One vote per backward pass: backward only notes the largest gradient, over all uses of the layer; the exponent moves at the
    next training forward outside a backward pass. So every use of a shared layer sees one scale, and recomputation under
    gradient checkpointing changes nothing.

    Tensors:
        exponent: log2 of the multiplier, UNSET before the first gradient; a number that is no exponent, as an average with
            UNSET, counts as UNSET.
        amax: largest gradient, scaled, since the exponent last moved; -1 where there was none.
    """

    exponent = Stored()
    scaling: GradScale

    def tensors(self, format: Format) -> dict[str, Tensor]:
        """As above."""
        self._is_known = False  # whether every exponent is set; a cache
        init = self.scaling.init
        exponent = torch.full(self.shape, UNSET if init is None else init, dtype=torch.float32)
        return {"exponent": exponent, **super().tensors(format)}

    def begin(self, now: Pass) -> None:
        """The exponent moves as the last backward pass has voted."""
        if not now.training:
            return
        amax, exponent, scaling = self.amax, self.exponent, self.scaling
        self._look()
        if exponent.is_cpu and exponent.dim() == 0:  # a few scalars: the host is faster
            if vote := scaling.vote(amax.item()):
                exponent.fill_(scaling.step(round(exponent.item()), vote))
        else:
            exponent.copy_(scaling.step(exponent, scaling.vote(amax)))
        amax.fill_(-1.0)

    def see(self, amax: Tensor, now: Pass) -> Tensor | None:
        """Sets the first exponent. A backward pass in evaluation mode takes its exponent from the gradient at hand and leaves
        the layer's alone."""
        exponent, share, largest = self.exponent, now.share_of("g"), amax
        if share is not None and not self.is_known:
            largest = share.largest(amax)
        first = self.scaling.first_exponent(largest)
        if now.training:
            exponent.copy_(torch.where(exponent == UNSET, first, exponent))
            self._note(amax * exponent_scale(exponent))
            self._is_known = self._is_known or not bool((exponent == UNSET).any())
        else:
            exponent = first
        if exponent.dim():  # a channel without gradients yet must not stand out: it takes the smallest scale
            exponent = torch.where(exponent == UNSET, exponent.max(), exponent)
        return exponent

    def saw(self, amax: Tensor | float, now: Pass) -> None:
        """Takes note, as the exponent scales it."""
        exponent = self.exponent
        if isinstance(amax, Tensor) or exponent.dim():
            self._note(amax * exponent_scale(exponent))
        else:
            self._note(amax * _power(exponent))

    @property
    def stored(self) -> Tensor | None:
        """The exponent."""
        return self.exponent

    @property
    def is_known(self) -> bool:
        """Whether every exponent is set."""
        self._look()
        return self._is_known

    def _look(self) -> None:
        """One that is no exponent becomes UNSET."""
        if not self._is_known:
            exponent = self.exponent
            with torch.no_grad():
                exponent.copy_(torch.where(is_exponent(exponent), exponent, UNSET))
            self._is_known = not bool((exponent == UNSET).any())

    def awaits(self, now: Pass) -> bool:
        """Whether an exponent is unset."""
        return now.training and not self.is_known

    def decisions(self) -> list[Tensor]:
        """The exponents."""
        return [self.exponent]

    def agree(self, votes: list[Tensor], decisions: list[Tensor] | None) -> bool:
        """The smallest first exponent. The largest gradient of the processes that voted as the sum of the votes says; -1 (no
        vote) if none did."""
        amax = votes[0] if decisions is None else _rescaled(votes[0], decisions[0])
        of_each = self.scaling.vote(amax)
        super().agree([torch.where(of_each == of_each.sum(0).sign(), amax, -1.0)], None)
        if decisions is not None:
            self.exponent.copy_(_smallest(decisions[0]))
            self._is_known = not bool((self.exponent == UNSET).any())
        return self._is_known

    def reload(self) -> None:
        """Read the exponents again."""
        self._is_known = False

    def numbers(self) -> dict[str, float | int | None]:
        """The exponent, the median over channels where they have their own."""
        known = self._known()
        return {"exponent": int(torch.median(known)) if known.numel() else None}

    def __str__(self) -> str:
        known = self._known()
        low, high = (int(known.min()), int(known.max())) if known.numel() else (0, 0)
        power = f"2^{low}" if low == high else f"2^{low} to 2^{high}"
        return f"g times {power}" if known.numel() else "g not scaled yet"

    def _known(self) -> Tensor:
        return self.exponent[self.exponent != UNSET]


def _smallest(exponents: Tensor) -> Tensor:
    """The smallest of several processes' exponents, along the first axis; UNSET where none has one."""
    unset = exponents == UNSET
    return torch.where(unset.all(0), UNSET, torch.where(unset, math.inf, exponents).amin(0))


def _rescaled(amax: Tensor, exponents: Tensor) -> Tensor:
    """Largest gradients of several processes, each scaled by its own exponent, as the one they agree on scales them."""
    known = (exponents != UNSET) & (amax > 0)
    return torch.where(known, amax * torch.exp2(torch.where(known, _smallest(exponents) - exponents, 0.0)), amax)


@dataclass(frozen=True)
class GradScale(Scaling):
    """One power of two per layer: g is multiplied by 2^exponent before both backward GEMMs, their results divided by it.

    Each backward pass casts a vote from amax = max|2^exponent g|:

        0 for amax in (max/2, max],   +1 in (0, max/2],   -1 above max

    and the exponent moves by the vote. The first gradient sets the exponent outright. Departures from the paper, where it
    is silent: an all-zero gradient votes 0 (the paper's rule would double the scale for ever), a non-finite one votes 0,
    exponents are clamped to [-100, 100].

    Args:
        max: MAX of the paper, 64: the largest magnitude of the even grid. A power of two.
        init: first exponent; None takes it from the first gradient.

    Source: Sun et al., NeurIPS 2020, Fig. 3a.
    """

    state_class: ClassVar[type[ScalingState] | None] = ExponentState
    operands: ClassVar[str] = "g"
    is_power_of_two: ClassVar[bool] = True
    max: float = 64.0
    init: int | None = None

    def objection(self, granularity: Granularity) -> str:
        """One exponent for the tensor, or for each channel."""
        if granularity in ("tensor", "channel"):
            return ""
        return f"{self} keeps one exponent per layer or channel: use granularity='tensor' or 'channel'"

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """2^-exponent."""
        if stored is None:
            raise UserError("GradScale needs its exponent: use it in a layer, or pass stored=exponent")
        return exponent_scale(stored).reciprocal()

    def first_exponent(self, amax: Tensor) -> Tensor:
        """The exponent k with 2^k amax in (max/2, max]; UNSET where amax is 0 or not finite. int32, shape of amax."""
        ratio = self.max / amax.double()
        exponent = torch.frexp(ratio).exponent - 1
        known = (amax > 0) & amax.isfinite()
        limited = exponent.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT)
        return torch.where(known, limited, UNSET).to(torch.int32)

    @overload
    def vote(self, amax: float) -> int: ...

    @overload
    def vote(self, amax: Tensor) -> Tensor: ...

    def vote(self, amax: Tensor | float) -> Tensor | int:
        """The vote of a scaled amax: in {-1, 0, 1}, int32 in the shape of amax. NaN, infinity and 0 vote 0."""
        up = (amax > 0) & (amax <= self.max / 2)
        down = (amax > self.max) & (amax < math.inf)
        if isinstance(up, Tensor) and isinstance(down, Tensor):
            return up.to(torch.int32) - down.to(torch.int32)
        return int(up) - int(down)

    @overload
    def step(self, exponent: int, votes: int) -> int: ...

    @overload
    def step(self, exponent: Tensor, votes: Tensor) -> Tensor: ...

    def step(self, exponent: Tensor | int, votes: Tensor | int) -> Tensor | int:
        """exponent + sign(votes), clamped; UNSET stays. `votes` may be a sum over workers."""
        if isinstance(exponent, Tensor) and isinstance(votes, Tensor):
            moved = (exponent.round() + votes.sign()).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT)
            return torch.where(exponent == UNSET, exponent, moved).to(torch.int32)
        if exponent == UNSET:
            return UNSET
        return int(min(max(exponent + (votes > 0) - (votes < 0), -_EXPONENT_LIMIT), _EXPONENT_LIMIT))

    def __str__(self) -> str:
        return f"GradScale {self.max:g}"


@dataclass(frozen=True)
class LossScaled(Scaling):
    """scale = 1: one scale for all layers, multiplied into the loss (`LossScaler`). The baseline of the paper's Fig. 3.

    Args:
        max: gradients above it count as overflow and make `LossScaler` halve the loss scale.
    """

    state_class: ClassVar[type[ScalingState] | None] = LargestGradient
    operands: ClassVar[str] = "g"
    needs_loss_scale: ClassVar[bool] = True
    max: float = 64.0

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """1."""
        return torch.ones((), dtype=torch.float32, device=statistics.x.device)

    def __str__(self) -> str:
        return "loss scale"
