"""The page: complete, self-contained, escaped, and made from whatever state the runs are in."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from run_folders import write_run

from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.report import write_report
from fourbit.report._groups import group_runs
from fourbit.report._html import summary_sentences, title
from fourbit.report._read import load_run, load_runs
from fourbit.report._stats import summarize_group


class Page(HTMLParser):
    """The links, images, tags and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.tags, self.words, self.ids = [], [], [], set()
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "data", "srcset", "action") and v]
        self.ids |= {v for k, v in attrs if k == "id"}

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    top = tmp_path_factory.mktemp("comparison")
    for seed in (0, 1):
        write_run(top / f"fp32-seed{seed}", seed=seed, accuracy=0.9, epochs=2)
        write_run(top / f"ibm2020-seed{seed}", recipe="ibm2020", seed=seed, layers=4, accuracy=0.89, epochs=2)
        write_run(top / f"luq-seed{seed}", recipe="luq", seed=seed, layers=4, accuracy=0.88, epochs=2)
    return top


@pytest.fixture(scope="module")
def page(comparison):
    return write_report([comparison])


def test_the_page_lies_in_the_first_path_with_every_figure_beside_it(comparison, page):
    assert page == comparison / "report" / "index.html"
    figures = {p.name for p in (page.parent / "figures").iterdir()}
    assert figures == {
        "result.png", "curves.png", "curves-each.png", "gradscale.png", "alpha.png", "slots-over-time.png",
        "map-underflow.png", "map-saturation.png", "map-sqnr-db.png", "gradients-01.png", "gradients-02.png",
    }  # fmt: skip
    assert Page(page).tags.count("img") == len(figures)
    for path in (page.parent / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_other_file_and_no_network(page):
    found = Page(page)
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in found.addresses)
    assert not {"script", "link", "iframe", "object", "base"} & set(found.tags)
    assert "@import" not in page.read_text()
    assert not re.search(r"url\(|https?://", page.read_text())


def test_every_entry_of_the_contents_leads_to_a_heading(page):
    found = Page(page)
    targets = [a[1:] for a in found.addresses if a.startswith("#")]
    assert len(targets) >= 8
    assert set(targets) <= found.ids


def test_every_figure_has_a_caption_and_a_text_for_those_who_cannot_see_it(page):
    source = page.read_text()
    assert source.count("<figcaption>") == source.count("<figure>")
    assert 'alt=""' not in source


def test_the_page_says_what_was_trained_and_what_came_out(page):
    text = Page(page).text
    assert "resnet20 on cifar10: 6 runs of 10 epochs with 3 recipes (fp32, ibm2020, luq), seeds 0, 1." in text
    assert "Best against full precision: " in text
    assert "torch 2.13.0" in text
    assert "weight_decay 0.0001" in text


def test_a_second_report_over_the_same_folder_sees_the_same_runs(make_run, tmp_path):
    make_run("run", epochs=1)
    first, second = (Page(write_report([tmp_path])) for _ in range(2))
    assert first.tags == second.tags


def test_the_page_can_be_put_elsewhere_and_named(make_run, tmp_path):
    run = make_run("run", epochs=1)
    assert write_report([run], tmp_path / "there") == tmp_path / "there" / "index.html"
    assert write_report([run], tmp_path / "mine.html") == tmp_path / "mine.html"
    assert (tmp_path / "mine.html").is_file()


def test_a_name_of_another_kind_of_file_is_refused(make_run, tmp_path):
    with pytest.raises(
        UserError, match=r"a page of HTML, not \.pdf: give --out a folder, or a name that ends in \.html"
    ):
        write_report([make_run("run", epochs=1)], tmp_path / "x.pdf")
    assert not (tmp_path / "x.pdf").exists()


