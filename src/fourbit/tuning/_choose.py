"""The choice: by gain per cost, each gain measured together with what is chosen already."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fourbit.tuning._candidates import Candidate


@dataclass(frozen=True)
class Step:
    """One candidate that was taken: the objective before and after, and what it costs."""

    candidate: Candidate
    before: float
    after: float
    cost: float

    @property
    def gain(self) -> float:
        """How much lower the objective is with it."""
        return self.before - self.after


def choose(
    candidates: Sequence[Candidate],
    objective: Callable[[tuple[Candidate, ...]], float],
    cost: Callable[[Candidate], float],
    fits: Callable[[tuple[Candidate, ...]], bool],
    enough: Callable[[tuple[Candidate, ...]], bool] = lambda chosen: False,
) -> list[Step]:
    """Take candidates one after the other.

    A gain that was measured with fewer chosen is an estimate. The best estimate is measured again; if it stays the best it is
    taken, else it goes back among the others. So few are measured twice.

    Args:
        objective: of what is chosen; to be lowered.
        fits: whether so much may be chosen. What does not fit now never will.
        enough: whether no more is needed.
    """
    chosen: tuple[Candidate, ...] = ()
    value = objective(chosen)
    steps: list[Step] = []
    queue: list[
        tuple[float, int, float, int]
    ] = []  # minus gain per cost, place, objective with it, how many were chosen then
    for place, candidate in enumerate(candidates):
        if fits((candidate,)):
            after = objective((candidate,))
            queue.append((-(value - after) / cost(candidate), place, after, 0))
    heapq.heapify(queue)
    while queue and not enough(chosen):
        _, place, after, known = heapq.heappop(queue)
        candidate = candidates[place]
        if not fits((*chosen, candidate)):
            continue
        if known < len(chosen):
            after = objective((*chosen, candidate))
            ratio = -(value - after) / cost(candidate)
            if queue and ratio > queue[0][0]:
                heapq.heappush(queue, (ratio, place, after, len(chosen)))
                continue
        if after >= value:
            continue  # it helped with fewer, and does not any more
        steps.append(Step(candidate, value, after, cost(candidate)))
        chosen, value = (*chosen, candidate), after
    return steps
