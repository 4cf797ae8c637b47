"""Comparisons: their table, and that they go on where they were."""

from __future__ import annotations

import json
import math
import shutil
import statistics

import pytest
import torch
from run_files import STEPS_PER_EPOCH, snapshot

from fourbit.errors import UserError
from fourbit.report import summarize
from fourbit.train import CompareConfig, _compare, collect, compare
from fourbit.train._folder import RunFolder
from fourbit.train._loop import Loop
from fourbit.train._result import Result


@pytest.fixture
def small(tmp_path):
    """`small(**fields)`: a comparison of one-epoch runs."""

    def make(**fields):
        task = {"model": "digits_cnn", "data": "digits", "epochs": 1, "batch_size": 32, "log_to": ()}
        plan = {"recipes": ("fp32", "int4-fwd", "ibm2020"), "seeds": (0, 1), "observe_every": 0, "out": tmp_path / "c"}
        return CompareConfig(**{**task, **plan, **fields})

    return make


def test_the_table_has_means_deviations_and_paired_differences(small, capsys):
    comparison = compare(small())
    fp32, int4, ibm = comparison.rows
    assert [row.recipe for row in comparison.rows] == ["fp32", "int4-fwd", "ibm2020"]
    assert fp32.difference is None
    differences = [int4.values[seed] - fp32.values[seed] for seed in (0, 1)]
    assert int4.difference == pytest.approx(statistics.mean(differences))
    assert int4.difference_half == pytest.approx(12.706 * statistics.stdev(differences) / 2**0.5)
    assert ibm.std == pytest.approx(statistics.stdev(ibm.values.values()))
    assert ibm.seconds_per_epoch > 0
    text = (comparison.folder / "table.md").read_text()
    assert f"| ibm2020 | {100 * ibm.mean:.2f} | {100 * ibm.std:.2f} | 2 |" in text
    stored = json.loads((comparison.folder / "table.json").read_text())
    assert stored[2]["test_accuracy_by_seed"] == {"0": ibm.values[0], "1": ibm.values[1]}
    assert "ibm2020" in capsys.readouterr().out


def test_an_interrupted_comparison_goes_on_where_it_was(small, signal_after, tmp_path):
    whole = compare(small(out=tmp_path / "whole"))
    signal_after(2 * STEPS_PER_EPOCH + 2)
    assert compare(small()).interrupted
    done = snapshot(tmp_path / "c" / "fp32-seed0")
    assert not (tmp_path / "c" / "table.md").exists()
    parts = compare(small())
    assert snapshot(tmp_path / "c" / "fp32-seed0") == done
    assert [row.values for row in parts.rows] == [row.values for row in whole.rows]


def test_a_finished_comparison_makes_no_run_again(small, monkeypatch):
    first = compare(small())
    monkeypatch.setattr(_compare, "run", lambda *_, **__: pytest.fail("a run was started"))
    assert compare(small()) == first


def test_more_seeds_are_added_to_what_is_there(small):
    compare(small(seeds=(0,), recipes=("fp32",)))
    rows = compare(small(seeds=(0, 3), recipes=("fp32", "int4-fwd"))).rows
    assert [sorted(row.values) for row in rows] == [[0, 3], [0, 3]]


def test_a_run_that_diverges_is_noted_and_the_others_go_on(small, monkeypatch, capsys):
    run = _compare.run

    def explode(config, **options):
        if (config.recipe, config.seed) == ("int4-fwd", 1):
            config = config.__class__(**{**config.__dict__, "lr": 1e30})
        return run(config, **options)

    monkeypatch.setattr(_compare, "run", explode)
    rows = {row.recipe: row for row in compare(small()).rows}
    assert rows["int4-fwd"].diverged == (1,)
    assert sorted(rows["int4-fwd"].values) == [0]
    assert rows["int4-fwd"].std is None
    assert len(rows["ibm2020"].values) == 2
    assert "int4-fwd: diverged with seed 1" in capsys.readouterr().out