def test_strings_from_files_are_text_and_never_markup(make_run):
    nasty = '<script>alert("x")</script> $\\frac{$ & \'_x'
    run = make_run("run", recipe=nasty, epochs=2, layers=2, model="<img src=http://x>", note="<b>")
    metrics = (run / "metrics.jsonl").read_text().replace("layer1.0.conv1", "_<i>$x_{$</i>")
    metrics = metrics.replace('"accuracy %"', '"<b>$x_{$ %"')
    (run / "metrics.jsonl").write_text(metrics)
    (run / "env.json").write_text(json.dumps({"cpu": "</dl><h1>"}))
    found = Page(write_report([run]))
    assert "script" not in found.tags
    assert "b" not in found.tags
    assert found.tags.count("h1") == 1
    assert all(a.startswith(("#", "data:")) for a in found.addresses)
    assert nasty in found.text
    assert "</dl><h1>" in found.text


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([{"epochs": 1}], "No run has observations of quantized layers"),
        ([{"epochs": 3, "stopped": None, "recipe": "luq", "layers": 2}], "1 run not finished"),
        ([{"epochs": 3, "stopped": "interrupted"}], "1 run interrupted."),
        ([{"epochs": 3, "recipe": "luq", "diverges_at": 10, "layers": 1}], "1 run diverged"),
        ([{"epochs": 1, "steps_per_epoch": 10, "recipe": "luq", "layers": 3}], "The accuracy is"),
        ([{"model": "a"}, {"model": "b", "recipe": "luq", "layers": 2}], "a, b on cifar10: 2 runs"),
    ],
)
def test_a_report_of_runs_in_any_state_can_be_written(make_run, tmp_path, runs, said):
    for i, run in enumerate(runs):
        make_run(f"run{i}", **run)
    assert said in Page(write_report([tmp_path])).text


def test_a_report_of_a_run_without_a_single_line_says_so(make_run):
    run = make_run("run")
    (run / "metrics.jsonl").write_text("")
    (run / "env.json").unlink()
    text = Page(write_report([run])).text
    assert "No test result has been measured yet." in text
    assert "No run has logged a step yet." in text
    assert "No run recorded its environment." in text


def test_a_page_about_perplexity_ranks_the_lowest_first_and_has_no_percent(make_run, tmp_path):
    for recipe, accuracy in (("luq", 0.8), ("ibm2020", 0.9)):
        make_run(recipe, recipe=recipe, accuracy=accuracy, metric="perplexity")
    best = load_run(tmp_path / "ibm2020")
    page = write_report([tmp_path])
    assert f"The lowest perplexity is {best.result:.2f} (ibm2020)." in Page(page).text
    assert Page(page).text.count("test perplexity") == 2  # results, runs
    assert "%" not in page.read_text().split("<body>")[1]
    assert "accuracy" not in page.read_text()


def test_the_best_recipe_against_full_precision_has_the_lowest_error(make_run, tmp_path):
    for recipe, accuracy in (("fp32", 0.9), ("luq", 0.8), ("ibm2020", 0.85)):
        make_run(recipe, recipe=recipe, accuracy=accuracy, metric="word error rate %")
    fp32, ibm, luq = (load_run(tmp_path / r).result for r in ("fp32", "ibm2020", "luq"))
    assert fp32 < ibm < luq
    text = Page(write_report([tmp_path])).text
    assert f"fp32 reached a test word error rate of {fp32:.2f} %." in text
    assert f"Best against full precision: ibm2020 with {ibm:.2f} % (+{ibm - fp32:.2f} points); worst: luq" in text


def test_each_metric_has_its_own_sentences_tables_and_figures(make_run, tmp_path):
    for recipe, accuracy in (("fp32", 0.9), ("luq", 0.8)):
        make_run(f"{recipe}-c", recipe=recipe, accuracy=accuracy)
        make_run(f"{recipe}-p", recipe=recipe, accuracy=accuracy, metric="perplexity", model="lstm", data="ptb")
    page = write_report([tmp_path])
    text = Page(page).text
    assert {p.name for p in (page.parent / "figures").iterdir()} == {
        "result.png", "result-2.png", "curves.png", "curves-2.png",
    }  # fmt: skip
    assert text.count("test accuracy (%)") == 2  # results, runs
    assert text.count("test perplexity") == 3  # and a sentence
    assert text.count("Best against full precision: ") == 2
    assert ": test accuracy by recipe" in page.read_text()
    assert "lstm on ptb: test perplexity by recipe" in page.read_text()
    fp32, luq = (load_run(tmp_path / f"{r}-p").result for r in ("fp32", "luq"))
    assert f"luq, lstm, ptb with {luq:.2f} (+{luq - fp32:.2f})." in text


