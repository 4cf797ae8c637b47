"""The learning rate as a function of the step: nothing to store, so a resumed run cannot lose its place.

    step        lr * lr_decay^(milestones passed)
    cosine      lr * (1 + cos(pi * t)) / 2,     t from 0 after the warm-up to 1 at the end
    wsd         lr * min(1, (total_steps - step) / (decay_share * total_steps))
    inverse_sqrt  lr * sqrt(w / (step + 1)) once step + 1 > w, the warm-up steps or 1
    constant    lr

During the first `warmup_steps` steps the factor is (step + 1) / warmup_steps, and the decay of the schedule applies too.
"""

from __future__ import annotations

import math

from fourbit.train._config import Settings


def learning_rate(config: Settings, lr: float, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    >>> config = Settings(schedule="step", milestones=(0.5, 0.75), lr_decay=0.5)
    >>> [learning_rate(config, 1.0, step, 8) for step in range(8)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """
    warmup = config.warmup_steps
    factor = (step + 1) / warmup if step < warmup else 1.0
    if config.schedule == "step":
        passed = sum(step >= round(fraction * total_steps) for fraction in config.milestones)
        factor *= config.lr_decay**passed
    elif config.schedule == "cosine" and step >= warmup:
        factor *= (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2
    elif config.schedule == "wsd":
        factor *= min(1.0, (total_steps - step) / (config.decay_share * total_steps))
    elif config.schedule == "inverse_sqrt" and step >= warmup:
        factor *= math.sqrt(max(1, warmup) / (step + 1))
    return lr * factor
