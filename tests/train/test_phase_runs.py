"""Runs whose recipe has phases: the trainer measures their events, applies their learning rates, and resumes them exactly."""

from __future__ import annotations

import pytest
from run_files import STEPS_PER_EPOCH, metrics, tensors

import fourbit as fb
from fourbit.nn import OsciReset, QEma, QRamping
from fourbit.recipes import CATALOG
from fourbit.train import train


@pytest.fixture
def event_recipe(monkeypatch) -> str:
    """Four bits until the gradient is measured for the first time, after two steps, and then a learning rate of its own."""
    rules = fb.recipes.get("tetrajet").rules
    phase = fb.Phase(fb.GradientNoise(every=2, ratio=1e6), ("dgrad", "wgrad"), fb.Rate(2))
    monkeypatch.setitem(CATALOG._items, "with-event", fb.Recipe("with-event", rules, phases=(phase,)))
    return "with-event"


@pytest.fixture
def tended_recipe(monkeypatch) -> str:
    """Averages, periods and resets within a few steps."""
    upkeep = (
        QEma(decay=0.5, after=1),
        QRamping(every=4, window=1, ratio=0.1, gain=1.0),
        OsciReset(start=1, every=4, window=1, ratio=0.5),
    )
    rules = fb.recipes.get("tetrajet").rules
    monkeypatch.setitem(CATALOG._items, "tended", fb.Recipe("tended", rules, upkeep=upkeep))
    return "tended"


def rates(folder) -> list[float]:
    return [line["lr"] for line in metrics(folder) if line["kind"] == "step"]


def test_an_event_in_a_run_begins_its_phase_with_its_learning_rate(make_config, event_recipe):
    config = make_config(recipe=event_recipe, lr=0.1, schedule="constant")
    train(config)
    assert rates(config.out) == pytest.approx(
        [0.1, 0.1, 0.05, 0.1, 0.1, 0.05]
    )  # up over two steps, then a cosine over two


def test_a_run_that_is_resumed_behind_an_event_ends_as_if_it_was_not(make_config, event_recipe, signal_after):
    whole, parts = (make_config(name, recipe=event_recipe, grad_accumulation=1) for name in ("whole", "parts"))
    train(whole)
    signal_after(STEPS_PER_EPOCH + 1)
    assert train(parts).stopped == "interrupted"
    assert train(parts, resume=True).stopped == "done"
    assert tensors(parts.out) == tensors(whole.out)
    assert metrics(parts.out) == metrics(whole.out)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_looks_after_its_weights_is_resumed_exactly(make_config, tended_recipe, signal_after, optimizer):
    whole, parts = (make_config(name, recipe=tended_recipe, optimizer=optimizer) for name in ("whole", "parts"))
    train(whole)
    signal_after(STEPS_PER_EPOCH + 1)
    assert train(parts).stopped == "interrupted"
    assert train(parts, resume=True).stopped == "done"
    assert tensors(parts.out) == tensors(whole.out)
    assert metrics(parts.out) == metrics(whole.out)
