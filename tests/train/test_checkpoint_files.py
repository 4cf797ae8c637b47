"""Checkpoints survive full disks and power cuts, and what is no checkpoint is recognised."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from run_files import metrics, snapshot, tensors

from fourbit.errors import UserError
from fourbit.train import _checkpoint, train
from fourbit.train._checkpoint import Checkpoint
from fourbit.train._folder import RunFolder


def newest_place(path: Path) -> Path:
    found = _checkpoint.newest(path, lambda checkpoint: None)
    assert found is not None
    return found[0]


def newest(path: Path) -> Checkpoint | None:
    found = _checkpoint.newest(path, lambda checkpoint: None)
    return None if found is None else found[1]


def a_checkpoint(value: float = 1.0) -> Checkpoint:
    weight = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return Checkpoint({"w": weight}, {"optimizer.0.m": weight * 2, "t": torch.tensor(3.0)}, {"step": value})


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_saved_comes_back_with_its_memory_layout(tmp_path):
    _checkpoint.save(tmp_path / "c", a_checkpoint())
    back = _checkpoint.load(tmp_path / "c")
    assert torch.equal(back.model["w"], a_checkpoint().model["w"])
    assert back.training["optimizer.0.m"].is_contiguous(memory_format=torch.channels_last)
    assert back.state == {"step": 1.0}


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    w = torch.arange(6.0)
    _checkpoint.save(tmp_path / "c", Checkpoint({"a": w, "b": w, "c": w[2:]}))
    assert torch.equal(_checkpoint.load(tmp_path / "c").model["c"], w[2:])


@pytest.mark.parametrize("fail_at", range(1, 5))
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, fail_at):
    _checkpoint.save(tmp_path / "c", a_checkpoint(1.0))
    calls, fsync = 0, os.fsync

    def fail(handle: int) -> None:
        nonlocal calls
        calls += 1
        full_disk() if calls == fail_at else fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"the disk is full: .* could not be written; free some space"):
        _checkpoint.save(tmp_path / "c", a_checkpoint(2.0))
    assert _checkpoint.load(tmp_path / "c").state == {"step": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_power_cut_between_two_renames_loses_nothing(tmp_path, monkeypatch, fail_at):
    path = tmp_path / "c"
    _checkpoint.save(path, a_checkpoint(1.0))
    calls, rename = 0, os.rename

    def cut(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        _checkpoint.save(path, a_checkpoint(2.0))
    found = newest(path)
    assert found is not None and found.state["step"] == 2.0  # it was complete
    monkeypatch.undo()
    _checkpoint.adopt(path, newest_place(path))
    _checkpoint.save(path, a_checkpoint(3.0))
    assert _checkpoint.load(path).state == {"step": 3.0}
    assert _checkpoint.load(tmp_path / "c.old").state == {"step": 2.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.old"]


def test_the_last_two_are_kept_unless_one_is_kept_by_its_name(tmp_path):
    for step in (1.0, 2.0, 3.0):
        _checkpoint.save(tmp_path / "c", a_checkpoint(step))
        _checkpoint.save(tmp_path / "epoch-1", a_checkpoint(step), keep_last=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.old", "epoch-1"]
    assert _checkpoint.load(tmp_path / "c.old").state == {"step": 2.0}
    assert newest(tmp_path / "elsewhere") is None


def test_a_checkpoint_half_removed_does_not_count(tmp_path, monkeypatch):
    _checkpoint.save(tmp_path / "c", a_checkpoint(1.0))
    _checkpoint.save(tmp_path / "c", a_checkpoint(2.0))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _checkpoint._remove(tmp_path / "c.old")
    lose_state(tmp_path / "c")
    with pytest.raises(UserError, match="is damaged"):
        newest(tmp_path / "c")


def test_what_the_checkpoint_counts_on_is_on_the_disk_before_it(make_config, monkeypatch):
    """A power cut must not leave metrics.jsonl shorter than the checkpoint says."""
    synced, fsync = [], os.fsync

    def noted(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    train(make_config(max_steps=1))
    assert synced.index("metrics.jsonl") < synced.index("state.json") < synced.index("checkpoint.new")
    assert synced[-1] == "run"  # the folder, after the renames


def test_a_run_that_meets_a_full_disk_keeps_its_last_checkpoint_and_goes_on_later(make_config, monkeypatch):
    whole, parts = make_config("whole"), make_config("parts")
    train(whole)
    saves, save = 0, _checkpoint.save

    def second_fails(*args: object, **options: object) -> None:
        nonlocal saves
        saves += 1
        with monkeypatch.context() as patch:
            if saves == 2:
                patch.setattr(os, "fsync", full_disk)
            save(*args, **options)

    monkeypatch.setattr(_checkpoint, "save", second_fails)
    with pytest.raises(UserError, match=r"the disk is full: .*; the last checkpoint is intact"):
        train(parts)
    assert _checkpoint.load(parts.out / "checkpoint").state["loop"]["epoch"] == 1
    train(parts, resume=True)
    assert tensors(parts.out) == tensors(whole.out)
    assert metrics(parts.out) == metrics(whole.out)


def test_a_full_disk_at_the_first_checkpoint_claims_no_earlier_one(make_config, monkeypatch):
    save = _checkpoint.save

    def fails(*args: object, **options: object) -> None:
        monkeypatch.setattr(os, "fsync", full_disk)
        save(*args, **options)

    monkeypatch.setattr(_checkpoint, "save", fails)
    with pytest.raises(UserError, match="the disk is full") as caught:
        train(make_config(epochs=1))
    assert "checkpoint is intact" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_metrics_is_one_sentence(make_config, monkeypatch):
    create = RunFolder.create

    def onto_full_device(self, *args):
        create(self, *args)
        (self.path / "metrics.jsonl").unlink()
        (self.path / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(RunFolder, "create", onto_full_device)
    with pytest.raises(UserError, match="the disk is full"):
        train(make_config())


def damage_model(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "model.safetensors").write_bytes(data)


def cut_training(path: Path) -> None:
    (path / "training.safetensors").write_bytes((path / "training.safetensors").read_bytes()[:100])


def lose_model(path: Path) -> None:
    (path / "model.safetensors").unlink()


def change_state(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"step": ', '"step": 1'))


def cut_state(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text()[:50])


def lose_state(path: Path) -> None:
    (path / "state.json").unlink()


@pytest.mark.parametrize("damage", [damage_model, cut_training, lose_model, change_state, cut_state, lose_state])
def test_a_damaged_checkpoint_is_one_sentence_and_stays_untouched(make_config, damage):
    config = make_config(epochs=1)
    train(config)
    damage(config.out / "checkpoint")
    before = snapshot(config.out)
    with pytest.raises(UserError, match=r"is damaged .*: restore it, or start anew with another --out"):
        train(config, resume=True)
    assert snapshot(config.out) == before


@pytest.mark.parametrize("damage", [damage_model, cut_training, lose_model, change_state, cut_state, lose_state])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(make_config, damage):
    whole, parts = make_config("whole"), make_config("parts")
    train(whole)
    train(parts)
    damage(parts.out / "checkpoint")
    with pytest.warns(UserWarning, match=r"checkpoint is damaged .*going on from the one before it, .*checkpoint\.old"):
        train(parts, resume=True)
    assert tensors(parts.out) == tensors(whole.out)
    assert metrics(parts.out) == metrics(whole.out)


def test_the_checkpoint_of_another_seed_is_named_and_not_trained_on(make_config):
    whole, parts, other = make_config("whole"), make_config("parts"), make_config("other", seed=1)
    for config in (whole, parts, other):
        train(config)
    for name in ("checkpoint", "checkpoint.old"):
        shutil.rmtree(parts.out / name)
        shutil.copytree(other.out / name, parts.out / name)
    with pytest.raises(UserError, match="is of another run, with seed 1, not 0: restore this run's own"):
        train(parts, resume=True)
    shutil.rmtree(parts.out / "checkpoint.old")
    shutil.copytree(whole.out / "checkpoint.old", parts.out / "checkpoint.old")
    with pytest.warns(UserWarning, match="is of another run, with seed 1"):
        train(parts, resume=True)
    assert tensors(parts.out) == tensors(whole.out)
    (other.out / "checkpoint" / "model.safetensors").rename(parts.out / "checkpoint" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model\.safetensors does not match its checksum"):
        train(parts, resume=True)


def test_a_run_killed_before_it_wrote_its_configuration_starts_anew(make_config):
    config = make_config(max_steps=1)
    config.out.mkdir()
    (config.out / "config.json.tmp").write_text('{"mod')
    train(config)
    assert not list(config.out.glob("*.tmp"))


def foreign_version(path: Path) -> None:
    (path / "state.json").write_text(json.dumps({"fourbit_checkpoint": 99}))


def foreign_json(path: Path) -> None:
    (path / "state.json").write_text(json.dumps(["not", "ours"]))


@pytest.mark.parametrize("foreign", [foreign_version, foreign_json])
def test_a_foreign_checkpoint_is_one_sentence(make_config, foreign):
    config = make_config(max_steps=1)
    train(config)
    foreign(config.out / "checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint of this version of fourbit"):
        train(config, resume=True)


def test_a_pickle_in_place_of_the_weights_is_not_executed(make_config, tmp_path):
    config = make_config(max_steps=1)
    train(config)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (config.out / "checkpoint" / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="is damaged"):
        train(config, resume=True)
    assert not (tmp_path / "executed").exists()


def test_the_checkpoint_of_another_model_is_one_sentence(make_config):
    config, other = make_config("a", max_steps=1), make_config("b", max_steps=1, model="resnet20")
    train(config)
    train(other)
    shutil.rmtree(config.out / "checkpoint")
    shutil.copytree(other.out / "checkpoint", config.out / "checkpoint")
    with pytest.raises(UserError, match="is of another run, with model resnet20"):
        train(config, resume=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: choose another --out"):
        train(make_config("file"))
    with pytest.raises(UserError, match="could not be written"):
        train(make_config("file/run"))
