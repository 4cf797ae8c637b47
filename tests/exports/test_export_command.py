"""`fourbit export` and `fourbit evaluate`: of runs and of folders of transformers."""

from __future__ import annotations

import json

import pytest

from fourbit.cli import main
from fourbit.exports._runs import evaluate

pytest.importorskip("onnxruntime")


def trained(out, recipe="int4-fwd"):
    words = [
        "train",
        "--model",
        "digits_cnn",
        "--data",
        "digits",
        "--recipe",
        recipe,
        "--epochs",
        "1",
        "--max-steps",
        "30",
    ]
    assert main([*words, "--out", str(out), "--threads", "1", "--no-progress"]) == 0
    return out


def test_a_run_is_exported_with_a_card_and_evaluated_side_by_side(tmp_path, capsys):
    run = trained(tmp_path / "run")
    capsys.readouterr()
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "served")]) == 0
    card = (tmp_path / "served/README.md").read_text()
    for words in ("recipe `int4-fwd`", "int4_sym", "test_metric", "torch", "onnxruntime"):
        assert words in card
    title, found = evaluate(run)
    assert title == "accuracy %" and list(found) == ["float weights", "4-bit network", "export (onnx)"]
    assert found["4-bit network"] == found["export (onnx)"]
    final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["4-bit network"] == f"{100 * final['test_accuracy']:.2f}%"
    assert main(["evaluate", str(run), "--to", "safetensors"]) == 0
    assert "export (safetensors)" in capsys.readouterr().out
    for command, words in (
        (["export", str(run), "--to", "gguf"], "linear layers"),
        (["export", str(run), "--to", "onx"], "did you mean 'onnx'"),
        (["export", str(tmp_path / "none")], "there is no run in"),
        (["export", str(run), "--out", str(run)], "is not empty"),
        (["evaluate", str(run), "--to", "gguf"], "cannot be run here"),
        (["evaluate", str(tmp_path)], "there is no run in"),
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err
    assert not (run / "export-gguf").exists()
