"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Stopped = Literal["done", "max_steps", "interrupted", "diverged"]


@dataclass(frozen=True)
class Result:
    """The end of a run.

    Args:
        folder: where everything was written.
        stopped: "done" (all epochs), "max_steps", "interrupted" (go on with `resume=True`) or "diverged".
        step: optimizer steps done.
        epoch: epochs completed.
        test_accuracy, test_loss: of the last evaluation, which comes after the last step; None if there was none.
        test_score: likewise: BLEU, a word error rate or, with more than ten classes, top-5 accuracy as fractions; else None.
        seconds: training and evaluation, over all sittings.
        skipped: steps left out because of NaN or infinity.
    """

    folder: Path
    stopped: Stopped
    step: int
    epoch: int
    test_accuracy: float | None
    test_loss: float | None
    test_score: float | None
    seconds: float
    skipped: int = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stopped != "interrupted"
