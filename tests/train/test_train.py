"""What a run writes, and that it depends on nothing but its configuration."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from run_files import NUM_TEST, STEPS_PER_EPOCH, metrics, snapshot, tensors
from safetensors.torch import load_file

import fourbit as fb
from fourbit import backends, data, models, recipes
from fourbit.errors import UserError
from fourbit.train import TrainConfig, train
from fourbit.train._session import open_session
from fourbit.train._validate import validated

RECIPES = ("fp32", "int4-fwd", "ibm2020", "luq", "ibm2020-radix2-global-scale")


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020", "luq"])
def test_two_runs_with_one_seed_are_identical(make_config, recipe):
    first, second = make_config("a", recipe=recipe, epochs=1), make_config("b", recipe=recipe, epochs=1)
    train(first)
    torch.rand(3)  # what happened before in the process does not matter
    train(second)
    assert tensors(first.out) == tensors(second.out)
    assert metrics(first.out) == metrics(second.out)


@pytest.mark.parametrize("recipe", ["ibm2020", "luq"])
def test_runs_on_every_instruction_set_are_those_of_the_reference(make_config, isa, recipe):
    """As far as sums in another order allow: a code that differs now and then."""
    result = train(make_config("kernels", recipe=recipe))
    with backends.without():
        expected = train(make_config("reference", recipe=recipe))
    assert result.test_loss == pytest.approx(expected.test_loss, rel=0.05)
    losses = [[line["loss"] for line in metrics(r.folder) if line["kind"] == "step"] for r in (result, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_runs_with_other_seeds_differ(make_config):
    first, second = make_config("a", epochs=1), make_config("b", epochs=1, seed=1)
    train(first)
    train(second)
    assert tensors(first.out) != tensors(second.out)


def test_all_recipes_start_from_the_same_weights_and_see_the_same_batches(make_config):
    sessions = [open_session(validated(make_config(recipe=name))) for name in RECIPES]
    reference = dict(sessions[0].bare.named_parameters())
    batches = [torch.stack([x for x, _ in group]) for group in sessions[0].train_groups(0, 0)]
    for session in sessions[1:]:
        own = dict(session.bare.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in reference.items())
        others = [torch.stack([x for x, _ in group]) for group in session.train_groups(0, 0)]
        assert all(torch.equal(a, b) for a, b in zip(batches, others, strict=True))


def test_the_metrics_have_one_line_per_event(make_config):
    config = make_config(recipe="ibm2020")
    result = train(config)
    lines = metrics(config.out, clock=True)
    kinds = [line["kind"] for line in lines]
    assert kinds.count("step") == result.step == 2 * STEPS_PER_EPOCH
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [0, 1]
    assert [line["step"] for line in lines if line["kind"] == "layers"] == [1, 3, 5, 6]
    assert [line["step"] for line in lines if line["kind"] == "histograms"] == [1, 3, 6]
    assert kinds[-1] == "final"
    final = lines[-1]
    assert (final["stopped"], final["epoch"], final["step"]) == ("done", 1, 2 * STEPS_PER_EPOCH)
    assert final["test_accuracy"] == result.test_accuracy == lines[-2]["test_accuracy"]
    assert 0 <= result.test_accuracy * NUM_TEST == round(result.test_accuracy * NUM_TEST)


def test_layer_lines_hold_scales_and_statistics(make_config):
    config = make_config(recipe="ibm2020", epochs=1)
    train(config)
    line = next(line for line in metrics(config.out) if line["kind"] == "layers")
    layer = line["layers"]["features.4.0"]
    assert isinstance(layer["g_exponent"], int)
    assert layer["x_alpha"] > 0
    assert {"x_fprop", "w_fprop", "g_dgrad", "g_wgrad"} <= set(layer["slots"])
    assert 0 <= layer["slots"]["g_dgrad"]["underflow"] <= 1
    histograms = next(line for line in metrics(config.out) if line["kind"] == "histograms")["histograms"]
    assert histograms["features.4.0"]["g_dgrad"]["grid"] == [4.0**n for n in range(-3, 4)]
    assert histograms["fc"]["x_fprop"]["grid"] == []  # too fine to be listed


def test_every_logged_step_has_the_scales_of_all_layers(make_config):
    config = make_config(recipe="ibm2020", epochs=1, observe_every=0)
    train(config)
    lines = [line for line in metrics(config.out) if line["kind"] == "step"]
    assert len(lines) == STEPS_PER_EPOCH
    for line in lines:
        assert line["scales"]["features.4.0"]["x_alpha"] > 0
        assert all(isinstance(layer["g_exponent"], int) for layer in line["scales"].values())
    train(full := make_config("full", epochs=1))
    assert not any("scales" in line for line in metrics(full.out))


LONG = pytest.param(88, [*range(1, 89, 5), 88], marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("total", "steps"),
    [(2, [1, 2]), (6, [1, 2, 3, 4, 5, 6]), (50, [*range(1, 51, 3), 50]), LONG],
)
def test_a_run_of_any_length_is_observed_about_twenty_times_and_at_its_end(make_config, monkeypatch, total, steps):
    from contextlib import contextmanager

    from fourbit.train import _loop
    from fourbit.train._recorder import Recorder

    seen = []
    observed = contextmanager(lambda model, histograms, vitals: iter([histograms]))  # without the work
    monkeypatch.setattr(_loop, "observe", observed)
    monkeypatch.setattr(
        Recorder, "layers", lambda self, state, model, histograms: seen.append((state.step, histograms))
    )
    train(make_config(recipe="int4-fwd", epochs=40, max_steps=total, observe_every=None))
    assert [step for step, _ in seen] == steps
    assert seen[-1] == (total, True)


def test_a_long_run_is_observed_every_hundred_steps(make_config):
    session = open_session(validated(make_config(recipe="int4-fwd", epochs=10_000, observe_every=None)))
    assert session.config.observe_every == 100


def test_a_short_run_shows_something_over_time(make_config):
    from fourbit.report._read import load_run

    config = make_config(recipe="ibm2020", epochs=1, log_every=10, observe_every=None)
    train(config)
    run = load_run(config.out)
    assert len(run.scales.steps) >= 3
    assert run.scales.has("g_exponent")
    assert run.scales.has("x_alpha")
    assert len(run.trace.steps) >= 3


def test_histograms_say_how_they_were_rounded_and_what_was_reused(make_config):
    for recipe, rounding, reused in (("luq", "stochastic", True), ("ibm2020", "nearest", False)):
        config = make_config(recipe, recipe=recipe, epochs=1)
        train(config)
        line = next(line for line in metrics(config.out) if line["kind"] == "histograms")
        slots = line["histograms"]["features.4.0"]
        assert (slots["g_dgrad"]["rounding"], slots["g_dgrad"]["reused"]) == (rounding, reused)
        assert slots["w_fprop"]["rounding"] == "nearest"
        assert ("g_wgrad" in slots) != reused


def test_products_and_fuse_reach_the_layers(make_config):
    for products, fuse in (("fast", True), ("exact", False)):
        session = open_session(validated(make_config(recipe="ibm2020", products=products, fuse=fuse)))
        layers = fb.quantized_layers(session.bare)
        assert {layer.quant.products for layer in layers.values()} == {products}
        assert {layer.quant.fuse for layer in layers.values()} == {fuse}


def test_observing_does_not_change_the_numbers(make_config):
    seen, unseen = (
        make_config("a", recipe="ibm2020", observe_every=1),
        make_config("b", recipe="ibm2020", observe_every=0),
    )
    train(seen)
    train(unseen)
    assert tensors(seen.out) == tensors(unseen.out)


def test_the_saved_weights_load_into_a_fresh_model(make_config):
    config = make_config(recipe="ibm2020")
    result = train(config)
    model = models.build("digits_cnn", num_classes=10, in_channels=1, image_size=8)
    recipes.convert(model, "ibm2020")
    model.load_state_dict(load_file(result.folder / "checkpoint" / "model.safetensors"))


def test_clip_values_have_a_learning_rate_of_their_own(make_config):
    """The first step of SGD without decay moves them in proportion to it; at 0 they stay."""
    after = {}
    for factor in (0.0, 0.5, 1.0):
        config = make_config(
            f"run-{factor}", recipe="int4-fwd", alpha_lr_factor=factor, alpha_weight_decay=0.0, max_steps=2, epochs=1
        )
        train(config)
        after[factor] = [
            np.array([s["x_alpha"] for s in line["scales"].values() if s["x_alpha"] is not None])
            for line in metrics(config.out)
            if line["kind"] == "step"
        ]
    start = after[0.0][0]
    assert np.array_equal(after[0.0][1], start)
    moved = after[1.0][0] - start
    assert np.abs(moved).max() > 1e-4
    assert after[0.5][0] - start == pytest.approx(0.5 * moved, abs=1e-6)


def test_config_and_environment_are_written_with_the_defaults_filled_in(make_config):
    config = make_config(epochs=1)
    train(config)
    written = json.loads((config.out / "config.json").read_text())
    assert written["lr"] == 0.1
    assert written["eval_batch_size"] == 256
    assert written["alpha_weight_decay"] == 1e-4
    assert written["out"] == str(config.out)
    assert set(written) == set(config.as_dict()) | {"fourbit_version", "data_identity"}
    assert written["data_identity"] == data.identity(data.load("digits"))
    environment = json.loads((config.out / "env.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["device"]
    assert environment["products"] == written["products"] == "fast"
    assert all(status.name in environment["kernels"] for status in fb.backends.statuses())


def test_max_steps_ends_in_the_middle_of_an_epoch_with_a_test_result(make_config):
    config = make_config(max_steps=4, schedule="step", milestones=(0.5,))
    result = train(config)
    assert (result.stopped, result.step, result.epoch) == ("max_steps", 4, 1)
    assert result.test_accuracy is not None
    rates = [line["lr"] for line in metrics(config.out) if line["kind"] == "step"]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])  # the schedule fits the shorter run


def test_gradient_accumulation_equals_the_larger_batch_without_batch_statistics(make_config, monkeypatch):
    monkeypatch.setattr(models, "build", lambda *args, **sizes: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)
    ))  # fmt: skip
    whole = make_config("whole", epochs=1, channels_last=False)
    parts = make_config("parts", epochs=1, batch_size=16, grad_accumulation=2, channels_last=False)
    train(whole)
    train(parts)
    pairs = zip(*(load_file(c.out / "checkpoint" / "model.safetensors").values() for c in (whole, parts)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_sigterm_is_as_good_as_ctrl_c(make_config, signal_after):
    signal_after(2, signal.SIGTERM)
    assert train(make_config()).stopped == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_ctrl_c_stops_at_once(make_config, monkeypatch):
    from fourbit.train._loop import Loop

    def twice(self, *args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "_step", twice)
    with pytest.raises(KeyboardInterrupt):
        train(make_config())


def test_a_folder_that_is_not_empty_is_left_alone(make_config):
    config = make_config()
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("five years of work")
    before = snapshot(config.out)
    with pytest.raises(UserError, match="is not empty: choose another --out"):
        train(config)
    assert snapshot(config.out) == before


def test_tensorboard_gets_the_same_numbers(make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(recipe="ibm2020", epochs=1, log_to=("tensorboard",))
    train(config)
    events = EventAccumulator(str(config.out / "tb"))
    events.Reload()
    losses = [line["loss"] for line in metrics(config.out) if line["kind"] == "step"]
    assert [e.value for e in events.Scalars("loss/train")] == pytest.approx(losses)
    assert {"accuracy/test", "lr", "grad_scale_exponent/fc"} <= set(events.Tags()["scalars"])


def test_wandb_and_trackio_get_the_same_numbers(make_config, monkeypatch):
    """Through accelerate's trackers, of which these are stand-ins."""
    from accelerate import tracking

    heard: dict[str, list] = {}

    class Stand(tracking.GeneralTracker):
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name, **options):
            super().__init__()
            heard[self.name] = [(run_name, options)]

        def store_init_configuration(self, values):
            heard[self.name].append(values)

        def log(self, values, step=None, **options):
            heard[self.name].append((step, values))

        def finish(self):
            heard[self.name].append("finish")

    stands = {name: type(name, (Stand,), {"name": name}) for name in ("wandb", "trackio")}
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", stands)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: list(stands))
    config = make_config(recipe="ibm2020", epochs=1, log_to=("wandb", "trackio"))
    train(config)
    losses = [line["loss"] for line in metrics(config.out) if line["kind"] == "step"]
    for name, more in (("wandb", {"dir": str(config.out)}), ("trackio", {"resume": "never"})):
        start, settings, *points, end = heard[name]
        assert start == ("fourbit", {"name": config.out.name, **more}) and end == "finish"
        assert settings["recipe"] == "ibm2020"
        assert [values["loss/train"] for _, values in points if "loss/train" in values] == losses
        assert len({step for step, values in points if "loss/train" in values}) == len(losses)
    assert not (config.out / "tb").exists()
    whole = train(make_config(epochs=1, out=config.out.parent / "whole", log_to=("trackio",)))
    tests = [(step, values) for step, values in heard["trackio"][2:-1] if "loss/test" in values]
    assert tests == [(whole.step, {"loss/test": whole.test_loss, "accuracy/test": whole.test_accuracy})]
    cut = train(make_config(max_steps=1, out=config.out.parent / "cut", log_to=("trackio",)))
    assert (1, {"loss/test": cut.test_loss, "accuracy/test": cut.test_accuracy}) in heard["trackio"]

    def fails(tracker):
        raise RuntimeError("no key\nand more")

    monkeypatch.setattr(stands["wandb"], "start", fails)
    heard.clear()
    with pytest.raises(UserError, match=r"wandb does not start \(no key\)"):
        train(make_config(out=config.out.parent / "key", log_to=("trackio", "wandb")))
    assert heard["trackio"][-1] == "finish"
    with pytest.raises(UserError, match="tensorboard is not installed: pip install 'fourbit"):
        train(make_config(out=config.out.parent / "b", log_to=("tensorboard",)))
    with pytest.raises(UserError, match="unknown tracker 'wand': did you mean 'wandb'"):
        train(make_config(log_to=("wand",)))


def test_the_report_reads_what_a_run_wrote(make_config):
    from fourbit.report import summarize

    config = make_config(recipe="ibm2020", epochs=1)
    result = train(config)
    (summary,) = summarize([config.out])
    assert result.test_accuracy is not None
    assert summary.metric == "accuracy %"
    assert summary.metric_mean == pytest.approx(100 * result.test_accuracy)


def test_the_default_folder_names_the_run():
    config = validated(TrainConfig(model="digits_cnn", data="digits", seed=4))
    assert str(config.out) == "runs/digits_cnn-digits-ibm2020-seed4"
