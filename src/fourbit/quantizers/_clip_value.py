"""PACT's clip value: a learned number per operand, and what a layer remembers of it."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.formats import INT4_SYM, Format
from fourbit.quantizers._packed import has_integer_codes
from fourbit.quantizers._round import round_to_format
from fourbit.quantizers._scaling import TINY, Bound, Scaling, at_least_tiny, to_float32
from fourbit.quantizers._scaling_state import Pass, ScalingState, Stored, in_backward, is_shard
from fourbit.quantizers._share import Share
from fourbit.quantizers._statistics import Statistics, amax_of
from fourbit.quantizers._tiles import Granularity
from fourbit.quantizers._words import random_words, stream_key


class ClipState(ScalingState):
    """A clip value, and the form (signed or not) that the first batch decided.

    Tensors:
        alpha: [1], a Parameter, which FSDP can shard; 0 until a batch decides.
        form: [unsigned, signed]: 1 for the form that the first batch decided, both 0 before. In an average of state_dicts that
            began earlier, form and clip value are too small by one factor: their quotient counts.
        floor: half the clip value of the last training pass: what replaces one that an optimizer took to 0 or below.
    """

    alpha, form, floor = Stored(), Stored(), Stored()
    scaling: ClipValue

    def tensors(self, format: Format) -> dict[str, Tensor]:
        """As above."""
        clip = self.scaling
        self._signed: bool | None = None  # the form, where it is known; a cache
        self._trial: tuple[bool, float] | None = None  # form and clip value of the first pass without gradients
        self._is_fresh = False
        decided = clip.init is not None and (clip.signed_format is None or format.signed)
        form = torch.tensor([decided and not format.signed, decided and format.signed], dtype=torch.float32)
        alpha = nn.Parameter(form.sum(0, keepdim=True) * (clip.init or 0.0), requires_grad=clip.learned)
        return {"alpha": alpha, "form": form, "floor": alpha.detach() / 2}

    def begin(self, now: Pass) -> None:
        """A clip value that an optimizer took to zero or below becomes half of what it last was."""
        if not now.training or self.signed(now) is None:
            return
        alpha, floor = self.alpha.detach(), self.floor
        if not alpha.is_cpu:
            alpha.copy_(torch.where(alpha <= 0, floor, alpha))
            torch.mul(alpha, 0.5, out=floor)
            return
        value = alpha.item()
        if value <= 0:
            value = floor.item()
            alpha.fill_(value)
        floor.fill_(value / 2)

    def use(self, x: Tensor, format: Format, now: Pass) -> tuple[Format, Tensor | None]:
        """Format and alpha; the first training batch decides what is still open.

        A pass without gradients (a check before training, new statistics for batch normalization) decides for itself and those
        that follow, until a pass with gradients decides for good. If that is the recomputation of a pass without gradients
        inside a backward pass (checkpointing), it takes what the first pass took.
        """
        signed = self.signed(now)
        if signed is not None:
            return self._form(format, signed), self._value(now)
        clip, tried, usable, share = self.scaling, self._tried(now), True, now.share_of(self.operand)
        if tried is not None:
            signed, value = tried
        else:
            goes_negative = (x < 0).any()
            if share is not None:
                goes_negative = share.largest(goes_negative.to(torch.float32), x.numel()) > 0
            signed = format.signed or (clip.signed_format is not None and bool(goes_negative))
        format = self._form(format, signed)
        if tried is None:
            value = clip.init if clip.init is not None else best_clip_value(x, format, share=share)
            amax = amax_of(x) if share is None else share.largest(amax_of(x))
            usable = bool((amax > 0) & amax.isfinite())
        if now.training and usable and not now.with_gradients:
            self._trial = signed, value
        elif now.training and usable:
            self._decide(signed, value)
            self._is_fresh = True
            return format, self.alpha
        return format, torch.full((1,), value, dtype=torch.float32, device=x.device)

    def signed(self, now: Pass) -> bool | None:
        """PACT's form; None where no batch has decided yet. Read from the buffer once, as after a resume."""
        if self._signed is None:
            unsigned, signed = self.form.tolist()
            if not unsigned + signed > 0:
                return None
            if unsigned + signed != 1:
                if not now.training:
                    return signed >= unsigned
                self._decide(signed >= unsigned, float(self.alpha.detach()) / (unsigned + signed))
            self._signed = signed >= unsigned
        return self._signed

    def awaits(self, now: Pass) -> bool:
        """Whether the form is open."""
        return now.training and self.signed(now) is None and self._tried(now) is None

    def clip_ahead(self, format: Format, now: Pass) -> tuple[Format, Tensor] | None:
        """Once the form is decided, for packed integers."""
        signed = self.signed(now)
        if signed is None:
            return None
        format = self._form(format, signed)
        return (format, self._value(now)) if has_integer_codes(format) else None

    def settle(self) -> None:
        """The form that was just decided may be used in full."""
        self._is_fresh = False

    @property
    def is_fresh(self) -> bool:
        """Whether the form was decided by the pass whose backward pass is to come."""
        return self._is_fresh

    def format_of(self, format: Format, now: Pass) -> Format:
        """The signed form, where inputs go negative."""
        return self._form(format, bool(self.signed(now)))

    def _form(self, format: Format, signed: bool) -> Format:
        other = self.scaling.signed_format
        return other if signed and other is not None and not format.signed else format

    def _tried(self, now: Pass) -> tuple[bool, float] | None:
        """What a pass without gradients has found and what holds for this one."""
        return self._trial if now.training and (not now.with_gradients or in_backward()) else None

    def _decide(self, signed: bool, value: float) -> None:
        """Form and clip value, once for all."""
        form, floor = self.form, self.floor
        with torch.no_grad():
            form[0], form[1] = float(not signed), float(signed)
            floor.fill_(value / 2)
            self.write(torch.full_like(floor, value))
        self._signed, self._trial = signed, None

    def _value(self, now: Pass) -> Tensor:
        """The clip value in use, [1]."""
        alpha: Tensor = self.alpha
        if now.training:
            return alpha  # `begin` keeps it positive
        alpha, form, floor = alpha.detach(), self.form, self.floor
        if not alpha.is_cpu:
            return torch.where(alpha <= 0, floor, alpha) / form.sum()
        value, share = alpha.item(), sum(form.tolist())
        if share == 1 and not value <= 0:
            return self.alpha
        return (floor if value <= 0 else alpha) / share

    def decisions(self) -> list[Tensor]:
        """Form and clip value."""
        return [self.form, 2 * self.floor if is_shard(self.alpha) else self.alpha]

    def agree(self, votes: list[Tensor], decisions: list[Tensor] | None) -> bool:
        """Signed if any process saw a negative number, the clip value of the first that says so."""
        if decisions is None:
            return True
        forms, values = decisions
        known, signed = forms.sum(1) > 0, bool((forms[:, 1] > 0).any())
        says_so = known & ((forms[:, 1] > 0) == signed)
        if not says_so.any():
            return False
        self._decide(signed, float(values[int(says_so.to(torch.int8).argmax())]))
        return True

    def reload(self) -> None:
        """Read the form again."""
        self._signed, self._trial, self._is_fresh = None, None, False

    @classmethod
    def upgrade(cls, tensors: MutableMapping[str, Any], prefix: str) -> None:
        """Clip values were 0-d, and `signed` was -1 where none was decided, 0 unsigned, 1 signed."""
        alpha, signed = tensors.get(f"{prefix}alpha"), tensors.get(f"{prefix}signed")
        if alpha is not None and alpha.dim() == 0:
            tensors[f"{prefix}alpha"] = alpha = alpha.detach().view(1)
        if alpha is not None and signed is not None:
            del tensors[f"{prefix}signed"]
            form = torch.stack((signed == 0, signed == 1)).to(torch.float32)
            tensors[f"{prefix}form"] = form
            tensors[f"{prefix}alpha"] = alpha * form.sum()
            tensors[f"{prefix}floor"] = (alpha * form.sum()).abs() / 2

    def numbers(self) -> dict[str, float | int | None]:
        """alpha."""
        return {"alpha": self.alpha.item()}

    def __str__(self) -> str:
        unsigned, signed = self.form.tolist()
        decided = unsigned + signed > 0
        value = f"{self.alpha.item():.4g} ({'signed' if signed >= unsigned else 'unsigned'})"
        return f"alpha of {self.operand} {value if decided else 'not decided yet'}"


