"""`fourbit hardware` on the command line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("cyclopts")

from fourbit.cli import main
from fourbit.hardware import Results

LIBERTY = Path(
    os.environ.get(
        "FOURBIT_LIBERTY", Path(__file__).parents[3] / "shared/data/liberty/sg13g2_stdcell_typ_1p20V_25C.lib.gz"
    )
)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["hardware", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fourbit: ") and captured.err.count("\n") == 1
    return captured.err


def test_units_lists_every_unit(capsys):
    from fourbit.hardware import UNITS

    assert main(["hardware", "units"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in UNITS) and "pyosys" in out


def test_estimate_shows_time_energy_and_shares(capsys):
    flags = ("--model", "resnet50_imagenet", "--recipe", "ibm2020-1x1fp8", "--input", "3x224x224")
    assert main(["hardware", "estimate", *flags]) == 0
    out = capsys.readouterr().out
    for word in ("time, ms", "energy, mJ", "DRAM, mJ", "area, mm2", "int4_fp8", "time bound by", "elementwise"):
        assert word in out
    assert main(["hardware", "estimate", "--recipe", "nvfp4", "--layers", "--accumulator", "fixed"]) == 0
    assert "stages.0.0.conv1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("estimate --recipe ibm2021", "unknown recipe 'ibm2021'"),
        ("estimate --model resnet21", "resnet21"),
        ("estimate --recipe ibm2020-fp5", "no arithmetic unit multiplies"),
        ("estimate --period 100", "misses a clock period of 100 ps"),
        ("estimate --batch-size 0", "batch_size is 0"),
        ("estimate --rows 0", "rows is 0"),
        ("estimate --input 3x32", "input is '3x32'"),
        ("estimate --results missing.json", "missing.json cannot be read"),
        ("units --library tsmc5", "tsmc5"),
        ("report --runs nowhere --out page.html", "nowhere is not a folder"),
        ("synth --liberty missing.lib", "missing.lib"),
        ("synth --liberty missing.lib --units fma", "unknown unit 'fma'"),
        ("synth --liberty missing.lib --targets 0", "targets are 0"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *arguments.split())
    assert not list(tmp_path.iterdir())


def test_the_report_needs_no_tools(capsys, monkeypatch, tmp_path):
    from fourbit.cli import _hardware_page

    monkeypatch.setattr(_hardware_page, "NETWORKS", {"vgg16": ("VGG16, 32 pixels", 8)})
    monkeypatch.setattr(_hardware_page, "EXTERNAL", {})
    page = tmp_path / "page.html"
    assert main(["hardware", "report", "--out", str(page)]) == 0
    text = page.read_text()
    assert "pyosys" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "page_figures").iterdir()} == {"density.png", "area.png"}
    for words in ("Is 7.3 right?", "ResNet-50 v1.5", "own silicon", "What is not modelled", "ibm2020-dw8"):
        assert words in text
    page.write_text("mine")
    assert "is not a report of fourbit" in fails(capsys, "report", "--out", str(page))
    assert page.read_text() == "mine"


@pytest.mark.skipif(importlib.util.find_spec("pyosys") is None, reason="pyosys is not installed")
@pytest.mark.skipif(not LIBERTY.exists(), reason="no Liberty file: set FOURBIT_LIBERTY")
def test_synth_writes_what_the_other_commands_read(capsys, tmp_path):
    out = tmp_path / "results.json"
    flags = ("--liberty", str(LIBERTY), "--units", "random,register", "--targets", "1000", "--processes", "1")
    assert main(["hardware", "synth", *flags, "--out", str(out)]) == 0
    assert "2 units" in capsys.readouterr().out
    results = Results.read(out)
    assert results.units == ["random", "register"] and results.seconds > 0
    assert main(["hardware", "units", "--results", str(out)]) == 0
    assert "the results hold nothing about the unit fma_fp16" in fails(capsys, "estimate", "--results", str(out))