def test_a_damaged_line_is_told_on_the_page(make_run):
    run = make_run("run", epochs=1)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind"')
    assert "is damaged" in Page(write_report([run])).text


def test_malformed_histograms_and_lonely_numbers_do_not_stop_a_report(make_run):
    run = make_run("run", epochs=1, recipe="luq", stopped=None)
    odd = {"a": {"g_dgrad": {"log2_edges": [0, 1], "counts": [1, 2]}, "g_wgrad": 3}, "b": None}
    good = {"g_dgrad": {"log2_edges": [0, 1, 2], "counts": [1, 2], "zeros": 0, "grid": [], "decision_points": []}}
    with open(run / "metrics.jsonl", "a") as file:
        for step, histograms in ((110, odd), (120, {"a": good, **odd, "c": good}), (130, {**odd, "c": good})):
            file.write(json.dumps({"kind": "histograms", "step": step, "histograms": histograms}) + "\n")
        file.write(json.dumps({"kind": "layers", "step": 130, "layers": {"c": {"g_exponent": 3}}}) + "\n")
    write_report([run])


def test_a_place_that_cannot_be_written_is_a_user_error(make_run, tmp_path):
    run = make_run("run", epochs=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report to"):
        write_report([run], tmp_path / "file" / "below")


def test_the_title_and_the_sentence_need_no_model_or_data(make_run, tmp_path):
    run = make_run("run", epochs=1)
    (run / "config.json").write_text('{"recipe": "luq"}')
    groups = group_runs(load_runs([tmp_path]))
    assert title(groups) == "4-bit training"
    sentence = summary_sentences(groups, [summarize_group(g, groups) for g in groups])
    assert sentence.startswith("4-bit training: 1 run with 1 recipe (luq), seed none.")


def test_the_sentence_counts_in_steps_where_steps_were_asked_for(make_run, tmp_path):
    make_run("run", recipe="luq", epochs=1, max_steps=40)
    groups = group_runs(load_runs([tmp_path]))
    sentence = summary_sentences(groups, [summarize_group(g, groups) for g in groups])
    assert sentence.startswith("resnet20 on cifar10: 1 run of 40 steps with 1 recipe (luq), seed 0.")


def test_the_sentence_says_where_runs_differ_in_length(make_run, tmp_path):
    make_run("a", recipe="fp32", epochs=1)
    make_run("b", recipe="luq", epochs=1, max_steps=40)
    groups = group_runs(load_runs([tmp_path]))
    sentence = summary_sentences(groups, [summarize_group(g, groups) for g in groups])
    assert sentence.startswith("resnet20 on cifar10: 2 runs of different lengths: 10 epochs or 40 steps with 2 recipes")


def test_a_full_disk_leaves_the_page_that_was_there(make_run, monkeypatch):
    page = write_report([make_run("run", epochs=1)])
    before = page.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write the report to .*: the disk is full; free some space"):
        write_report([page.parent.parent])
    assert page.read_bytes() == before


def test_reading_runs_imports_neither_torch_nor_the_trainer_nor_a_window():
    code = "import sys, fourbit.report; print([m for m in ('torch', 'fourbit.train', 'matplotlib.pyplot') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_shows_what_language_models_write_and_how_fast_they_read(make_run, tmp_path):
    run = make_run("run", recipe="luq")
    lines = (run / "metrics.jsonl").read_text().replace("images_per_s", "tokens_per_s")
    (run / "metrics.jsonl").write_text(lines)
    (run / "sample.txt").write_text("ROMEO:\n---\n<b>Good</b> morrow.\n")
    page = write_report([run]).read_text()
    assert '<span class="quiet">ROMEO:</span>&lt;b&gt;Good&lt;/b&gt; morrow.' in page
    assert '<a href="#samples">' in page and "tokens per s" in page and ">900<" in page
    (run / "sample.txt").unlink()
    assert "samples" not in write_report([run]).read_text()


def test_the_page_has_a_table_of_examples_and_escapes_them(make_run):
    run = make_run("run", recipe="luq", metric="BLEU")
    table = {"columns": ["source", "<i>x"], "rows": [["<script>alert(1)</script>", "& so on"]] * 30}
    (run / "examples.json").write_text(json.dumps(table))
    page = write_report([run]).read_text()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 20 and "&lt;i&gt;x" in page and "<script" not in page
    assert '<a href="#examples">' in page and "&amp; so on" in page


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        '{"columns": [], "rows": []}',
        '{"columns": ["a"], "rows": [["b", "c"]]}',
        '{"columns": 1, "rows": 2}',
    ],
)
def test_examples_of_another_form_are_left_out(make_run, content):
    run = make_run("run", recipe="luq")
    (run / "examples.json").write_text(content)
    assert "#examples" not in write_report([run]).read_text()