def test_a_run_that_diverged_is_tried_again_where_nan_is_to_be_skipped(small, monkeypatch):
    plan = {"recipes": ("fp32",), "seeds": (0,)}
    run, asked = _compare.run, []

    def poisoned(config, **options):
        asked.append((config.on_nonfinite, options["resume"]))
        with monkeypatch.context() as patch:
            step = Loop._step
            patch.setattr(Loop, "_step", lambda self, *args: spoil(self) or step(self, *args))
            return run(config, **options)

    def spoil(loop):
        if loop.state.step == 1:
            forward = loop.session.task.loss
            loop.session.task.loss = lambda *args, **kwargs: bad(forward, loop, *args, **kwargs)

    def bad(forward, loop, *args, **kwargs):
        loss, counts = forward(*args, **kwargs)
        return (loss * math.nan, counts * math.nan) if loop.state.step == 1 else (loss, counts)

    monkeypatch.setattr(_compare, "run", poisoned)
    assert compare(small(**plan)).rows[0].diverged == (0,)
    assert compare(small(**plan)).rows[0].diverged == (0,)  # and not before
    assert compare(small(**plan, on_nonfinite="skip")).rows[0].diverged == ()
    assert asked == [("stop", False), ("skip", True)]


def test_a_run_that_diverged_and_cannot_go_on_stays_as_it_is(small, monkeypatch):
    plan = {"recipes": ("fp32",), "seeds": (0,), "epochs": 2}
    step = Loop._step
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", lambda self, *args: blow_up(self) or step(self, *args))
        compare(small(**plan))
    shutil.rmtree(small().out / "fp32-seed0" / "checkpoint")  # as in results that were copied
    assert compare(small(**plan, on_nonfinite="skip")).rows[0].diverged == (0,)


def blow_up(loop):
    if loop.state.step == STEPS_PER_EPOCH + 1:
        with torch.no_grad():
            next(loop.session.model.parameters()).fill_(math.nan)


def test_models_of_another_library_are_compared(small, few_digits):
    pytest.importorskip("transformers")
    name = "hf:vit?num_hidden_layers=2&hidden_size=16&num_attention_heads=2&intermediate_size=32&patch_size=4"
    rows = compare(small(model=name, recipes=("fp32", "ibm2020"), seeds=(0,), max_steps=1)).rows
    assert [row.recipe for row in rows] == ["fp32", "ibm2020"]


def test_without_fp32_there_is_no_difference(small):
    (row,) = compare(small(recipes=("int4-fwd",), seeds=(0,))).rows
    assert row.difference is None
    assert row.std is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipes": ("fp32", "ibm202")}, "unknown recipe 'ibm202'"),
        ({"recipes": ()}, "recipes is empty"),
        ({"seeds": (1, 1)}, "seeds has 1 twice"),
        ({"seeds": (0, -1)}, "seed is -1, but must be"),
        ({"model": "vgg16", "recipes": ("fp32", "ibm2020-1x1fp8")}, "matches no layer of this model"),
    ],
)
def test_a_plan_that_cannot_work_is_rejected_before_the_first_run(small, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        compare(small(**fields))
    assert not (tmp_path / "c").exists()


def test_runs_with_other_settings_are_not_mixed_in(small, tmp_path):
    compare(small(recipes=("fp32",), seeds=(0,)))
    before = snapshot(tmp_path / "c")
    with pytest.raises(UserError, match=r"made with lr 0\.1, not 0\.2"):
        compare(small(recipes=("int4-fwd", "fp32"), seeds=(0,), lr=0.2))
    assert snapshot(tmp_path / "c") == before


@pytest.fixture
def texts(tmp_path):
    """`texts(name, words)`: a folder with a corpus of these words."""

    def write(name, words):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"ptb.{split}.txt").write_text(f"{words}\n" * 40)
        return folder

    return write


