"""A run that was interrupted and resumed equals one that was not: weights, optimizer, generators and metrics, to the bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal

import pytest
from run_files import STEPS_PER_EPOCH, metrics, snapshot, tensors

from fourbit import data
from fourbit.errors import UserError
from fourbit.train import load, train
from fourbit.train._folder import RunFolder
from fourbit.train._loop import Loop

RECIPES = ("fp32", "ibm2020", "luq", "ibm2020-global-scale", "ibm2020-channel-gradscale")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_interrupted_in_the_middle_of_an_epoch_ends_as_if_it_never_was(make_config, signal_after, recipe):
    whole, parts = make_config("whole", recipe=recipe), make_config("parts", recipe=recipe)
    train(whole)
    signal_after(STEPS_PER_EPOCH + 2)
    stopped = train(parts)
    assert (stopped.stopped, stopped.step) == ("interrupted", STEPS_PER_EPOCH + 2)
    assert metrics(parts.out)[-1]["stopped"] == "interrupted"
    assert train(parts, resume=True).stopped == "done"
    assert tensors(parts.out) == tensors(whole.out)
    assert metrics(parts.out) == metrics(whole.out)


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adam"},
        {"optimizer": "lars", "weight_decay": 1e-3},
        {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": 3},
        {"nesterov": True, "gradient_clip": 0.5, "label_smoothing": 0.1},
        {"grad_accumulation": 2, "batch_size": 16, "log_every": 2},
        {"channels_last": False, "autocast": "bf16"},
        {"model": "resnet20", "max_steps": 5, "on_nonfinite": "skip"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_resuming_is_exact_with_every_option(make_config, signal_after, fields):
    whole, parts = make_config("whole", **fields), make_config("parts", **fields)
    train(whole)
    signal_after(2)
    assert train(parts).step == 2
    train(parts, resume=True)
    assert tensors(parts.out) == tensors(whole.out)
    assert metrics(parts.out) == metrics(whole.out)


def test_resuming_twice_in_one_epoch_is_exact(make_config, signal_after):
    whole, parts = make_config("whole", log_every=4), make_config("parts", log_every=4)
    train(whole)
    signal_after(1)
    train(parts)
    signal_after(1)
    train(parts, resume=True)
    train(parts, resume=True)
    assert metrics(parts.out) == metrics(whole.out)
    assert len(json.loads((parts.out / "env.json").read_text())["resumed"]) == 2


def test_a_run_killed_after_a_checkpoint_drops_the_lines_that_came_later(make_config, monkeypatch):
    whole, parts = make_config("whole"), make_config("parts")
    train(whole)
    step = Loop._step

    def killed(self, *args):
        if self.state.step == STEPS_PER_EPOCH + 2:
            raise RuntimeError("power cut")
        step(self, *args)

    monkeypatch.setattr(Loop, "_step", killed)
    with pytest.raises(RuntimeError, match="power cut"):
        train(parts)
    assert metrics(parts.out)[-1]["step"] == STEPS_PER_EPOCH + 2  # later than the checkpoint
    monkeypatch.setattr(Loop, "_step", step)
    train(parts, resume=True)
    assert metrics(parts.out) == metrics(whole.out)
    assert tensors(parts.out) == tensors(whole.out)


def test_a_run_killed_before_its_first_checkpoint_starts_again(make_config, monkeypatch):
    config = make_config(epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", lambda self: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError):
            train(config)
    train(config, resume=True)
    train(whole := make_config("whole", epochs=1))
    assert metrics(config.out) == metrics(whole.out)


def test_a_checkpoint_that_has_gone_is_an_error_and_not_a_fresh_start(make_config):
    config = make_config(epochs=2)
    train(config)
    shutil.rmtree(config.out / "checkpoint")
    with pytest.warns(UserWarning, match="is missing or unreadable.*going on from the one before it"):
        train(config, resume=True)
    for name in ("checkpoint", "checkpoint.old"):
        shutil.rmtree(config.out / name)
    with pytest.raises(UserError, match="no checkpoint any more"):
        train(config, resume=True)


def test_an_interrupt_during_the_evaluation_saves_the_finished_epoch(make_config, monkeypatch):
    whole, parts = make_config("whole", epochs=1), make_config("parts", epochs=1)
    train(whole)
    evaluate = Loop._evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_evaluate", lambda self: signal.raise_signal(signal.SIGINT) or evaluate(self))
        assert train(parts).stopped == "interrupted"
    train(parts, resume=True)
    assert metrics(parts.out) == metrics(whole.out)


def test_a_finished_run_is_left_as_it_is(make_config):
    config = make_config(epochs=1)
    first = train(config)
    before = snapshot(config.out)
    assert train(config, resume=True) == first
    assert snapshot(config.out) == before


def test_a_run_goes_on_with_its_own_data_alone(make_config, signal_after, monkeypatch, few_digits):
    """Other labels have the same shapes: only what is in the files tells them apart."""
    config = make_config()
    signal_after(1)
    train(config)
    before = snapshot(config.out)
    other = dataclasses.replace(few_digits, train_y=few_digits.train_y.flip(0))
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", lambda name, folder=None: other)
        with pytest.raises(UserError, match="was made with other examples, labels or vocabulary of digits"):
            train(config, resume=True)
        with pytest.raises(UserError, match="was made with other examples"):
            load(config.out)
    assert snapshot(config.out) == before
    written = json.loads((config.out / "config.json").read_text())
    del written["data_identity"]  # of a run that began with an earlier version
    (config.out / "config.json").write_text(json.dumps(written))
    assert train(config, resume=True).stopped == "done"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_is_not_shortened(make_config, signal_after, interrupted):
    if interrupted:
        signal_after(6)
    train(make_config(epochs=3 if interrupted else 2, schedule="constant"))
    before = snapshot(make_config().out)
    with pytest.raises(
        UserError, match=r"has trained for 6 steps, more than the 3 that are asked for: ask for as many"
    ):
        train(make_config(epochs=1, schedule="constant"), resume=True)
    assert snapshot(make_config().out) == before


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_schedule_without_an_end_lets_a_finished_run_be_prolonged(make_config, schedule):
    train(make_config("a", epochs=1, schedule=schedule))
    assert train(make_config("a", epochs=2, schedule=schedule), resume=True).step == 2 * STEPS_PER_EPOCH
    train(whole := make_config("b", epochs=2, schedule=schedule))
    assert tensors(whole.out.parent / "a") == tensors(whole.out)


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 1), ("lr", 0.2), ("recipe", "luq"), ("model", "resnet20"), ("epochs", 3)]
)
def test_resuming_with_other_settings_names_the_field(make_config, signal_after, field, value):
    config = make_config()
    signal_after(1)
    train(config)
    before = snapshot(config.out)
    with pytest.raises(UserError, match=f"was made with {field} .*, not {value}"):
        train(make_config(**{field: value}), resume=True)
    assert snapshot(config.out) == before


def without_newer_fields(folder):
    """As an earlier version would have written config.json."""
    path = folder / "config.json"
    older = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("products", "fuse")}
    path.write_text(json.dumps(older | {"observe_every": 100}))


def test_a_run_of_a_version_without_the_newer_fields_goes_on(make_config, signal_after):
    from fourbit.report import summarize

    config = make_config()
    signal_after(1)
    train(config)
    without_newer_fields(config.out)
    with pytest.raises(UserError, match="was made with products fast, not exact"):
        train(make_config(products="exact"), resume=True)
    assert train(config, resume=True).stopped == "done"
    without_newer_fields(config.out)
    assert summarize([config.out])[0].n == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint", "checkpoint/model.safetensors"])
def test_a_link_out_of_the_folder_is_not_written_through(make_config, tmp_path, name):
    config = make_config(epochs=1)
    train(config)
    inside, outside = config.out / name, tmp_path / "elsewhere"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(UserError, match="is a link that leads out of the run's folder"):
        train(config, resume=True)
    with pytest.raises(UserError, match="is a link that leads out of the run's folder"):
        load(config.out)


def test_a_config_of_another_program_is_no_run(make_config):
    config = make_config()
    config.out.mkdir()
    (config.out / "config.json").write_text('{"architectures": ["Bert"]}')
    before = snapshot(config.out)
    with pytest.raises(UserError, match="is not the configuration of a run"):
        train(config, resume=True)
    assert snapshot(config.out) == before


def test_what_does_not_touch_the_numbers_may_change_on_resume(make_config, signal_after):
    signal_after(1)
    train(make_config())
    assert train(make_config(log_every=3, observe_every=0, on_nonfinite="ignore"), resume=True).stopped == "done"


def test_there_must_be_something_to_resume(make_config):
    config = make_config()
    with pytest.raises(UserError, match="no run to go on with"):
        train(config, resume=True)
    assert not config.out.exists()


def test_two_processes_do_not_train_in_one_folder(make_config):
    config = make_config(epochs=1)
    with RunFolder(config.out).held(), pytest.raises(UserError, match="another process is training in"):
        train(config)
    assert not any(config.out.iterdir())
    train(config)
    before = snapshot(config.out)
    with RunFolder(config.out).held(), pytest.raises(UserError, match="another process is training in"):
        train(config, resume=True)
    assert snapshot(config.out) == before
