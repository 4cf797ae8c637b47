"""Run folders: what is found, what is skipped, what is refused."""

from __future__ import annotations

import json
import math

import pytest

from fourbit.errors import UserError
from fourbit.report._read import find_run_folders, load_run, load_runs


def append(folder, *lines):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def test_runs_are_found_at_any_depth_once_each_and_in_the_order_of_their_names(make_run, tmp_path):
    for name in ("b/deep/er", "a-seed1", "a-seed0"):
        make_run(name, epochs=1)
    (tmp_path / "report" / "figures").mkdir(parents=True)
    found = find_run_folders([tmp_path, tmp_path / "a-seed0"])
    assert [f.relative_to(tmp_path).as_posix() for f in found] == ["a-seed0", "a-seed1", "b/deep/er"]


def test_a_folder_inside_a_run_is_not_another_run(make_run):
    run = make_run("run", epochs=1)
    make_run("run/checkpoint", epochs=1)
    assert find_run_folders([run]) == [run]


def test_no_run_folder_and_no_folder_at_all_are_user_errors_of_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no run folder found in .*config\.json and metrics.jsonl"):
        load_runs([tmp_path])
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run folder found"):
        load_runs([])


def test_a_run_reads_back_as_it_was_written(make_run):
    run = load_run(make_run("run", recipe="ibm2020", seed=7, epochs=2, layers=3))
    assert (run.recipe, run.seed, run.status, run.num_steps) == ("ibm2020", "7", "done", 200)
    assert len(run.steps) == 20
    assert len(run.epochs) == 2
    assert (run.metric, run.result) == ("accuracy %", run.epochs[-1]["test_metric"])
    assert run.seconds_per_epoch == 37.0
    assert run.trace.layers == ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1")
    assert run.trace.values("g_exponent").shape == (4, 3)
    assert run.trace.slots() == ("x_fprop", "w_fprop", "g_dgrad", "g_wgrad")
    assert [h["step"] for h in run.histograms] == [50, 200]


def test_scales_come_from_every_logged_step_and_in_older_runs_from_observations(make_run):
    older = make_run("older", recipe="ibm2020", epochs=1, layers=2)
    assert load_run(older).scales.steps.tolist() == [50, 100]
    newer = make_run("newer", recipe="ibm2020", epochs=1, layers=2, stopped=None)
    layers = {"layer1.0.conv1": {"g_exponent": 7, "x_alpha": 2.5}, "fc": {"g_exponent": None, "x_alpha": None}}
    append(newer, {"kind": "step", "step": 110, "loss": 1.0, "scales": layers})
    append(newer, {"kind": "step", "step": 120, "loss": 1.0, "scales": 3})
    run = load_run(newer)
    assert run.scales.steps.tolist() == [50, 100, 110]
    assert run.scales.values("g_exponent")[-1].tolist()[:1] == [7]
    assert run.scales.last("x_alpha")[0] == 2.5
    assert run.trace.steps.tolist() == [50, 100]


def test_a_last_line_that_was_cut_off_is_skipped_with_a_note(make_run):
    folder = make_run("run", epochs=1, stopped=None)
    intact = load_run(folder)
    append(folder, '{"kind": "step", "step": 110, "lo')
    cut = load_run(folder)
    assert cut.steps == intact.steps
    assert intact.notes == []
    assert cut.notes == ["run/metrics.jsonl: line 12 is damaged (cut off while being written?) and left out."]


def test_lines_damaged_by_a_kill_in_the_middle_of_a_resumed_run_are_counted(make_run):
    folder = make_run("run", epochs=1, stopped=None)
    append(folder, "{half\n", "\0\0\0\n", {"kind": "step", "step": 120, "loss": 1.0})
    run = load_run(folder)
    assert run.steps[-1]["step"] == 120
    assert "2 lines (first: 12) are damaged" in run.notes[0]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(make_run):
    folder = make_run("run", epochs=2, stopped="interrupted")
    append(folder, {"kind": "step", "step": 110, "loss": 9.0})
    run = load_run(folder)
    assert [r["step"] for r in run.steps][-2:] == [100, 110]
    assert run.steps[-1]["loss"] == 9.0
    assert len(run.epochs) == 1
    assert run.status == "unfinished"