@dataclass(frozen=True)
class ClipValue(Scaling):
    """PACT: y = clip(x, 0, alpha), scale = alpha / format.max; signed formats clip to [-alpha, alpha].

    Gradients (straight-through): dx passes where 0 <= x < alpha (|x| < alpha), dalpha = sum of dx over x >= alpha, minus
    the sum over x <= -alpha in the signed form.

    Args:
        init: first alpha; None takes the alpha of least squared error on the first training batch.
        signed_format: the format used instead where the first training batch has negative inputs; None keeps the
            unsigned format always.
        learned: whether alpha is trained.

    Source: Choi et al., PACT, arXiv 1805.06085.
    """

    state_class: ClassVar[type[ScalingState] | None] = ClipState
    operands: ClassVar[str] = "xw"
    keeps_scale: ClassVar[bool] = True
    init: float | None = None
    signed_format: Format | None = INT4_SYM
    learned: bool = True

    @property
    def clips(self) -> bool:
        """Always."""
        return True

    def __post_init__(self) -> None:
        if self.init is not None and not self.init > 0:
            raise UserError(f"PACT's initial alpha must be positive, not {self.init}")

    def objection(self, granularity: Granularity) -> str:
        """One clip value for the tensor."""
        return "" if granularity == "tensor" else "PACT has one clip value per layer: use granularity='tensor'"

    def starting_at(self, bound: float, format: Format) -> tuple[Scaling, Format]:
        """The clip value is the bound, in the signed form."""
        return (self, format) if self.init is not None else (replace(self, init=bound), self.signed_format or format)

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """alpha / format.max."""
        value = _clip_value(stored)
        return (value / format.max).clamp_min(TINY) if isinstance(value, Tensor) else at_least_tiny(value / format.max)

    def bound(self, scale: Tensor, format: Format, stored: Tensor | None) -> Bound | None:
        """0 <= x < alpha, or |x| < alpha in the signed form."""
        return Bound("symmetric" if format.signed else "unsigned", _clip_value(stored))

    def __str__(self) -> str:
        text = "PACT" if self.learned else f"clip {self.init:g}" if self.init else "clip"
        return f"{text} ({self.signed_format.name} where inputs go negative)" if self.signed_format else text


