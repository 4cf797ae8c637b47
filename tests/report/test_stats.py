"""Means, paired differences and tables, against numpy and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fourbit.report import markdown_table, summarize
from fourbit.report._read import load_run
from fourbit.report._stats import RecipeSummary, across, mean_std, smooth


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
    ours = np.array([runs["luq", s].epochs[-1]["test_accuracy"] for s in range(3)])
    theirs = np.array([runs["fp32", s].epochs[-1]["test_accuracy"] for s in range(3)])
    assert (luq.label, luq.n, luq.num_pairs) == ("luq", 3, 3)
    assert luq.accuracy_mean == pytest.approx(ours.mean())
    assert luq.accuracy_std == pytest.approx(ours.std(ddof=1))
    assert luq.diff_mean == pytest.approx((ours - theirs).mean())
    assert luq.diff_std == pytest.approx((ours - theirs).std(ddof=1))
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
    assert luq.diff_mean == pytest.approx(c.accuracy - a.accuracy)
    assert luq.diff_std is None
    assert luq.notes == ("1 of 2 comparable with fp32",)


def test_a_run_that_is_half_way_is_not_compared_with_one_that_is_done(make_run, tmp_path):
    make_run("a", recipe="fp32", epochs=4)
    make_run("b", recipe="luq", epochs=2, stopped=None)
    luq = summarize([tmp_path])[1]
    assert luq.diff_mean is None
    assert luq.accuracy_mean is not None
    assert luq.notes == ("1 of 1 unfinished", "no fp32 run to compare with")


def test_a_diverged_run_counts_and_is_noted(make_run, tmp_path):
    make_run("a", recipe="luq", seed=0)
    make_run("b", recipe="luq", seed=1, diverges_at=300)
    (luq,) = summarize([tmp_path])
    assert luq.n == 2
    assert luq.accuracy_std > 0.3
    assert luq.train_loss is not None
    assert luq.notes == ("1 of 2 diverged",)


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


def test_the_markdown_table_prints_percent_with_signs_and_dashes():
    rows = [
        RecipeSummary("fp32", 3, 0.9246, 0.0012, None, None, 0.01234, 12.34),
        RecipeSummary("a|b", 1, 0.9, None, -0.0246, None, None, None, 1, ("1 of 1 diverged",)),
    ]
    dash, minus = "\N{EN DASH}", "\N{MINUS SIGN}"
    assert markdown_table(rows).splitlines() == [
        "| recipe | seeds | test accuracy (%) | difference to fp32 | train loss | s per epoch | notes           |",
        "| ------ | ----: | ----------------: | -----------------: | ---------: | ----------: | --------------- |",
        f"| fp32   |     3 |      92.46 ± 0.12 |                  {dash} |     0.0123 |        12.3 |                 |",
        f"| a\\|b   |     1 |             90.00 |              {minus}2.46 |"
        f"          {dash} |           {dash} | 1 of 1 diverged |",
    ]
    assert "notes" not in markdown_table(rows[:1])
