"""`fourbit conform`: what it prints and writes, its exit codes, and that a mistake is one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fourbit.cli import main
from fourbit.conform import PEERS
from fourbit.formats import BLOCKS

SOURCE = """
import torch
from fourbit.formats import MXFP4

calls = []

def right(x):
    return torch.tensor(MXFP4.round(x.tolist()), dtype=torch.float32).view(x.shape)

def wrong(x):
    return right(x) * 1.25

def draws(x, seed):
    calls.append(seed)
    return right(x)

def broken(x):
    raise RuntimeError("no such kernel\\nand more")

def flat(x):
    return right(x).flatten()

class Layers:
    @staticmethod
    def plain(inputs, outputs):
        return torch.nn.Linear(inputs, outputs)

number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(SOURCE)
    Path("needy.py").write_text("import a_library_that_nobody_has\n")
    Path("bad.py").write_text("1 / 0\n")
    yield
    for name in ("mine", "needy", "bad"):
        sys.modules.pop(name, None)


def test_a_right_quantizer_gets_a_table_a_report_and_exit_code_0(capsys):
    assert main(["conform", "mine:right", "--format", "mxfp4", "--out", "report.json"]) == 0
    text = capsys.readouterr().out
    assert "no check failed" in text and "FAIL" not in text
    report = json.loads(Path("report.json").read_text())
    assert report["passed"] and report["format"] == "mxfp4" and set(report["versions"]) == {"fourbit", "torch"}
    assert all(result["name"] in text for result in report["results"])


def test_a_wrong_quantizer_gets_exit_code_1_and_is_told_what_is_wrong(capsys):
    assert main(["conform", "mine:wrong", "--format", "mxfp4", "--out", "report.json"]) == 1
    text = capsys.readouterr().out
    assert "FAIL" in text and "became" in text and "checks failed: grid" in text
    assert not json.loads(Path("report.json").read_text())["passed"]


def test_a_seed_differs_at_every_call(capsys):
    assert main(["conform", "mine:draws", "--format", "mxfp4"]) == 0
    calls = sys.modules["mine"].calls
    assert len(set(calls)) == len(calls) > 10


def test_a_linear_layer_is_checked_along(capsys):
    assert main(["conform", "mine:right", "--format", "mxfp4", "--linear", "mine:Layers.plain"]) == 0
    assert "linear: gradient of the bias" in capsys.readouterr().out


def test_without_a_name_formats_and_libraries_are_listed(capsys):
    assert main(["conform"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*BLOCKS, *PEERS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("right", "write module:function"),
        ("mine:", "write module:function"),
        ("nowhere:right --format mxfp4", "there is no module nowhere"),
        ("nowhere.at.all:right --format mxfp4", "there is no module nowhere.at.all"),
        ("needy:right --format mxfp4", "needs a_library_that_nobody_has"),
        ("bad:right --format mxfp4", "does not load: ZeroDivisionError"),
        ("mine:left --format mxfp4", "module mine has no left"),
        ("mine:number --format mxfp4", "is no function"),
        ("mine:right", "which format does mine:right claim?"),
        ("mine:right --format mxfp5", "unknown block format 'mxfp5': did you mean 'mxfp4'"),
        (
            "mine:broken --format mxfp4",
            "failed on an ordinary float32 tensor [4, 128]: RuntimeError: no such kernel and more",
        ),
        ("mine:flat --format mxfp4", "returned torch.float32 [512] for a torch.float32 tensor [4, 128]"),
        ("mine:right --format mxfp4 --rounding up", "Choose from"),
        ("mine:right --format mxfp4 --samples 0", "samples is 0"),
        ("mine:right --format mxfp4 --linear mine:number", "making the layer"),
        ("mine:right --format mxfp4 --out no/folder/r.json", "there is no folder no/folder"),
        ("torchao:nvfp5", "unknown quantizer 'torchao:nvfp5': did you mean 'torchao:nvfp4'"),
        ("--format mxfp4", "name a function first"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, words):
    assert main(["conform", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("fourbit: ") and captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize("name", [name for name in PEERS if not name.startswith("fourbit:")])
def test_a_library_that_is_not_installed_says_how_to_install_it(capsys, name, monkeypatch):
    package = PEERS[name].module.partition(".")[0]
    for module in [each for each in sys.modules if each.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    assert main(["conform", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not installed" in error and PEERS[name].how in error


@pytest.mark.parametrize("name", list(PEERS))
def test_a_library_that_is_installed_is_checked(name):
    from fourbit.errors import UserError

    try:
        PEERS[name].require()
    except UserError as error:
        pytest.skip(str(error))
    main(["conform", name, "--samples", str(2**14), "--out", "report.json"])
    report = json.loads(Path("report.json").read_text())
    assert report["format"] == PEERS[name].format and report["results"]


def test_the_page_shows_the_stored_reports():
    from benchmarks.conformance import PAGE, RESULTS, filled, paths

    assert sorted(RESULTS.iterdir()) == sorted(paths().values())
    page = PAGE.read_text()
    assert filled(page) == page
