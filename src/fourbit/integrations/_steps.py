"""What all trainers do from step to step: phases and upkeep, and the numbers that they log of an observation, by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from fourbit import recipes
from fourbit.errors import UserError
from fourbit.nn import Observation
from fourbit.recipes import Scheduler

_SHOWN = ("underflow", "saturation", "sqnr_db")


def by_layer(observation: Observation) -> Iterator[tuple[str, float]]:
    """fourbit/LAYER/SLOT/STATISTIC of every operand of every layer."""
    for layer, slots in observation.items():
        for slot, statistics in slots.items():
            for name in _SHOWN:
                yield f"fourbit/{layer}/{slot}/{name}", getattr(statistics, name)


def means(observation: Observation) -> dict[str, float]:
    """fourbit_SLOT_STATISTIC: their means over layers."""
    found: dict[str, list[float]] = {}
    for slots in observation.values():
        for slot, statistics in slots.items():
            for name in _SHOWN:
                found.setdefault(f"fourbit_{slot}_{name}", []).append(getattr(statistics, name))
    return {name: sum(values) / len(values) for name, values in found.items()}


def scheduler_of(model: nn.Module, recipe: str, total_steps: float, optimizer: Optimizer) -> Scheduler | None:
    """What carries out a recipe's phases and upkeep; None where it has none.

    Raises:
        UserError: the length of the training is not known, or a phase is begun by an event or has a learning rate of its own,
            which belong to the loop.
    """
    found = recipes.get(recipe)
    if not (found.phases or found.upkeep):
        return None
    if found.phases and not 0 < total_steps < float("inf"):
        raise UserError(f"{recipe} has phases, which need to know how long training is: give max_steps.")
    if any(phase.rate is not None or not isinstance(phase.start, int | float) for phase in found.phases):
        raise UserError(
            f"{recipe} has a phase that an event begins or that has a learning rate of its own, which this trainer cannot "
            "carry out: train it with `fourbit train` or a loop of your own (fourbit.scheduler)."
        )
    scheduler = recipes.scheduler(model, found, int(total_steps) if found.phases else 1)
    assert scheduler is not None
    scheduler.attach(optimizer)
    return scheduler
