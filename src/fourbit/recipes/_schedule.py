"""Precision that changes over time: a recipe's phases, and what carries them out.

Which layer has which operands at a step follows from the number of the step, and from what was decided at events, which
`Scheduler.state_dict` has; so a run that is resumed, or repeated, does what it would have done. What a layer remembers (clip
values, exponents) stays through all phases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.nn import StepHooks, Upkeep, quantized_layers
from fourbit.ops import OPERANDS, SLOTS, LayerSpec

GEMMS = tuple(OPERANDS)


@dataclass(frozen=True)
class GradientNoise:
    """The event that the gradient has sunk into the noise of its own rounding:

        |g| < ratio * sigma_q * sqrt(d)

    g is the gradient of all d parameters, with the products of the phase in full precision; sigma_q is the standard
    deviation of an element of q - g, where q is the gradient of the same batch as it is quantized now. So
    sigma_q sqrt(d) is measured as |q - g|: two backward passes more, every so many steps.

    Args:
        every: steps from one measurement to the next.
        ratio: the paper's sqrt(3).

    Source: Chmiel et al., FP4 All the Way, arXiv 2505.19115.
    """

    every: int = 100
    ratio: float = math.sqrt(3)

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.ratio < math.inf:
            raise UserError(f"gradient noise is measured every 1 or more steps, with a ratio above 0, not {self}")

    def happened(self, exact: Iterable[Tensor], quantized: Iterable[Tensor]) -> bool:
        """Whether it has, from gradients of the same weights and batch."""
        pairs = [(a.double(), b.double()) for a, b in zip(exact, quantized, strict=True)]
        norm = math.sqrt(sum(float(a.square().sum()) for a, _ in pairs))
        noise = math.sqrt(sum(float((b - a).square().sum()) for a, b in pairs))
        return norm < self.ratio * noise


@dataclass(frozen=True)
class Rate:
    """The learning rate in a phase, as a share of the base rate: up in a straight line, then down to 0 at the end of training.

        step i of n:   (i + 1) / w   for i < w,   then with t = (i - w) / (n - w)   (1 + cos(pi t)) / 2   or   1 - t

    Args:
        warmup: w, a number of steps, or a share of the steps of the phase (below 1).
        shape: "cosine" or "linear".

    >>> [round(Rate(0.5, "linear").at(i, 8), 2) for i in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    warmup: float
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if not (self.warmup >= 0 and (self.warmup < 1 or self.warmup == int(self.warmup))):
            raise UserError(f"warmup is a number of steps, or a share below 1, not {self.warmup!r}")
        if self.shape not in ("cosine", "linear"):
            raise UserError(f"a learning rate falls by 'cosine' or 'linear', not {self.shape!r}")

    def at(self, step: int, steps: int) -> float:
        """The share at a step of the phase (0: its first) of `steps`."""
        warmup = min(round(self.warmup * steps) if self.warmup < 1 else int(self.warmup), steps)
        if step < warmup:
            return (step + 1) / warmup
        t = (step - warmup) / max(1, steps - warmup)
        return (1 + math.cos(math.pi * t)) / 2 if self.shape == "cosine" else 1 - t

    def __str__(self) -> str:
        up = f"{self.warmup:.0%} of the phase".replace("%", " %") if self.warmup < 1 else f"{self.warmup:g} steps"
        return f"learning rate up over {up}, then down ({self.shape})"


@dataclass(frozen=True)
class Phase:
    """From a moment on, some products or operands are in full precision, until the next phase begins.

    Args:
        start: a fraction of the training, above 0 and below 1; or the number of optimizer steps before it, 1 or more; or an
            event, in the last phase of a recipe.
        high: names of products ("fprop", "dgrad", "wgrad": both of their operands) and of slots ("x_fprop").
        rate: the learning rate in it; None: as without phases.

    Raises:
        UserError: a start that is none, or an unknown name.

    >>> print(Phase(0.82, ("fprop",)))
    from 82 % of the steps on: fprop in full precision
    """

    start: float | GradientNoise
    high: tuple[str, ...]
    rate: Rate | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "high", tuple(self.high))
        whole = isinstance(self.start, int) and not isinstance(self.start, bool) and self.start >= 1
        event = isinstance(self.start, GradientNoise)
        if not (whole or event or (isinstance(self.start, float) and 0 < self.start < 1)):
            raise UserError(
                f"a phase starts at a fraction of the training between 0 and 1, or after 1 or more steps, not at {self.start!r}"
            )
        for name in self.high:
            if name not in (*GEMMS, *SLOTS):
                raise UserError(
                    f"a phase raises products or slots, and {name!r} is none: use {', '.join((*GEMMS, *SLOTS))}"
                )
        if not self.high:
            raise UserError('a phase needs something in full precision: high=("fprop",), for example')

    def first_step(self, total_steps: int) -> int | None:
        """The number of the first step, from 0, that lies in it; None where an event decides."""
        if isinstance(self.start, GradientNoise):
            return None
        return self.start if isinstance(self.start, int) else -int(-self.start * total_steps // 1)

    def applied(self, spec: LayerSpec) -> LayerSpec:
        """A layer's spec in this phase."""
        slots = [slot for name in self.high for slot in OPERANDS.get(name, (name,))]
        return spec.raised(slots)

    def __str__(self) -> str:
        if isinstance(self.start, GradientNoise):
            noise = f"{self.start.ratio:.3g} times the noise of its rounding"
            when = f"once the gradient is below {noise} (measured every {self.start.every} steps)"
        elif isinstance(self.start, int):
            when = f"from step {self.start} on"
        else:
            when = f"from {self.start:.0%} of the steps on".replace("%", " %")
        rate = "" if self.rate is None else f"; {self.rate}"
        return f"{when}: {', '.join(self.high)} in full precision{rate}"


def check_phases(name: str, phases: tuple[Phase, ...]) -> None:
    """Reject phases of a recipe that are out of order.

    Raises:
        UserError: they do not follow one another.
    """
    for first, second in pairwise(phases):
        if isinstance(first.start, GradientNoise):
            raise UserError(f"recipe {name!r}: no phase can come after one that an event begins: put it last")
        if isinstance(second.start, GradientNoise):
            continue
        if type(first.start) is not type(second.start):
            raise UserError(f"recipe {name!r}: give all phases by fractions, or all by numbers of steps")
        if not first.start < second.start:
            raise UserError(
                f"recipe {name!r}: its phases overlap, as one starts at {first.start:g} and the next at {second.start:g}: list "
                "them in order"
            )


class Scheduler:
    """Puts the layers of a model into the phase of a step, and looks after what a recipe has looked after.

    Args:
        model: just converted by the recipe whose phases these are.
        phases: in order.
        total_steps: optimizer steps of the whole training.

    Raises:
        UserError: a phase never starts.

    >>> import fourbit as fb
    >>> model = fb.convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)), "nvfp4-bf16-end")
    >>> scheduler = fb.scheduler(model, "nvfp4-bf16-end", total_steps=100)
    >>> scheduler.at(0), scheduler.at(82)
    (None, Phase(start=0.82, high=('fprop',), rate=None))
    >>> print(model[1].spec.x_fprop)
    None
    """

    def __init__(self, model: nn.Module, phases: tuple[Phase, ...], total_steps: int):
        self.phases, self.total_steps = phases, total_steps
        self._model = model
        self._specs = [(layer, layer.spec) for layer in quantized_layers(model).values()]
        children = ((layer, child) for layer, _ in self._specs for child in layer.quant.children())
        self._upkeep = [(layer, child) for layer, child in children if isinstance(child, Upkeep)]
        self._optimizes = [(layer, child) for layer, child in self._upkeep if isinstance(child, StepHooks)]
        self._attached = False
        self._began = [phase.first_step(total_steps) for phase in phases]
        for phase, first in zip(phases, self._began, strict=True):
            if first is not None and first >= total_steps:
                raise UserError(
                    f"the phase that starts at {phase.start:g} never does in a training of {total_steps} steps: give it an "
                    "earlier start, or train longer"
                )

    def at(self, step: int, backward: Callable[[], object] | None = None) -> Phase | None:
        """The phase of a step (0: the first), None before the first of them; the layers have its operands afterwards.

        Args:
            backward: leaves the gradients of this step's batch in `grad` of the parameters, by a forward and a backward pass.
                It is called twice where an event is to be measured; what the model's buffers, layers and torch's random
                generators are is afterwards what it was, and the gradients are gone.

        Raises:
            UserError: an event is to be measured, and there is no `backward`; or an optimizer is to be attached, and is not.
        """
        if self._optimizes and not self._attached:
            raise UserError(
                "this recipe changes the optimizer's steps: call scheduler.attach(optimizer) once before the first"
            )
        for layer, _ in self._specs:
            layer.quant.awaits_scheduler = False
        for layer, upkeep in self._upkeep:
            upkeep.at(step, layer)
        number = self._number(step)
        self._apply(number)
        following = 0 if number is None else number + 1
        if following < len(self.phases) and self._began[following] is None:
            event = self.phases[following].start
            assert isinstance(event, GradientNoise)
            if step and step % event.every == 0 and self._measure(event, number, following, backward):
                self._began[following] = step
                number = following
            self._apply(number)
        return None if number is None else self.phases[number]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the steps of an optimizer of torch changed as the recipe says (`QRamping`)."""
        if not self._optimizes or self._attached:
            return
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate has it inside its own
        inner.register_step_pre_hook(lambda which, *_: self._around(which, "before_step"))
        inner.register_step_post_hook(lambda which, *_: self._around(which, "after_step"))
        self._attached = True

    def _around(self, optimizer: torch.optim.Optimizer, method: str) -> None:
        with torch.no_grad():
            for layer, upkeep in self._optimizes:
                weight = layer.weight
                assert isinstance(weight, nn.Parameter)
                getattr(upkeep, method)(weight, optimizer.state.get(weight, {}))

    def rate(self, step: int) -> float | None:
        """The learning rate of a step as a share of the base rate, after `at(step)`; None: as without phases."""
        number = self._number(step)
        if number is None or self.phases[number].rate is None:
            return None
        began = [*self._began, None][number : number + 2]
        assert began[0] is not None
        end = self.total_steps if began[1] is None else began[1]
        return self.phases[number].rate.at(step - began[0], end - began[0])  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """What events have decided, as plain values: at which step phases began, by their number."""
        events = (i for i, phase in enumerate(self.phases) if isinstance(phase.start, GradientNoise))
        return {"began": {str(i): self._began[i] for i in events}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for number, step in state["began"].items():
            self._began[int(number)] = step

    def _number(self, step: int) -> int | None:
        begun = [i for i, first in enumerate(self._began) if first is not None and first <= step]
        return begun[-1] if begun else None

    def _apply(self, number: int | None) -> None:
        for layer, spec in self._specs:
            layer.quant.respec(spec if number is None else self.phases[number].applied(spec))

    def _measure(self, event: GradientNoise, now: int | None, then: int, backward: Callable[[], object] | None) -> bool:
        """Whether the event has happened, from the gradients of one batch with the operands of two phases."""
        if backward is None:
            raise UserError(
                "an event of the recipe is to be measured at this step: call scheduler.at(step, backward) with a function that "
                "leaves the gradients of the step's batch in the parameters"
            )
        found: list[list[Tensor]] = []
        for number in (then, now):
            self._apply(number)
            found.append(_gradients(self._model, backward))
        return event.happened(*found)


def _gradients(model: nn.Module, backward: Callable[[], object]) -> list[Tensor]:
    """The gradients of all parameters; everything else stays what it was."""
    layers = quantized_layers(model).values()
    restore = [layer.quant.snapshot() for layer in layers]
    buffers = [(b, b.clone()) for b in model.buffers()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    for p in model.parameters():
        p.grad = None
    with torch.random.fork_rng(devices=cuda):
        backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    for back in restore:
        back()
    for p in model.parameters():
        p.grad = None
    return grads
