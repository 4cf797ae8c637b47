"""The paper's tables: numbers as printed, rows that run, and what a few seeds say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from fourbit import data, models, recipes
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.ops import SLOTS
from fourbit.reproduce import COLUMNS, ROWS, reproduce, rows_of
from fourbit.reproduce._lengths import lengths_table
from fourbit.reproduce._provenance import said_of_commits
from fourbit.reproduce._statistics import detectable, holm, paired, sentence
from fourbit.reproduce._table import Column, best_of, best_table, described, sentences, table_of
from fourbit.reproduce.figures import draw
from fourbit.train import TrainConfig
from fourbit.train._folder import RunFolder
from fourbit.train._validate import validated


def test_the_papers_numbers_are_those_of_its_tables():
    assert {name: row.paper["ibm2020"] for name, row in rows_of("table1").items() if row.paper} == {
        "vgg16": 91.47, "googlenet": 94.17, "resnet18": 92.74, "resnet50": 93.42, "resnet101": 93.79,
        "densenet121": 94.71, "mobilenet_v2": 91.80,
    }  # fmt: skip
    assert rows_of("table1")["densenet121"].paper["ibm2020-1x1fp8"] == 94.91
    assert "ibm2020-bottom1x1fp8" not in rows_of("table1")["densenet121"].paper
    assert rows_of("table2")["resnet50"].paper == dict(
        zip(COLUMNS, (76.48, 75.76, 74.01, 74.92, 74.99, 75.51), strict=True)
    )
    assert {n: tuple(r.paper.values()) for n, r in rows_of("table3").items()} == {
        "ptb": (83.3, 85.3, 83.8), "swb300": (9.9, 11.3, 10.4), "wmt": (27.5, 25.4, 25.9)
    }  # fmt: skip
    assert {row.name for row in ROWS if row.bold == "ibm2020-1x1fp8"} == {"resnet50", "resnet101"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_settings_that_are_valid_and_recipes_that_fit(row):
    assert {"small", "smoke"} <= set(row.scales)
    for scale in row.scales:
        config = validated(TrainConfig(**row.settings(scale), data_dir=Path("x"), recipe="fp32"))
        with torch.device("meta"):
            model = models.build(config.model, num_classes=10)
        for recipe in row.columns:
            recipes.explain(model, recipe)


def test_a_row_runs_writes_its_table_and_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = data.load("digits")
    small = dataclasses.replace(whole, train_x=whole.train_x[:64], train_y=whole.train_y[:64])
    monkeypatch.setattr(data, "load", lambda name, folder=None: small)
    changes = {"model": "digits_cnn", "data": "digits", "log_to": (), "progress": False, "out": tmp_path}
    done = reproduce("table1", "resnet18", scale="smoke", seeds=(0, 1), **changes)
    assert not done.interrupted and "say nothing about accuracy" in done.text
    stored = json.loads((tmp_path / "table1-resnet18-smoke" / "reproduced.json").read_text())
    assert [c["recipe"] for c in stored["columns"]] == ["fp32", "int4-fwd", "ibm2020", "ibm2020-dw8"]
    tpr = stored["columns"][2]
    assert tpr["paper"] == 92.74 and set(tpr["by_seed"]) == {"0", "1"}
    assert tpr["mean"] == pytest.approx(sum(tpr["by_seed"].values()) / 2)
    fp32 = stored["columns"][0]["by_seed"]
    assert tpr["difference"] == pytest.approx(sum(tpr["by_seed"][s] - fp32[s] for s in "01") / 2)
    lines = (tmp_path / "table1-resnet18-smoke" / "fp32-seed0" / "metrics.jsonl").read_text()
    again = reproduce("table1", "resnet18", scale="smoke", seeds=(0, 1), **changes)
    assert again.text == done.text
    assert (tmp_path / "table1-resnet18-smoke" / "fp32-seed0" / "metrics.jsonl").read_text() == lines


def test_a_smaller_call_loses_nothing_from_the_table(tmp_path):
    changes = {"log_to": (), "progress": False, "out": tmp_path, "epochs": 1, "scale": "smoke"}
    reproduce("questions", "radix", columns=("fp32", "ibm2020-no-tpr"), **changes)
    done = reproduce("questions", "radix", columns=("ibm2020-radix2", "luq"), seeds=(1,), **changes)
    stored = json.loads((tmp_path / "questions-radix-smoke" / "reproduced.json").read_text())["columns"]
    assert {c["recipe"]: sorted(c["by_seed"]) for c in stored} == {
        "fp32": ["0"], "ibm2020-radix2": ["1"], "ibm2020-no-tpr": ["0"], "luq": ["1"]
    }  # fmt: skip
    assert "Ours: digits_cnn on digits, 1 epoch, seeds 0, 1." in done.text
    assert "taken seed by seed" not in done.text  # every column has one seed
    two = reproduce("questions", "radix", columns=("fp32",), seeds=(1,), **changes)
    assert "Differences are taken seed by seed, over the seeds that both columns have." in two.text
    folder = tmp_path / "networks-smoke" / "digits_cnn" / "ibm2020-radix8-seed4"
    RunFolder(folder, data="x").create(TrainConfig(data="digits"), {})
    edited = folder / "config.json"
    edited.write_text(edited.read_text().replace('"data_identity": "x",', ""))  # of another program under way
    other = reproduce("questions", "radix", columns=("fp32",), **changes)
    assert (
        "| `ibm2020-radix2` |" in other.text
        and "| `ibm2020-radix8` |" not in other.text
        and "seeds 0, 1." in other.text
    )
    other = reproduce("questions", "phases", columns=("fp32",), **changes)  # shares the runs, but not the columns
    assert "radix2" not in other.text and "luq" not in other.text


def test_the_table_alone_is_that_of_the_finished_runs(tmp_path):
    changes = {"log_to": (), "progress": False, "out": tmp_path, "epochs": 1, "scale": "smoke"}
    with pytest.raises(UserError, match="digits_cnn has no finished run of radix at the scale smoke: check --out, or"):
        reproduce("questions", "radix", table_only=True, **changes)
    done = reproduce("questions", "radix", columns=("fp32", "ibm2020-radix2"), **changes)
    assert "Columns of the row without a finished run: `ibm2020-121`, `ibm2020-no-tpr`, `ibm2020-radix8`," in done.text
    runs = sorted(path.name for path in done.runs.iterdir())
    (done.folder / "reproduced.md").unlink()
    assert reproduce("questions", "radix", table_only=True, **changes).text == done.text
    assert (done.folder / "reproduced.md").read_text() == done.text
    assert sorted(path.name for path in done.runs.iterdir()) == runs
    with pytest.raises(
        UserError, match="digits_cnn has no finished run of luq, fourbit: leave out --table-only, or that"
    ):
        reproduce("questions", "radix", columns=("fp32", "luq", "fourbit"), table_only=True, **changes)


def test_a_folder_of_a_rows_own_keeps_every_column(tmp_path, monkeypatch):
    small = dataclasses.replace(data.load("digits"), name="cifar10")
    monkeypatch.setattr(data, "load", lambda name, folder=None: small)
    changes = {"model": "digits_cnn", "log_to": (), "progress": False, "out": tmp_path, "scale": "smoke"}
    reproduce("table1", "resnet18", columns=("fp32", "luq"), **changes)
    assert "`luq`" in reproduce("table1", "resnet18", columns=("fp32",), **changes).text


def test_a_stand_in_is_not_taken_for_the_papers_data(tmp_path, monkeypatch):
    part = dataclasses.replace(data.load("digits"), name="cifar10")
    monkeypatch.setattr(data, "load", lambda name, folder=None: part)
    with pytest.raises(
        UserError, match="needs all of cifar10, at least 50,000 training images, but the data has 1,437"
    ):
        reproduce("table1", "resnet18", scale="paper", out=tmp_path)
    assert not list(tmp_path.rglob("config.json"))


def test_the_best_learning_rate_at_the_edge_is_marked():
    columns = [Column("fp32", {0: 50.0}, (), 0.05, 10), Column("ibm2020", {0: 60.0}, (), 0.1, 10)]
    text = "\n".join(best_table(columns, (0.05, 0.1, 0.2)))
    assert "| 0.05* |" in text and "| 0.1 |" in text and "may lie beyond" in text
    assert "beyond" not in "\n".join(best_table(columns[1:], (0.05, 0.1, 0.2)))


def test_intervals_are_students():
    found = paired([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-3)
    assert paired([]) is None and paired([1.0]).half is None


@pytest.mark.parametrize(
    ("differences", "higher", "words"),
    [
        ([-1.0, -1.1, -0.9], True, "A is 1.00 points worse than B (95 % interval -1.25 to -0.75, 3 seeds)."),
        ([-1.0, 1.1, 0.2], True, "A cannot be told from B"),
        ([2.0, 2.1, 2.2], False, "A is 2.10 points worse than B"),
        ([-3.0], False, "A is 3.00 points better than B with one seed: how far seeds scatter is not known."),
        ([0.0], True, "A equals B with one seed"),
    ],
)
def test_sentences_say_what_follows_and_what_does_not(differences, higher, words):
    assert sentence("A", "B", paired(differences), "points", higher).startswith(words)


def _columns(**by_recipe):
    return [Column(r.replace("_", "-"), dict(enumerate(values)), (), 0.1, 10) for r, values in by_recipe.items()]


def test_the_pairs_that_answer_a_question_are_compared():
    row = rows_of("questions")["zerosum"]
    said = sentences(row, _columns(fp32=(70.0, 71.0), ibm2020=(66.0, 67.5), ibm2020_zerosum=(68.0, 69.51)), "points")
    assert said[2] == "- ibm2020-zerosum is 2.01 points better than TPR FP4 (95 % interval +1.94 to +2.07, 2 seeds)."
    assert "Of 3 comparisons looked at together" in said[3]
    assert said[3].split("\n")[1].endswith("these differ: ibm2020-zerosum and TPR FP4.")


def test_p_values_are_students_and_holms():
    """Against scipy's paired test, and against the definition of Holm's correction by brute force."""
    from scipy.stats import ttest_1samp

    random = torch.Generator().manual_seed(0)
    for n in (2, 3, 5, 12):
        values = torch.randn(n, generator=random, dtype=torch.float64).tolist()
        assert paired(values).p == pytest.approx(float(ttest_1samp(values, 0).pvalue), rel=2e-4)
    ps = torch.rand(8, generator=random).square().tolist()
    for alpha in torch.linspace(0.01, 0.99, 30).tolist():
        rejected = set()
        for rank, (p, place) in enumerate(sorted((p, i) for i, p in enumerate(ps))):
            if p * (len(ps) - rank) >= alpha:
                break
            rejected.add(place)
        assert {i for i, p in enumerate(holm(ps)) if p < alpha} == rejected
    assert paired([1.0]).p is None and paired([0.0, 0.0]).p == 1.0 and paired([2.0, 2.0]).p == 0.0


def test_the_detectable_difference_is_found_four_times_in_five():
    random, n, error = torch.Generator().manual_seed(1), 5, 1.0 / math.sqrt(5)
    draws = torch.randn(4000, n, generator=random, dtype=torch.float64) + detectable(error, n)
    found = (draws.mean(1).abs() > 2.776 * draws.std(1) / math.sqrt(n)).double().mean()
    assert 0.74 < float(found) < 0.90  # the t quantiles approximate the noncentral distribution from above


def test_the_commits_of_the_runs_are_counted(tmp_path):
    for seed, commit in enumerate(("a" * 40, "b" * 40 + "+", None)):
        folder = tmp_path / f"fp32-seed{seed}"
        folder.mkdir()
        (folder / "env.json").write_text(json.dumps({"commit": commit}))
    one, all_three = Column("fp32", {0: 1.0}, (), 0.1, 1), Column("fp32", {0: 1.0, 1: 1.0}, (2,), 0.1, 1)
    assert said_of_commits(tmp_path, [one]) == "Runs of commit aaaaaaa."
    assert said_of_commits(tmp_path, [all_three]) == (
        "Runs of 2 commits (aaaaaaa, bbbbbbb+) and code without a commit (+: with changes)."
    )


def test_every_pair_is_of_columns_of_its_row():
    ours = [*rows_of("questions").values(), *rows_of("debates").values()]
    assert all(row.pairs and {r for pair in row.pairs for r in pair} <= set(row.columns) for row in ours)


def test_a_debate_shares_the_runs_of_its_network(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "input.txt").write_text("".join(f"line {i} of a play, {i * i}\n" for i in range(400)))
    changes = {"log_to": (), "progress": False, "data_dir": text, "out": tmp_path, "scale": "smoke"}
    done = reproduce("debates", "gemms", columns=("fp32", "mxfp4-ceil"), **changes)
    assert done.runs == tmp_path / "networks-smoke" / "gpt" and "test perplexity" in done.text
    other = reproduce("debates", "rounding", columns=("fp32",), table_only=True, **changes)
    assert "| `mxfp4-ceil` |" in other.text and "mxfp4-ceil-fprop" not in other.text.split("\n\n")[2]


def test_variants_differ_from_their_base_in_what_their_name_says():
    base = recipes.get("mxfp4-ceil").rules[-1].spec
    for name, slots in (
        ("fprop", ("x_fprop", "w_fprop")),
        ("dgrad", ("g_dgrad", "w_dgrad")),
        ("wgrad", ("g_wgrad", "x_wgrad")),
    ):
        alone = recipes.get(f"mxfp4-ceil-{name}").rules[-1].spec
        turned = recipes.get(f"mxfp4-ceil-rht-{name}").rules[-1].spec
        for slot in SLOTS:
            assert getattr(alone, slot) == (getattr(base, slot) if slot in slots else None)
            assert (getattr(turned, slot).transform is not None) == (slot in slots)
    drawn = {
        "sr": SLOTS,
        "sr-fprop": ("x_fprop", "w_fprop"),
        "sr-backward": ("g_dgrad", "w_dgrad", "g_wgrad", "x_wgrad"),
        "sr-g": ("g_dgrad", "g_wgrad"),
        "sr-g-dgrad": ("g_dgrad",),
        "sr-g-wgrad": ("g_wgrad",),
    }
    for name, slots in drawn.items():
        spec = recipes.get(f"mxfp4-ceil-{name}").rules[-1].spec
        assert tuple(s for s in SLOTS if getattr(spec, s).stochastic) == tuple(s for s in SLOTS if s in slots)


def test_no_difference_is_drawn_from_the_seeds_that_survived():
    row = rows_of("table1")["resnet18"]
    columns = [
        Column("fp32", {0: 90.0, 1: 91.0, 2: 92.0}, (), 0.1, 10),
        Column("ibm2020", {0: 90.5, 1: 91.5}, (2,), 0.1, 10),
        Column("ibm2020-dw8", {}, (0, 1, 2), 0.1, 10),
    ]
    assert table_of(row, columns)[3].endswith("| 91.00 | 2 (1 diverged) | - | - |")
    assert sentences(row, columns, "points") == [
        "- TPR FP4: 1 of 3 runs diverged; the rest are not compared.",
        "- dgrad FP4, wgrad FP8: 3 of 3 runs diverged; the rest are not compared.",
    ]
    assert [c["diverged"] for c in described(row, columns)] == [[], [2], [0, 1, 2]]


def test_each_column_has_its_best_learning_rate():
    row = rows_of("questions")["multiplier"]
    columns = [Column("fp32", {0: v}, (), lr, 10) for v, lr in ((60.0, 0.05), (70.0, 0.1), (65.0, 0.2))]
    columns += [Column("ibm2020", {0: v}, (), lr, 10) for v, lr in ((66.0, 0.05), (62.0, 0.1))]
    assert [(c.recipe, c.lr) for c in best_of(row, columns)] == [("fp32", 0.1), ("ibm2020", 0.05)]
    more = [Column("fp32", {0: 60.0}, (), 0.05, 10), Column("fp32", {0: 61.0, 1: 50.0, 2: 50.0}, (), 0.1, 10)]
    assert [c.lr for c in best_of(row, more)] == [0.1]  # by the seed that both have


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fourbit.reproduce._run.compare", stop)
    assert main(["reproduce", "table1", "--row", "resnet18", "--scale", "smoke", "--out", str(tmp_path)]) == 130
    assert "the same command goes on with it" in capsys.readouterr().out


def test_the_folder_of_shared_runs_is_named(tmp_path, capsys):
    options = ["--columns", "fp32", "--scale", "smoke", "--no-progress", "--out", str(tmp_path)]
    assert main(["reproduce", "questions", "--row", "zerosum", *options]) == 0
    printed = capsys.readouterr().out
    assert f"runs: {tmp_path / 'networks-smoke' / 'digits_cnn'}" in printed
    assert not list(tmp_path.rglob("table.md")) and "seconds" not in printed


def test_the_list_shows_every_row(capsys):
    assert main(["reproduce", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in ROWS) and "94.36*" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1"], "table1 has the rows resnet20, vgg16"),
        (["table1", "--row", "resnet19"], "unknown row of table1 'resnet19': did you mean 'resnet18'"),
        (["table2", "--row", "alexnet"], "imagenette needs the folder of its images or parquet files"),
        (
            ["table3", "--row", "swb300", "--scale", "paper"],
            "swb300 of table3 cannot run at the scale paper: SWB300 is not free",
        ),
        (["table4", "--row", "x"], "table4"),
        (["table1", "--row", "vgg16", "--scale", "tiny"], "tiny"),
        (["table1", "--row", "vgg16", "--data-dir", "nowhere"], "there is no data folder nowhere"),
        (["table1", "--row", "vgg16", "--table-only", "--seeds", "1"], "--table-only shows all seeds that lie there"),
        (["fig1a", "--table-only"], "fig1a is a figure and looks into the trained networks: leave out --table-only"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    assert main(["reproduce", *arguments, *(["--out", str(tmp_path)] if "--row" in arguments else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fourbit: ") and message in error and error.count("\n") == 1


def test_an_unknown_scale_is_named():
    with pytest.raises(UserError, match="unknown scale 'tiny'"):
        rows_of("table1")["vgg16"].settings("tiny")


def test_a_row_of_lengths_shows_the_gap_over_them(tmp_path):
    changes = {"model": "digits_cnn", "log_to": (), "progress": False, "out": tmp_path, "max_test_batches": 1}
    done = reproduce(
        "questions", "length", scale="smoke", columns=("fp32", "ibm2020"), seeds=(0, 1), max_steps=3, **changes
    )
    assert "| to FP32, after epochs | 1 | 4 |" in done.text
    runs = tmp_path / "networks-smoke"
    assert {path.name for path in runs.iterdir()} == {"digits_cnn", "digits_cnn-epochs-1"}
    stored = json.loads((done.folder / "reproduced.json").read_text())
    assert [found["epochs"] for found in stored] == [1, 4]
    assert (done.folder / "reproduced.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((runs / "digits_cnn-epochs-1" / "ibm2020-seed0" / "config.json").read_text())
    assert config["epochs"] == 1


def test_gaps_are_those_of_runs_of_as_many_epochs():
    columns = [
        Column("fp32", {0: 60.0, 1: 62.0}, (), 0.1, 3),
        Column("ibm2020", {0: 55.0, 1: 57.0}, (), 0.1, 3),
        Column("fp32", {0: 90.0}, (), 0.1, 10),
        Column("ibm2020", {0: 89.0}, (), 0.1, 10),
        Column("ibm2020", {0: 1.0}, (), 0.1, 30),
    ]
    assert lengths_table(columns)[2:] == [
        "| FP32 itself | 61.00 | 90.00 | - |",
        "| TPR FP4 | -5.00 ±0.00 (2) | -1.00 (1) | - |",
    ]


@pytest.mark.parametrize("what", ["fig6", "table1"])
def test_the_scale_of_half_networks_is_for_questions(what, tmp_path):
    with pytest.raises(UserError, match="converged is for questions"):
        if what == "fig6":
            draw(what, scale="converged", out=tmp_path)
        else:
            reproduce(what, "resnet20", scale="converged", out=tmp_path)
