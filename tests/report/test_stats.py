"""Means, paired differences and tables, against numpy and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fourbit.report import markdown_table, summarize
from fourbit.report._metric import sign
from fourbit.report._read import load_run
from fourbit.report._stats import RecipeSummary, across, mean_std, smooth
from fourbit.train.tasks import Metric, _metric


def test_mean_and_deviation_are_those_of_a_sample():
    values = [0.91, 0.93, 0.90, 0.94]
    mean, std = mean_std(values)
    assert mean == pytest.approx(0.92)
    assert std == pytest.approx(math.sqrt((0.01**2 + 0.01**2 + 0.02**2 + 0.02**2) / 3))
    assert mean_std([math.nan]) == (None, None)


def test_a_summary_agrees_with_numpy(make_run, tmp_path):
    runs = {(r, s): load_run(make_run(f"{r}-seed{s}", recipe=r, seed=s, accuracy=a, epochs=3))
            for r, a in (("fp32", 0.9), ("luq", 0.85)) for s in (0, 1, 2)}  # fmt: skip
    fp32, luq = summarize([tmp_path])
    ours = np.array([runs["luq", s].epochs[-1]["test_metric"] for s in range(3)])
    theirs = np.array([runs["fp32", s].epochs[-1]["test_metric"] for s in range(3)])
    assert (luq.label, luq.n, luq.num_pairs) == ("luq", 3, 3)
    assert (luq.metric, luq.metric_mean) == ("accuracy %", pytest.approx(ours.mean()))
    assert luq.metric_std == pytest.approx(ours.std(ddof=1))
    assert luq.diff_mean == pytest.approx((ours - theirs).mean())
    assert luq.diff_half == pytest.approx(4.303 * (ours - theirs).std(ddof=1) / 3**0.5)
    assert luq.train_loss == pytest.approx(np.mean([runs["luq", s].epochs[-1]["train_loss"] for s in range(3)]))
    assert luq.seconds_per_epoch == pytest.approx(31.0)
    assert fp32.diff_mean is None
    assert luq.notes == fp32.notes == ()


def test_differences_pair_seeds_and_leave_out_those_without_a_partner(make_run, tmp_path):
    a = load_run(make_run("a", recipe="fp32", seed=1, accuracy=0.9))
    make_run("b", recipe="fp32", seed=2, accuracy=0.1)
    c = load_run(make_run("c", recipe="luq", seed=1, accuracy=0.8))
    make_run("d", recipe="luq", seed=3, accuracy=0.8)
    luq = summarize([tmp_path])[1]
    assert luq.diff_mean == pytest.approx(c.result - a.result)
    assert luq.diff_half is None
    assert luq.notes == ("1 of 2 comparable with fp32",)


def test_a_run_that_is_half_way_is_not_compared_with_one_that_is_done(make_run, tmp_path):
    make_run("a", recipe="fp32", epochs=4)
    make_run("b", recipe="luq", epochs=2, stopped=None)
    luq = summarize([tmp_path])[1]
    assert luq.diff_mean is None
    assert luq.metric_mean is not None
    assert luq.notes == ("1 of 1 unfinished", "no fp32 run to compare with")


def test_a_diverged_run_counts_and_is_noted(make_run, tmp_path):
    make_run("a", recipe="luq", seed=0)
    make_run("b", recipe="luq", seed=1, diverges_at=300)
    (luq,) = summarize([tmp_path])
    assert luq.n == 2
    assert luq.metric_std > 30
    assert luq.train_loss is not None
    assert luq.notes == ("1 of 2 diverged",)


def test_older_runs_that_name_no_metric_have_an_accuracy(make_run, tmp_path):
    make_run("new/run", recipe="luq")
    make_run("old/run", recipe="luq", metric=None)
    new, old = summarize([tmp_path / "new"]), summarize([tmp_path / "old"])
    assert old == new
    assert old[0].metric == "accuracy %"


def test_numbers_of_different_metrics_are_neither_averaged_nor_compared(make_run, tmp_path):
    for recipe in ("fp32", "luq"):
        make_run(f"{recipe}-old", recipe=recipe, metric=None)
    new = load_run(make_run("luq-new", recipe="luq", metric="perplexity"))
    found = {s.label: s for s in summarize([tmp_path])}
    assert set(found) == {"fp32", "luq, metric=accuracy %", "luq, metric=perplexity"}
    assert found["luq, metric=accuracy %"].diff_mean is not None
    alone = found["luq, metric=perplexity"]
    assert (alone.metric_mean, alone.diff_mean) == (new.result, None)
    accuracies, perplexities = markdown_table(list(found.values())).split("\n\n")
    assert [line.split("|")[3].strip() for line in perplexities.splitlines()[::2]] == [
        "test perplexity",
        f"{new.result:.2f}",
    ]
    assert len(accuracies.splitlines()) == 4


def test_a_run_without_an_evaluation_waits_in_the_group_of_its_seed_mates(make_run, tmp_path):
    make_run("a", seed=0, metric="perplexity")
    make_run("b", seed=1, metric="perplexity", epochs=1, steps_per_epoch=20, stopped=None)
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "metrics.jsonl").write_text("".join(line for line in lines if '"step"' in line.split(",")[0]))
    (both,) = summarize([tmp_path])
    assert (both.n, both.metric) == (2, "perplexity")
    assert both.notes == ("1 of 2 unfinished", "1 of 2 without a test perplexity")


def test_lower_is_better_where_the_trainer_says_so():
    kinds = [m for m in vars(_metric).values() if isinstance(m, Metric)]
    assert len(kinds) == 4
    assert {m.title: sign(m.title) for m in kinds} == {m.title: 1 if m.higher_is_better else -1 for m in kinds}


def test_runs_with_the_same_seed_are_noted(make_run, tmp_path):
    make_run("a", seed=0)
    make_run("b", seed=0)
    assert summarize([tmp_path])[0].notes == ("several runs with seed 0",)


def test_the_running_mean_is_a_mean_of_neighbours_and_spreads_no_nan():
    values = np.array([1.0, 2.0, 6.0, math.nan, 4.0])
    assert smooth(values, 3) == pytest.approx([1.5, 3.0, 4.0, math.nan, 4.0], nan_ok=True)
    assert smooth(values, 1) is values
    assert len(smooth(values, 99)) == 5


def test_curves_are_averaged_where_all_of_them_exist():
    x = np.array([0.0, 10.0, 20.0])
    longer = (x, np.array([0.0, 1.0, 2.0]))
    shorter = (x, np.array([2.0, 3.0, math.nan]))
    grid, mean, low, high = across([longer, shorter])
    assert grid.tolist() == [0.0, 10.0]
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([1.0, 2.0], [0.0, 1.0], [2.0, 3.0])


def test_curves_logged_at_different_steps_are_interpolated():
    grid, mean, *_ = across(
        [(np.array([0.0, 4.0]), np.array([0.0, 4.0])), (np.array([1.0, 3.0]), np.array([1.0, 1.0]))]
    )
    assert grid.tolist() == [1.0, 3.0]
    assert mean.tolist() == [1.0, 2.0]


def test_no_curve_at_all_averages_to_nothing():
    assert [len(a) for a in across([])] == [0, 0, 0, 0]
    assert [len(a) for a in across([(np.array([1.0]), np.array([math.nan]))])] == [0, 0, 0, 0]


def test_the_markdown_table_prints_signs_and_dashes():
    rows = [
        RecipeSummary("fp32", 3, "accuracy %", 92.46, 0.12, None, None, 0.01234, 12.34),
        RecipeSummary("a|b", 1, "accuracy %", 90.0, None, -2.46, None, None, None, 1, ("1 of 1 diverged",)),
    ]
    dash, minus = "\N{EN DASH}", "\N{MINUS SIGN}"
    assert markdown_table(rows).splitlines() == [
        "| recipe | seeds | test accuracy (%) | difference to fp32 | train loss | s per epoch | notes           |",
        "| ------ | ----: | ----------------: | -----------------: | ---------: | ----------: | --------------- |",
        f"| fp32   |     3 |      92.46 ± 0.12 |                  {dash} |     0.0123 |        12.3 |                 |",
        f"| a\\|b   |     1 |             90.00 |              {minus}2.46 |"
        f"          {dash} |           {dash} | 1 of 1 diverged |",
    ]
    assert "notes" not in markdown_table(rows[:1]) and "per byte" not in markdown_table(rows)
    text = RecipeSummary("fp32", 1, "perplexity", 8.5, None, None, None, 2.1, None, bits_per_byte=1.5, tokens_per_s=1e4)
    assert "| bits per byte | train loss | s per epoch | tokens per s |" in markdown_table([text])