def test_runs_on_text_have_bits_per_byte_tokens_per_second_and_curves_over_tokens(make_run):
    run = make_run("run", recipe="fp32", metric="perplexity", steps_per_epoch=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["tokens"] = 640 * line["step"]
        if "images_per_s" in line:
            line["tokens_per_s"] = line.pop("images_per_s")
        if line["kind"] in ("epoch", "final"):
            line["bits_per_byte"] = 1.23456
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([run]).read_text()
    for cell in ("bits per byte", "1.2346", "tokens per s", "900"):
        assert cell in page
    other = make_run("images", recipe="fp32")
    assert "bits per byte" not in write_report([other]).read_text()


@pytest.mark.parametrize("name", ["config.json", "env.json", "metrics.jsonl", "sample.txt", "examples.json"])
def test_what_lies_outside_of_a_run_is_not_read_through_a_link(make_run, tmp_path, name):
    run, outside = make_run("run", epochs=1), tmp_path / "secret"
    outside.write_text((run / name).read_text() if (run / name).exists() else "a\n---\nsecret")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a link that leads out of the run's folder"):
        write_report([run])
    (run / name).unlink()
    outside.rename(run / "inside")
    (run / name).symlink_to("inside")
    if name != "examples.json":  # inside, a link is as good as a file
        assert write_report([run]).exists()


@pytest.mark.parametrize("place", ["report", "report/figures", "report/figures/curves.png", "report/index.html"])
def test_nothing_outside_is_written_through_a_link_in_a_run(make_run, tmp_path, place):
    run, outside = make_run("run", epochs=1), tmp_path / "outside"
    inside = run / place
    inside.parent.mkdir(parents=True, exist_ok=True)
    if inside.suffix:
        outside.write_text("fourbit report")
    else:
        outside.mkdir()
    inside.symlink_to(outside)
    with pytest.raises(UserError, match="is a link that leads out"):
        write_report([run])
    assert outside.read_text() == "fourbit report" if inside.suffix else not list(outside.iterdir())


def test_names_of_folders_and_recipes_neither_lead_elsewhere_nor_move_the_cursor(make_run, tmp_path, capsys):
    """A folder named as markup, a recipe named as a path, and a terminal's own commands in both."""
    before = set(tmp_path.rglob("*"))
    run = make_run("<script>x", recipe="../../x\x1b[2J\u202e", layers=2)
    page = write_report([run])
    assert "<script" not in page.read_text() and "&lt;script&gt;x" in page.read_text()
    assert "\x1b" not in page.read_text() and "\u202e" not in page.read_text()
    made = set(tmp_path.rglob("*")) - before
    assert all(path == run or run in path.parents for path in made)
    moved = run.rename(run.with_name("b\x1b]0;title\x07"))
    assert main(["diagnose", str(moved)]) in (0, 1) and main(["runs", str(moved)]) == 0
    assert main(["report", str(moved / "none\x1b[2J")]) == 2
    said = capsys.readouterr()
    assert (
        not {"\x1b", "\x07", "\u202e"} & {*said.out, *said.err} and "\N{REPLACEMENT CHARACTER}" in said.out + said.err
    )