def test_runs_of_other_data_are_not_mixed_in(small, texts, monkeypatch):
    """A folder elsewhere with the same content is as good; finished runs are compared with no others, nor unfinished ones."""
    mine, copy, other = texts("a", "one two three"), texts("b", "one two three"), texts("c", "one two three four")
    plan = {"model": "lstm_200", "data": "ptb", "batch_size": 4, "recipes": ("fp32",), "seeds": (0,), "max_steps": 1}
    compare(small(**plan, data_dir=mine))
    with monkeypatch.context() as patch:
        patch.setattr(_compare, "run", lambda *_, **__: pytest.fail("a run was started"))
        compare(small(**plan, data_dir=copy))
        compare(small(**plan))  # without a folder: they are finished, and nobody needs the data
        with pytest.raises(UserError, match=r"other examples, labels or vocabulary of ptb: it read .*/a, not .*/c"):
            compare(small(**plan, data_dir=other))
    (mine / "ptb.train.txt").write_text("one two three four\n" * 40)
    for later in ({"seeds": (0, 1)}, {"seeds": (1, 0)}, {"recipes": ("ibm2020",)}):  # whichever comes first
        with pytest.raises(UserError, match=r"what .*/a holds has changed since then"):
            compare(small(**plan | later, data_dir=mine))
    assert [p.name for p in small().out.iterdir() if p.is_dir()] == ["fp32-seed0"]
    compare(small(**plan | {"seeds": (2,)}, data_dir=mine, out=small().out / "apart"))
    (small().out / "apart" / "fp32-seed2").rename(small().out / "fp32-seed2")
    with pytest.raises(UserError, match=r"fp32-seed0 and .*fp32-seed2 were made with different examples"):
        collect(small(**plan, data_dir=mine))


def test_what_was_found_before_is_collected(small):
    compare(small(recipes=("fp32", "int4-fwd"), seeds=(0,)))
    compare(small(recipes=("fp32",), seeds=(1,)))
    RunFolder(small().out / "fp32-seed7", data="x").create(small().run("fp32", 7), {})  # under way
    (small().out / "notes").mkdir()
    (small().out / "fp32-seedling").mkdir()
    edited = small().out / "fp32-seed7" / "config.json"
    edited.write_text(edited.read_text().replace('"data_identity": "x",', ""))
    rows = collect(small(recipes=("fp32", "int4-fwd", "ibm2020"), seeds=(5,))).rows
    assert [(row.recipe, sorted(row.values), row.diverged) for row in rows] == [
        ("fp32", [0, 1], ()),
        ("int4-fwd", [0], ()),
    ]
    assert collect(small(lr=0.7)).rows == ()


def test_data_can_be_refused_even_where_all_runs_are_there(small):
    def refuse(found):
        raise UserError(f"{found.num_classes} classes are too few")

    with pytest.raises(UserError, match="10 classes are too few"):
        compare(small(), check_data=refuse)
    assert not (small().out / "fp32-seed0").exists()
    compare(small(recipes=("fp32",)))
    with pytest.raises(UserError, match="10 classes are too few"):
        compare(small(recipes=("fp32",)), check_data=refuse)


def test_a_foreign_folder_in_the_way_is_left_alone(small, tmp_path):
    (tmp_path / "c" / "ibm2020-seed1").mkdir(parents=True)
    (tmp_path / "c" / "ibm2020-seed1" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"ibm2020-seed1 is not empty: choose another --out\.$"):
        compare(small())
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["ibm2020-seed1"]


def test_the_time_of_an_epoch_is_that_of_the_median_one(small):
    compare(small(epochs=3, recipes=("fp32",), seeds=(0,)))
    path = small().out / "fp32-seed0" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, seconds in zip((line for line in lines if line["kind"] == "epoch"), (50.0, 2.0, 3.0), strict=True):
        line["seconds"] = seconds
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = compare(small(epochs=3, recipes=("fp32",), seeds=(0,))).rows
    assert row.seconds_per_epoch == 3.0


def test_the_report_has_the_recipes_in_the_order_of_the_comparison(small):
    compare(small(recipes=("ibm2020", "fp32", "int4-fwd"), seeds=(0,)))
    assert [s.label for s in summarize([small().out])] == ["ibm2020", "fp32", "int4-fwd"]


def test_a_result_is_finished_unless_it_was_interrupted(tmp_path):
    ends = ("done", "max_steps", "diverged", "interrupted")
    results = [Result(tmp_path, stopped, 1, 0, None, None, None, 0.0) for stopped in ends]
    assert [r.finished for r in results] == [True, True, True, False]
