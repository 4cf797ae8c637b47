"""Learning rates, against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from fourbit.train import Settings
from fourbit.train._schedule import learning_rate

STEPS = 40


def rates(**fields):
    return [learning_rate(Settings(**fields), 0.1, step, STEPS) for step in range(STEPS)]


def torch_rates(make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_inverse_square_root_is_that_of_the_transformer():
    """Vaswani et al., Eq. 3: lr ~ min(step^-0.5, step * warmup^-1.5), steps counted from 1."""
    for warmup in (1, 7):
        found = rates(schedule="inverse_sqrt", warmup_steps=warmup)
        expected = [0.1 * warmup**0.5 * min(k**-0.5, k * warmup**-1.5) for k in range(1, STEPS + 1)]
        assert found == pytest.approx(expected)
    assert rates(schedule="inverse_sqrt") == pytest.approx([0.1 * k**-0.5 for k in range(1, STEPS + 1)])


@pytest.mark.parametrize("milestones", [(0.5, 0.75), (0.1,), (0.3, 0.6, 0.9), ()])
def test_step_equals_torch(milestones):
    expected = torch_rates(lambda o: MultiStepLR(o, [round(f * STEPS) for f in milestones], 0.2))
    assert rates(schedule="step", milestones=milestones, lr_decay=0.2) == pytest.approx(expected)


def test_cosine_equals_torch():
    assert rates(schedule="cosine") == pytest.approx(torch_rates(lambda o: CosineAnnealingLR(o, STEPS)))


def test_constant_is_constant():
    assert rates(schedule="constant") == [0.1] * STEPS


def test_warmup_equals_torch():
    expected = torch_rates(lambda o: LinearLR(o, 1 / 8, 1.0, total_iters=7))
    assert rates(schedule="constant", warmup_steps=8) == pytest.approx(expected)


def test_cosine_begins_after_the_warmup_and_ends_near_zero():
    found = rates(schedule="cosine", warmup_steps=10)
    assert found[:11] == pytest.approx([0.1 * (step + 1) / 10 for step in range(10)] + [0.1])
    assert 0 < found[-1] < 0.001
    assert found[10:] == sorted(found[10:], reverse=True)


def test_a_warmup_longer_than_the_run_is_no_error():
    assert max(rates(schedule="cosine", warmup_steps=100)) < 0.1


def test_warm_up_stable_decay_falls_in_a_straight_line_at_the_end():
    found = rates(schedule="wsd", warmup_steps=10, decay_share=0.25)
    fall = STEPS // 4
    assert found[:10] == pytest.approx([0.1 * (step + 1) / 10 for step in range(10)])
    assert found[10 : STEPS - fall + 1] == [0.1] * (STEPS - fall - 9)
    assert found[STEPS - fall :] == pytest.approx([0.1 * (fall - i) / fall for i in range(fall)])