def _clip_value(stored: Tensor | None) -> Tensor | float:
    """One number, 0-d; on the host, which is faster than torch with it, a float."""
    if stored is None:
        raise UserError("PACT needs a clip value: use it in a layer, or pass stored=alpha")
    if stored.numel() != 1:
        raise UserError(f"PACT's clip value must be one number, but has shape {tuple(stored.shape)}")
    if stored.is_cpu:
        return max(to_float32(float(stored)), TINY)
    return stored.detach().to(torch.float32).view(()).clamp_min(TINY)


def best_clip_value(
    x: Tensor, format: Format, num_candidates: int = 64, num_samples: int = 1 << 16, share: Share | None = None
) -> float:
    """The clip value that minimises sum (x - Q(x))^2 on (a random sample of) `x`, among fractions of max|x|.

    The sample is the same for every call with as many elements: positions come from `random_words`. (A regular one would
    meet the same column of every image.)

    With a `share`, `x` is this process's part of what the clip value is for.

    Returns 1.0 for an empty, all-zero or non-finite tensor.
    """
    x = x.detach().flatten().to(torch.float32)
    amax = float(amax_of(x) if share is None else share.largest(amax_of(x)))
    if not 0 < amax < float("inf"):
        return 1.0
    first, whole = (0, x.numel()) if share is None else (share.number * x.numel(), share.count * x.numel())
    if whole > num_samples:
        words = random_words(stream_key(num_samples), (num_samples,), x.device).to(torch.int64)
        places = (words & 0xFFFFFFFF) % whole - first
        x = x[places if share is None else places[(places >= 0) & (places < x.numel())]]
    alphas = [amax * i / num_candidates for i in range(1, num_candidates + 1)]
    errors = []
    for alpha in alphas:
        scale = alpha / format.max
        errors.append(float((round_to_format(x / scale, format) * scale - x).double().square().sum()))
    if share is not None:
        errors = share.total(torch.tensor(errors, dtype=torch.float64, device=x.device)).tolist()
    return min(zip(errors, alphas, strict=True))[1]
