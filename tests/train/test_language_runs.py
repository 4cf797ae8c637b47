"""Training a language model: it learns, its state goes from window to window and through a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fourbit.errors import UserError
from fourbit.train import CompareConfig, TrainConfig, compare, train
from fourbit.train._validate import validated
from fourbit.train.tasks import make_task
from fourbit.train.tasks._language import LanguageModelling


@pytest.fixture
def folder(tmp_path) -> Path:
    """A text whose next word follows from the one before."""
    line = "one two three four five six seven\n"
    (tmp_path / "ptb.train.txt").write_text(line * 60)
    (tmp_path / "ptb.test.txt").write_text(line * 10)
    return tmp_path


def config(folder: Path, out: Path | None = None, **changes) -> TrainConfig:
    values = {
        "model": "lstm_200", "data": "ptb", "data_dir": folder, "batch_size": 4, "sequence_length": 6, "epochs": 2,
        "optimizer": "adam", "lr": 0.003, "weight_decay": 0.0, "log_to": (), "threads": 1,
    }  # fmt: skip
    return TrainConfig(**{**values, "out": out, **changes})


def test_a_step_that_is_left_out_leaves_the_carried_state_alone(folder):
    """After a poisoned window the third starts from the state behind the first, not from NaN."""
    task = make_task(validated(config(folder, recipe="fp32")), torch.device("cpu"), 0, 1)
    model, batches = task.build(), list(task.batches("train"))
    task.loss(model, batches[0])
    behind, restore = [t.clone() for t in task._carried["train"]], task.snapshot()
    with torch.no_grad():
        bias = next(model.parameters())
        kept = bias.clone()
        bias.fill_(math.nan)
        task.loss(model, batches[1])
        bias.copy_(kept)
    assert not all(t.isfinite().all() for t in task._carried["train"])
    restore()
    for t, before in zip(task._carried["train"], behind, strict=True):
        assert torch.equal(t, before)


def test_training_goes_on_after_a_window_that_is_left_out(folder, tmp_path, monkeypatch):
    loss, seen = LanguageModelling.loss, []

    def poisoned(self, model, batch, *args):
        seen.append(0)
        if len(seen) == 2 and model.training:
            self._carried["train"] = tuple(torch.full_like(t, math.nan) for t in self._carried["train"])
        return loss(self, model, batch, *args)

    monkeypatch.setattr(LanguageModelling, "loss", poisoned)
    result = train(config(folder, tmp_path / "run", epochs=1, on_nonfinite="skip", progress=False))
    assert result.stopped == "done" and result.skipped == 1 and math.isfinite(result.test_loss)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "ibm2020", "luq"])
def test_it_learns_what_follows_and_reports_perplexity(folder, tmp_path, recipe, capsys):
    result = train(config(folder, tmp_path / "run", recipe=recipe, epochs=6))
    assert result.test_accuracy > 0.8
    assert math.exp(result.test_loss) < 1.7  # 9 by guessing
    assert "perplexity" in capsys.readouterr().out


def test_the_state_goes_from_window_to_window_and_starts_anew_with_the_epoch(folder):
    task = make_task(validated(config(folder, recipe="fp32")), torch.device("cpu"), 0, 1)
    torch.manual_seed(0)
    model = task.build()
    batches = list(task.batches("train"))
    with torch.no_grad():
        task._carried.clear()
        first = task.loss(model, batches[0])[0]
        second = task.loss(model, batches[1])[0]
        x = torch.cat((batches[0][0], batches[1][0]))
        logits, _ = model(x)
    expected = [torch.nn.functional.cross_entropy(part.flatten(0, 1), y.flatten()) for part, (_, y) in
                zip(logits.split(6), batches[:2], strict=True)]  # fmt: skip
    torch.testing.assert_close(torch.stack((first, second)), torch.stack(expected))
    next(task.batches("train", 1))
    assert not task.state_tensors(lambda t: t)


def test_a_run_that_was_stopped_inside_an_epoch_goes_on_to_the_bit(folder, tmp_path, monkeypatch):
    whole = train(config(folder, tmp_path / "whole", recipe="ibm2020"))
    from fourbit.train import _loop

    step, count = _loop.Loop._step, 0

    def stopping(self, *arguments):
        nonlocal count
        step(self, *arguments)
        count += 1
        if count == 7:
            self.stop.requested = True

    monkeypatch.setattr(_loop.Loop, "_step", stopping)
    part = train(config(folder, tmp_path / "part", recipe="ibm2020"))
    assert part.stopped == "interrupted" and part.step == 7
    monkeypatch.setattr(_loop.Loop, "_step", step)
    resumed = train(config(folder, tmp_path / "part", recipe="ibm2020"), resume=True)
    assert (resumed.test_loss, resumed.test_accuracy) == (whole.test_loss, whole.test_accuracy)


def test_every_process_gets_the_state_of_its_own_rows_back(folder):
    settings = validated(config(folder, recipe="fp32", batch_size=8))
    tasks = [make_task(settings, torch.device("cpu"), rank, 2) for rank in range(2)]
    torch.manual_seed(0)
    model = tasks[0].build()
    for task in tasks:
        task.loss(model, next(task.batches("train")))
    before = [task.state_tensors(lambda t: t) for task in tasks]
    whole = {key: torch.cat([one[key] for one in before]) for key in before[0]}
    for task, own in zip(tasks, before, strict=True):
        task.load_state_tensors(whole)
        assert all(torch.equal(task.state_tensors(lambda t: t)[key], own[key]) for key in own)
    assert not torch.equal(before[0]["carried.0"], before[1]["carried.0"])


def test_a_comparison_is_a_table_of_perplexities(folder, tmp_path, capsys):
    shared = {
        k: getattr(config(folder), k)
        for k in ("model", "data", "data_dir", "batch_size", "sequence_length", "optimizer")
    }
    found = compare(
        CompareConfig(**shared, epochs=1, recipes=("fp32", "ibm2020"), seeds=(0,), out=tmp_path / "c", log_to=())
    )
    assert "test perplexity" in (tmp_path / "c" / "table.md").read_text()
    assert "perplexity" in capsys.readouterr().out
    stored = json.loads((tmp_path / "c" / "table.json").read_text())
    assert stored[1]["test_perplexity_mean"] == pytest.approx(found.rows[1].mean)
    assert found.rows[1].difference == pytest.approx(found.rows[1].values[0] - found.rows[0].values[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet20"}, "resnet20 reads images, but ptb has text: choose one of gpt, lstm_200, lstm_650"),
        ({"data": "digits", "data_dir": None}, "lstm_200 reads text, but digits has images"),
        ({"sequence_length": 0}, "sequence_length is 0, but must be at least 1"),
        ({"batch_size": 1000}, "each row needs two"),
        ({"eval_batch_size": 500}, "batch size is 500, but test of ptb has 80 tokens"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(config(folder, tmp_path / "run", **changes))