def test_a_run_that_goes_on_after_its_final_line_is_not_final(make_run):
    folder = make_run("run", epochs=1, stopped="max_steps")
    assert load_run(folder).status == "max_steps"
    append(folder, {"kind": "step", "step": 110, "loss": 1.0})
    assert load_run(folder).status == "unfinished"


def test_a_run_whose_newest_loss_is_null_diverged(make_run):
    run = load_run(make_run("run", epochs=2, diverges_at=150))
    assert run.status == "diverged"
    assert math.isnan(run.train_loss)


def test_one_skipped_step_with_a_null_loss_is_not_a_divergence(make_run):
    folder = make_run("run", epochs=1, stopped=None)
    append(folder, {"kind": "step", "step": 110, "loss": None}, {"kind": "step", "step": 120, "loss": 0.5})
    assert load_run(folder).status == "unfinished"


def test_the_final_evaluation_counts_where_no_epoch_was_completed(make_run):
    folder = make_run("run", epochs=1, stopped=None)
    append(folder, {"kind": "final", "step": 140, "epoch": 1, "test_accuracy": 0.25, "stopped": "max_steps"})
    run = load_run(folder)
    assert run.result == 25.0
    assert run.evaluations[-1] == (1.0, 140.0, 25.0)


def test_bleu_is_known_in_the_last_epoch_alone(make_run):
    run = load_run(make_run("run", metric="BLEU", epochs=3))
    assert run.metric == "BLEU"
    assert [math.isnan(value) for *_, value in run.evaluations] == [True, True, False]
    assert run.result == run.epochs[-1]["test_metric"]


def test_an_older_run_that_a_newer_trainer_continued_shows_what_that_one_measured(make_run):
    folder = make_run("run", metric=None, epochs=2, stopped=None)
    line = {"kind": "epoch", "step": 300, "epoch": 2, "test_accuracy": 0.5, "metric": "perplexity", "test_metric": 80.5}
    append(folder, line)
    run = load_run(folder)
    assert (run.metric, run.result) == ("perplexity", 80.5)
    assert [math.isnan(value) for *_, value in run.evaluations] == [True, True, False]


def test_a_run_that_has_only_just_begun_has_no_numbers(make_run):
    folder = make_run("run", epochs=1)
    (folder / "metrics.jsonl").write_text("")
    run = load_run(folder)
    assert math.isnan(run.result)
    assert run.metric is None
    assert (run.status, run.num_steps) == ("unfinished", 0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[1, 2]", "config.json holds a JSON list"),
        ("config.json", "{", "config.json cannot be read as JSON"),
        ("config.json", b"\xff\xfe\x00", "config.json cannot be read as JSON"),
        ("config.json", '{"architectures": ["Bert"]}', "config.json is not the configuration of a run"),
        ("env.json", "3", "env.json holds a JSON int"),
        ("metrics.jsonl", '{"loss": 1.0}\n', "metrics.jsonl, line 1 is not a metrics line"),
        ("metrics.jsonl", '{"kind": "step", "step": "ten"}\n', "metrics.jsonl, line 1 is not a metrics line"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1 is not a metrics line"),
        ("metrics.jsonl", "epoch,loss\n1,2.0e\n", "metrics.jsonl is not a metrics file of fourbit"),
    ],
)
def test_a_file_that_no_trainer_wrote_is_named(make_run, file, content, message):
    folder = make_run("run", epochs=1)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_run(folder)


def test_numbers_of_the_wrong_type_are_missing_numbers(make_run):
    folder = make_run("run", epochs=1, stopped=None)
    append(
        folder,
        {"kind": "layers", "step": 110, "layers": {"a": {"g_exponent": "big", "x_alpha": True, "slots": None}}},
        {"kind": "layers", "step": 120, "layers": {"a": 3}},
        {"kind": "layers", "step": 130, "layers": None},
        {"kind": "layers", "step": 140, "layers": {"a": {"slots": {"g_dgrad": 5, "g_wgrad": {"underflow": None}}}}},
        '{"kind": "epoch", "step": 140, "epoch": 1, "test_accuracy": NaN, "train_loss": Infinity}\n',
    )
    run = load_run(folder)
    assert math.isnan(run.result)
    assert not run.trace.has("g_exponent")
    assert not run.trace.has("x_alpha")
    assert not run.trace.has("g_wgrad", "underflow")
