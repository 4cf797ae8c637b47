"""What happens to a step that meets NaN or infinity."""

from __future__ import annotations

import math

import pytest
import torch
from run_files import STEPS_PER_EPOCH, metrics, tensors
from safetensors.torch import load_file

from fourbit import data
from fourbit.errors import NonFiniteError
from fourbit.quantizers import UNSET
from fourbit.train import _guard, train
from fourbit.train._loop import Loop


@pytest.fixture
def poison(monkeypatch):
    """`poison(steps, value)`: those training steps (from 0) see an image with `value` in it."""
    clean = data.batches

    def arrange(steps, value=math.nan):
        def batches(source, split, batch_size, seed=0, epoch=0, augment=True, start=0, drop_last=None, **shared):
            stream = clean(source, split, batch_size, seed, epoch, augment=augment, start=start)
            for number, (x, y) in enumerate(stream, start):
                if split == "train" and epoch * STEPS_PER_EPOCH + number in steps:
                    x[0, 0, 0, 0] = value
                yield x, y

        monkeypatch.setattr(data, "batches", batches)

    return arrange


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020", "luq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stop_names_the_layers_and_keeps_the_last_good_checkpoint(make_config, poison, recipe, value):
    good, bad = make_config("good", recipe=recipe, epochs=1), make_config("bad", recipe=recipe, epochs=2)
    train(good)
    poison({STEPS_PER_EPOCH + 1}, value)
    with pytest.raises(NonFiniteError, match=f"at step {STEPS_PER_EPOCH + 2} in .*lower --lr") as caught:
        train(bad)
    first_watched = "features.2.0" if recipe == "luq" else "features.0.0"  # luq leaves the first layer to torch
    assert first_watched in caught.value.layers
    *_, step, final = metrics(bad.out)
    assert step["loss"] is None
    assert final["stopped"] == "diverged"
    assert (
        load_file(bad.out / "checkpoint" / "model.safetensors").keys()
        == load_file(good.out / "checkpoint" / "model.safetensors").keys()
    )
    assert all(t.isfinite().all() for t in load_file(bad.out / "checkpoint" / "model.safetensors").values())


def test_a_run_that_stopped_goes_on_with_skip(make_config, poison):
    poison({STEPS_PER_EPOCH + 1})
    with pytest.raises(NonFiniteError):
        train(make_config())
    result = train(make_config(on_nonfinite="skip"), resume=True)
    assert (result.stopped, result.skipped, result.step) == ("done", 1, 2 * STEPS_PER_EPOCH)


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020"])
def test_skip_leaves_no_trace_of_the_step_in_the_model(make_config, poison, recipe):
    config = make_config(recipe=recipe, on_nonfinite="skip", max_steps=1, milestones=())
    train(config)
    poison({1})
    poisoned = make_config("p", recipe=recipe, on_nonfinite="skip", max_steps=2, milestones=())
    result = train(poisoned)
    assert result.skipped == 1
    assert tensors(poisoned.out)["model.safetensors"] == tensors(config.out)["model.safetensors"]


def test_a_first_step_that_is_left_out_decides_nothing(make_config, poison):
    """The clip values, their signs, the scales: the second step decides them as if it were the first."""
    poison({0})
    config = make_config(recipe="ibm2020", on_nonfinite="skip", max_steps=1, milestones=())
    assert train(config).skipped == 1
    state = load_file(config.out / "checkpoint" / "model.safetensors")
    undecided = {"x_form": 0, "w_form": 0, "x_alpha": 0, "x_floor": 0, "g_exponent": UNSET, "g_amax": -1}
    found = {name: t for name, t in state.items() if name.rsplit(".", 1)[-1] in undecided}
    assert {name.rsplit(".", 1)[-1] for name in found} >= {"x_form", "x_alpha", "g_exponent", "g_amax"}
    for name, t in found.items():
        assert (t == undecided[name.rsplit(".", 1)[-1]]).all(), name


def test_skip_counts_and_goes_on(make_config, poison):
    poison({1, 4})
    config = make_config(on_nonfinite="skip")
    assert train(config).skipped == 2
    epochs = [line for line in metrics(config.out) if line["kind"] == "epoch"]
    assert [line["skipped"] for line in epochs] == [1, 2]
    assert all(line["train_loss"] is not None for line in epochs)


def test_skip_gives_up_after_many_in_a_row(make_config, poison, monkeypatch):
    monkeypatch.setattr(_guard, "MAX_SKIPPED_IN_A_ROW", 2)
    poison({1, 2, 3, 4})
    with pytest.raises(NonFiniteError, match="2 steps in a row were left out already"):
        train(make_config(on_nonfinite="skip"))


def test_ignore_goes_on_with_null_in_the_metrics(make_config, poison):
    poison({1})
    config = make_config(on_nonfinite="ignore", epochs=1)
    result = train(config)
    assert result.stopped == "done"
    steps = [line for line in metrics(config.out) if line["kind"] == "step"]
    assert steps[0]["loss"] is not None
    assert steps[-1]["loss"] is None


def test_an_infinite_gradient_alone_is_noticed(make_config, monkeypatch):
    step = Loop._forward_backward

    def overflowing(self, group):
        (loss_sum, correct, images, _), in_range = step(self, group)
        self.parameters[0].grad[0] = math.inf
        return [loss_sum, correct, images, math.inf], in_range

    monkeypatch.setattr(Loop, "_forward_backward", overflowing)
    with pytest.raises(NonFiniteError, match=r"the norm of the gradient is inf at step 1 in features\.0\.0:"):
        train(make_config())


def test_a_loss_scale_that_overflows_is_halved_and_no_fault(make_config, monkeypatch):
    config = make_config(recipe="ibm2020-global-scale", epochs=1, loss_scale_interval=7)
    from fourbit.recipes import LossScaler

    init, intervals = LossScaler.__init__, []

    def far_too_large(self, model, interval):
        intervals.append(interval)
        init(self, model, init=2.0**140)

    monkeypatch.setattr(LossScaler, "__init__", far_too_large)
    result = train(config)
    assert intervals == [7]
    assert result.stopped == "done"
    assert result.skipped == STEPS_PER_EPOCH  # far too large for float32: halved at every step, never small enough
    assert torch.isfinite(torch.tensor(result.test_loss))
