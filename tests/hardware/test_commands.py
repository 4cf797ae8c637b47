"""`fourbit hardware` on the command line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("cyclopts")

from fourbit import hardware
from fourbit.cli import main
from fourbit.hardware import UNITS, Results, synthesize

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
        ("estimate --recipe luq-eq11", "no arithmetic unit multiplies"),
        ("estimate --period 100", "misses a clock period of 100 ps"),
        ("estimate --batch-size 0", "batch_size is 0"),
        ("estimate --rows 0", "rows is 0"),
        ("estimate --bandwidth nan", "bandwidth is nan, but must be positive"),
        ("estimate --period inf", "period is inf, but must be positive"),
        ("units --define mine.py", "mine.py cannot be read"),
        ("synth --liberty missing.lib --processes 0", "processes is 0"),
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
    from fourbit.reproduce import _hardware_networks

    monkeypatch.setattr(_hardware_networks, "NETWORKS", {"vgg16": ("VGG16, 32 pixels", 8)})
    monkeypatch.setattr(_hardware_networks, "EXTERNAL", {})
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
def test_synth_writes_what_the_other_commands_read(capsys, monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from fourbit.formats import FP4_R2, IntFormat\nfrom fourbit.hardware import UNITS, InnerProduct\n"
        "UNITS.add('int2_fp4', InnerProduct('int2_fp4', 'INT2 x FP4', IntFormat('int2', '', '', 2, -1, 1), FP4_R2, 2))\n"
    )
    monkeypatch.setattr(UNITS, "_items", dict(UNITS._items))
    asked = []

    def few(names, *arguments):  # mapping the baseline takes a minute
        asked.extend(names)
        return synthesize(["random", "register"], *arguments)

    monkeypatch.setattr(hardware, "synthesize", few)
    units = ("--units", "random,int2_fp4", "--define", str(mine))
    flags = ("--liberty", str(LIBERTY), *units, "--targets", "1000", "--processes", "1")
    assert main(["hardware", "synth", *flags, "--out", str(out)]) == 0
    assert "5 units" in capsys.readouterr().out
    results = Results.read(out)
    assert asked == ["random", "int2_fp4", "fma_fp16", "register", "converter"]
    assert results.units == ["random", "register"] and results.seconds > 0
    monkeypatch.setattr(UNITS, "_items", {k: v for k, v in UNITS._items.items() if k != "int2_fp4"})
    assert main(["hardware", "units", "--results", str(out), "--define", str(mine)]) == 0
    assert "32 random bits" in capsys.readouterr().out and "int2_fp4" in UNITS
    text = fails(capsys, "estimate", "--results", str(out))
    assert "the results hold nothing about" in text and "uint4_int4" in text and "--units" in text
