"""The doctor for loops of one's own: observes a model now and then, and warns once of each thing that goes wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fourbit.diagnosis._findings import Finding
from fourbit.diagnosis._warner import Warner
from fourbit.errors import UserError
from fourbit.nn import Observation, observe
from fourbit.nn._lines import layer_lines, scales


def _warn(finding: Finding) -> None:
    warnings.warn(str(finding), stacklevel=2)


class Watch:
    """Watches a model in training. No number of the training changes.

        watch = fb.Watch(model, every=100)
        for step, (x, y) in enumerate(loader):
            with watch.step(step):                  # observed where step is a multiple of `every`
                loss = F.cross_entropy(model(x), y)
                loss.backward()
            optimizer.step(); optimizer.zero_grad()
            watch.loss(step, loss.item())           # may be left out, and the rules about losses with it

    Args:
        model: converted.
        every: steps between two observations, each of which takes about as long as a step.
        say: is called with each `Finding`; None: Python's warnings.

    Raises:
        UserError: `every` is not a whole number of at least 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 100, say: Callable[[Finding], None] | None = None):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UserError(f"every is {every!r}, but must be a whole number of at least 1.")
        self.model, self.every = model, every
        self._warner = Warner(say or _warn)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The forward and backward pass of a step, counted from 0."""
        if step % self.every:
            yield
            return
        with observe(self.model, vitals=True) as observation:
            yield
        self.saw(step, observation)

    def loss(self, step: int, loss: Any, **more: Any) -> None:
        """The loss of a step, and the `loss_scale` where there is one: numbers, or tensors or arrays of one. Kept are observed
        steps and every tenth."""
        if step % self.every == 0 or step % 10 == 0:
            given = {"loss": float(loss), **{name: float(value) for name, value in more.items()}}
            self._warner.add({"kind": "step", "step": step + 1, "scales": scales(self.model), **given})

    def saw(self, step: int, observation: Observation) -> None:
        """Take what `observe(model, vitals=True)` has gathered in a step."""
        self._warner.add({"kind": "layers", "step": step + 1, "layers": layer_lines(self.model, observation)})
        self._warner.add({"kind": "vitals", "step": step + 1, **observation.vitals()})
