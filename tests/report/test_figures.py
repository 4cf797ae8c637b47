"""Figures: the same colour for a recipe everywhere, nothing cut off, nothing lost among many recipes and layers."""

from __future__ import annotations

import io
import json
from itertools import pairwise

import numpy as np
import pytest
from run_folders import write_run

from fourbit.report._curves import curves_beside_reference, final_result, limit, training_curves
from fourbit.report._groups import group_runs
from fourbit.report._histograms import gradient_histograms, parse
from fourbit.report._layers import STATISTICS, clip_values, grad_scales, slot_map
from fourbit.report._read import load_runs
from fourbit.report._style import REFERENCE_COLOR, looks, short


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Thirteen recipes, sixty layers."""
    top = tmp_path_factory.mktemp("many")
    for i in range(13):
        name = "fp32" if i == 0 else f"a-recipe-with-a-rather-long-name-{i}"
        write_run(top / name, recipe=name, layers=60 if i else 0, epochs=1, steps_per_epoch=50, accuracy=0.9 - 0.01 * i)
    return group_runs(load_runs([top]))


def visible_overlaps(figure):
    """Pairs of y tick labels of the same axes that touch."""
    figure.savefig(io.BytesIO(), format="png", dpi=60)
    found = 0
    for axis in figure.axes:
        boxes = [t.get_window_extent() for t in axis.get_yticklabels() if t.get_visible() and t.get_text()]
        boxes.sort(key=lambda b: b.y0)
        found += sum(low.y1 > high.y0 + 0.5 for low, high in pairwise(boxes))
    return found


def test_every_recipe_has_a_look_of_its_own_and_full_precision_is_grey(many):
    found = looks(many)
    assert found["fp32"].color == REFERENCE_COLOR
    assert len({(look.color, str(look.dashes)) for look in found.values()}) == 13
    assert len({(look.color, look.marker) for look in found.values()}) == 13


def test_layer_names_do_not_touch_even_with_sixty_layers(many):
    plot = slot_map(many[:4], STATISTICS[0])
    assert plot is not None
    assert visible_overlaps(plot.figure) == 0


def test_recipe_names_do_not_touch_even_with_thirteen_recipes(many):
    plot = final_result(many, "accuracy %")
    assert plot is not None
    assert visible_overlaps(plot.figure) == 0
    assert len(plot.figure.axes[0].get_yticklabels()) == 13


def test_the_legend_lies_outside_the_axes(many):
    plot = training_curves(many, "accuracy %")
    assert plot is not None
    plot.figure.savefig(io.BytesIO(), format="png", dpi=60)
    (legend,) = plot.figure.legends
    assert len(legend.get_texts()) == 13
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= plot.figure.bbox.x1
    assert not any(box.overlaps(axis.get_window_extent()) for axis in plot.figure.axes)


def test_axes_name_what_they_show_and_its_unit(many):
    plot = grad_scales(many[:3])
    assert plot is not None
    assert plot.figure.axes[0].get_xlabel() == "optimizer step"
    assert plot.figure.axes[0].get_ylabel() == "log2 of the multiplier"


def test_the_grid_of_each_phase_is_drawn_at_its_own_powers_of_two(make_run, tmp_path):
    make_run("run", recipe="ibm2020", layers=3, epochs=1)
    (group,) = group_runs(load_runs([tmp_path]))
    plot = gradient_histograms(group, 0)
    assert plot is not None
    left, right = plot.figure.axes[:2]
    assert len(plot.figure.axes) == 6
    for axis, grid in ((left, range(-6, 7, 2)), (right, range(-7, 6, 2))):
        solid = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "-"]
        dotted = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() != "-"]
        assert solid == pytest.approx(list(grid))
        assert dotted == pytest.approx([g - np.log2(1.6) for g in grid])


def histogram_figure(make_run, tmp_path, recipe, **change):
    """The figure of a run whose gradients of dx serve dw too; fields of the histograms as given (None: absent)."""
    folder = make_run("run", recipe=recipe, layers=3, epochs=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for slots in line.get("histograms", {}).values():
            del slots["g_wgrad"]
            slots["g_dgrad"] = {k: v for k, v in (slots["g_dgrad"] | change).items() if v is not None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = group_runs(load_runs([tmp_path]))
    plot = gradient_histograms(group, 0)
    assert plot is not None
    return plot


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ("mine", {"rounding": "stochastic", "reused": True}),
        ("luq-smp2", {"rounding": None, "reused": None}),  # a run of the first version
    ],
)
def test_stochastic_rounding_has_no_decision_points_and_no_area_that_becomes_zero(make_run, tmp_path, recipe, change):
    plot = histogram_figure(make_run, tmp_path, recipe, **change)
    keys = {t.get_text() for t in plot.figure.legends[0].get_texts()}
    assert not keys & {"decision point", "rounded to zero"}
    assert "one of them at random" in plot.caption
    assert "grey area" not in plot.caption
    assert all(line.get_linestyle() == "-" for axis in plot.figure.axes for line in axis.lines)


@pytest.mark.parametrize(("reused", "purpose"), [(True, "for dx and dw"), (None, "for dx and dw"), (False, "for dx")])
def test_a_gradient_that_serves_both_products_is_titled_so(make_run, tmp_path, reused, purpose):
    plot = histogram_figure(make_run, tmp_path, "ibm2020-radix2", reused=reused)
    assert plot.figure.axes[0].get_title("left").endswith(f"gradient {purpose}")


def test_a_run_that_ends_below_the_axis_is_marked_with_its_accuracy(make_run, tmp_path):
    for recipe, accuracy in (("fp32", 0.9), ("luq", 0.88), ("ibm2020", 0.87), ("lost", 0.2)):
        make_run(recipe, recipe=recipe, accuracy=accuracy)
    groups = group_runs(load_runs([tmp_path]))
    plot = curves_beside_reference(groups, "accuracy %")
    assert plot is not None
    labels = {axis.get_title("left"): [t.get_text() for t in axis.texts] for axis in plot.figure.axes}
    end = next(g for g in groups if g.label == "lost").runs[0].result
    assert labels == {"ibm2020": [], "lost": [f"{end:.1f}"], "luq": []}
    assert "end below the axis" in plot.caption


def test_a_lost_run_is_marked_at_the_end_of_the_worse_results(make_run, tmp_path):
    for recipe, accuracy in (("fp32", 0.9), ("luq", 0.88), ("ibm2020", 0.87), ("lost", 0.1)):
        make_run(recipe, recipe=recipe, accuracy=accuracy, metric="perplexity")
    groups = group_runs(load_runs([tmp_path]))
    end = next(g for g in groups if g.label == "lost").runs[0].result
    plot = final_result(groups, "perplexity")
    assert plot is not None
    (axis,) = plot.figure.axes
    assert (plot.title, axis.get_xlabel()) == ("Test perplexity by recipe", "test perplexity at the last evaluation")
    assert [t.get_text() for t in axis.texts] == [f"{end:.1f}"]
    shown = [line for line in axis.lines if len(line.get_xdata())]
    assert max(shown, key=lambda line: max(line.get_xdata())).get_marker() == ">"
    assert "runs far above the others, whose perplexity" in plot.caption
    plot = curves_beside_reference(groups, "perplexity")
    assert plot is not None
    marks = [[line.get_marker() for line in axis.lines if line.get_marker() != "None"] for axis in plot.figure.axes]
    assert marks == [[], ["^"], []]
    assert plot.figure.axes[0].get_ylabel() == "test perplexity"
    assert plot.figure.axes[0].get_ylim()[1] < end
    assert "end above the axis, at the perplexity beside it" in plot.caption


def test_a_metric_that_is_measured_once_is_a_point(make_run, tmp_path):
    for recipe in ("fp32", "luq", "ibm2020"):
        make_run(recipe, recipe=recipe, metric="BLEU")
    groups = group_runs(load_runs([tmp_path]))
    plot = training_curves(groups, "BLEU")
    assert plot is not None
    axis = plot.figure.axes[1]
    assert axis.get_ylabel() == "test BLEU"
    assert [line.get_marker() for line in axis.lines] == ["o"] * 3
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[500.0, g.runs[0].result]] for g in groups]
    assert curves_beside_reference(groups, "BLEU") is None  # points make no curves


def test_clip_values_are_counted_where_there_are_some(make_run, tmp_path):
    folder = make_run("run", recipe="ibm2020", layers=3, epochs=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "layers":
            line["layers"]["layer1.0.conv1"]["x_alpha"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot = clip_values(group_runs(load_runs([tmp_path])))
    assert plot is not None
    assert plot.figure.axes[0].get_title("left") == "ibm2020 (2 layers)"


def test_a_histogram_is_shares_of_all_elements_zeros_included():
    entry = {"log2_edges": [0, 1, 2], "counts": [3, 5], "zeros": 2, "grid": [0, 1, 4], "decision_points": [0.625, 2.5]}
    found = parse(entry)
    assert found is not None
    assert found.shares.tolist() == [0.3, 0.5]
    assert found.zeros == 0.2
    assert found.grid == (1.0, 4.0)


@pytest.mark.parametrize(
    "entry", [None, 3, {}, {"log2_edges": [0, 1], "counts": [0]}, {"log2_edges": [0], "counts": [1]}]
)
def test_what_is_no_histogram_is_left_out(entry):
    assert parse(entry) is None


def test_a_collapsed_run_does_not_squeeze_the_axis_of_the_others(many):
    assert limit([90.0, 91.0, 92.0, 10.0], 1) > 80.0
    assert limit([90.0, 91.0, 92.0], 1) < 90.0
    assert 92.0 < limit([90.0, 91.0, 92.0, 900.0], -1) < 110.0


def test_long_labels_lose_their_middle_and_keep_both_ends():
    assert short("features.stage4.block2.conv1.weight", 20) == "features…onv1.weight"
    assert len(short("x" * 100, 30)) == 30
    assert short("a_$b$") == r"a_\$b\$"


def test_curves_are_drawn_over_tokens_where_every_run_counts_them(make_run):
    folders = [make_run(f"seed {seed}", seed=seed, metric="perplexity") for seed in (0, 1)]

    def curves() -> tuple[str, float]:
        plot = training_curves(group_runs(load_runs(folders)), "perplexity")
        assert plot is not None
        axis = plot.figure.axes[1]
        return axis.get_xlabel(), float(max(axis.lines[-1].get_xdata()))

    assert curves() == ("optimizer step", 500.0)
    for known, folder in enumerate(folders):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line["tokens"] = 640 * line["step"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert curves() == (("tokens trained on", 320_000.0) if known else ("optimizer step", 500.0))
