"""Which runs belong together, and what a group is called."""

from __future__ import annotations

import pytest

from fourbit.report._groups import group_runs, labels, networks, reference_of
from fourbit.report._read import load_runs


@pytest.fixture
def groups_of(make_run, tmp_path):
    def build(*runs):
        for i, run in enumerate(runs):
            make_run(f"run{i:02d}", epochs=1, steps_per_epoch=20, **run)
        return group_runs(load_runs([tmp_path]))

    return build


def test_runs_that_differ_by_seed_and_out_alone_are_one_group_sorted_by_seed(groups_of):
    (group,) = groups_of(*({"recipe": "luq", "seed": s} for s in (10, 9, 2)))
    assert group.label == "luq"
    assert [r.seed for r in group.runs] == ["2", "9", "10"]


def test_where_the_data_lay_and_what_is_recorded_separates_nothing(groups_of):
    """Nor whether a run notes the identity of its data, which earlier versions did not."""
    (group,) = groups_of(
        {"seed": 0, "data_dir": "/a", "keep_every": 1}, {"seed": 1, "data_dir": "/b", "data_identity": "x"}
    )
    assert [r.seed for r in group.runs] == ["0", "1"]


def test_full_precision_comes_first_and_the_rest_in_the_order_of_labels(groups_of):
    groups = groups_of(*({"recipe": r} for r in ("luq-10", "a", "fp32", "luq-9")))
    assert [g.label for g in groups] == ["fp32", "a", "luq-9", "luq-10"]


def test_recipes_come_in_the_order_of_the_comparison_where_its_table_says_one(groups_of, tmp_path):
    (tmp_path / "table.json").write_text('[{"recipe": "luq"}, {"recipe": "fp32"}, 3]')
    groups = groups_of(*({"recipe": r} for r in ("fp32", "b", "a", "luq")))
    assert [g.label for g in groups] == ["luq", "fp32", "a", "b"]


@pytest.mark.parametrize("content", ["{", "3", '{"recipe": "luq"}', "[[]]"])
def test_a_table_that_no_comparison_wrote_orders_nothing(groups_of, tmp_path, content):
    (tmp_path / "table.json").write_text(content)
    assert [g.label for g in groups_of({"recipe": "luq"}, {"recipe": "fp32"})] == ["fp32", "luq"]


def test_runs_of_different_data_are_different_groups(groups_of):
    found = groups_of(*({"recipe": "luq", "seed": i, "data_identity": d} for i, d in enumerate("aba")))
    assert [(g.label, [r.seed for r in g.runs]) for g in found] == [
        ("luq, data_identity=a", ["0", "2"]),
        ("luq, data_identity=b", ["1"]),
    ]


def test_of_earlier_versions_the_folder_says_what_the_data_were(groups_of):
    assert len(groups_of(*({"seed": i, "data_dir": d} for i, d in enumerate(("/a", "/b"))))) == 2


def test_several_networks_come_one_after_the_other(groups_of):
    found = groups_of(*({"recipe": r, "model": m} for r in ("luq", "fp32") for m in ("resnet20", "vgg16")))
    assert [g.label for g in found] == ["fp32, resnet20", "luq, resnet20", "fp32, vgg16", "luq, vgg16"]


def test_one_and_one_point_zero_are_the_same_setting(groups_of):
    assert len(groups_of({"lr": 1, "seed": 0}, {"lr": 1.0, "seed": 1})) == 1


def test_a_setting_joins_the_label_only_where_two_groups_of_a_recipe_differ_in_it(groups_of):
    groups = groups_of(
        {"recipe": "fp32", "lr": 0.1},
        {"recipe": "luq", "lr": 0.1},
        {"recipe": "luq", "lr": 0.05},
        {"recipe": "luq", "lr": 0.05, "clip": None},
    )
    assert [g.label for g in groups] == [
        "fp32",
        "luq, lr=0.05, clip=none",
        "luq, lr=0.05, clip=unset",
        "luq, lr=0.1",
    ]


def test_a_field_that_an_earlier_version_did_not_write_has_the_value_that_it_trained_with(groups_of):
    both = groups_of({"seed": 0}, {"seed": 1, "beam_size": 1}, {"seed": 2, "beam_size": 4})
    assert [(g.label, [r.seed for r in g.runs]) for g in both] == [
        ("fp32, beam_size=1", ["0", "1"]),
        ("fp32, beam_size=4", ["2"]),
    ]


def test_any_other_field_that_is_missing_separates(groups_of):
    assert len(groups_of({"seed": 0}, {"seed": 1, "clip": 1.0})) == 2


def test_groups_of_several_networks_have_a_name_within_theirs_and_look_alike(groups_of):
    groups = groups_of(
        {"recipe": "luq", "model": "resnet20"},
        {"recipe": "ibm2020", "model": "resnet20"},
        {"recipe": "fp32", "model": "vgg16"},
        {"recipe": "luq", "model": "vgg16"},
    )
    assert [[g.name for g in part] for part in networks(groups)] == [["ibm2020", "luq"], ["fp32", "luq"]]
    assert groups[1].place == groups[3].place != groups[0].place


def test_models_and_data_sets_are_named_for_every_group_once_there_are_several():
    found = labels(
        [
            {"recipe": "fp32", "model": "resnet20", "data": "digits"},
            {"recipe": "luq", "model": "vgg16", "data": "digits"},
        ]
    )
    assert found == ["fp32, resnet20", "luq, vgg16"]


def test_a_recipe_is_compared_with_full_precision_of_the_same_model_and_most_equal_settings(groups_of):
    groups = groups_of(
        {"recipe": "fp32", "model": "vgg16"},
        {"recipe": "fp32", "model": "resnet20", "lr": 0.5},
        {"recipe": "fp32", "model": "resnet20", "lr": 0.1},
        {"recipe": "luq", "model": "resnet20", "lr": 0.1},
        {"recipe": "luq", "model": "lstm", "lr": 0.1},
    )
    reference = {g.label: reference_of(g, groups) for g in groups}
    assert reference["luq, resnet20"].label == "fp32, resnet20, lr=0.1"
    assert reference["luq, lstm"] is None
    assert reference["fp32, vgg16"] is None
