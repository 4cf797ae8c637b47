"""Precision that changes over time: a recipe's phases, and what carries them out.

Which layer has which operands at a step follows from the number of the step alone, so a run that is resumed, or repeated, does
what it would have done. What a layer remembers (clip values, exponents) stays through all phases.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from fourbit.errors import UserError
from fourbit.nn import quantized_layers
from fourbit.ops import OPERANDS, SLOTS, LayerSpec

GEMMS = tuple(OPERANDS)


@dataclass(frozen=True)
class Phase:
    """From a moment on, some products or operands are in full precision, until the next phase begins.

    Args:
        start: a fraction of the training, above 0 and below 1; or the number of optimizer steps before it, 1 or more.
        high: names of products ("fprop", "dgrad", "wgrad": both of their operands) and of slots ("x_fprop").

    Raises:
        UserError: a start that is none, or an unknown name.

    >>> print(Phase(0.82, ("fprop",)))
    from 82 % of the steps on: fprop in full precision
    """

    start: float
    high: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "high", tuple(self.high))
        whole = isinstance(self.start, int) and not isinstance(self.start, bool) and self.start >= 1
        if not (whole or (isinstance(self.start, float) and 0 < self.start < 1)):
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

    def first_step(self, total_steps: int) -> int:
        """The number of the first step, from 0, that lies in it."""
        return self.start if isinstance(self.start, int) else -int(-self.start * total_steps // 1)

    def applied(self, spec: LayerSpec) -> LayerSpec:
        """A layer's spec in this phase."""
        slots = [slot for name in self.high for slot in OPERANDS.get(name, (name,))]
        return spec.raised(slots)

    def __str__(self) -> str:
        when = f"from step {self.start} on" if isinstance(self.start, int) else f"from {self.start:.0%} of the steps on"
        return f"{when.replace('%', ' %')}: {', '.join(self.high)} in full precision"


def check_phases(name: str, phases: tuple[Phase, ...]) -> None:
    """Reject phases of a recipe that are out of order.

    Raises:
        UserError: they do not follow one another.
    """
    for first, second in pairwise(phases):
        if type(first.start) is not type(second.start):
            raise UserError(f"recipe {name!r}: give all phases by fractions, or all by numbers of steps")
        if not first.start < second.start:
            raise UserError(
                f"recipe {name!r}: its phases overlap, as one starts at {first.start:g} and the next at {second.start:g}: list "
                "them in order"
            )


class Scheduler:
    """Puts the layers of a model into the phase of a step.

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
    (None, Phase(start=0.82, high=('fprop',)))
    >>> print(model[1].spec.x_fprop)
    None
    """

    def __init__(self, model: nn.Module, phases: tuple[Phase, ...], total_steps: int):
        self.phases, self.total_steps = phases, total_steps
        self._specs = [(layer, layer.spec) for layer in quantized_layers(model).values()]
        for phase in phases:
            if phase.first_step(total_steps) >= total_steps:
                raise UserError(
                    f"the phase that starts at {phase.start:g} never does in a training of {total_steps} steps: give it an "
                    "earlier start, or train longer"
                )

    def at(self, step: int) -> Phase | None:
        """The phase of a step (0: the first), None before the first of them; the layers have its operands afterwards."""
        now = None
        for phase in self.phases:
            if phase.first_step(self.total_steps) <= step:
                now = phase
        for layer, spec in self._specs:
            layer.quant.respec(spec if now is None else now.applied(spec))
        return now
