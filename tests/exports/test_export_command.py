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


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "..", 3])
def test_a_saved_model_whose_index_names_files_elsewhere_is_refused(tmp_path, capsys, name):
    pytest.importorskip("transformers")
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"recipe": "nvfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert main(["export", str(tmp_path), "--to", "safetensors"]) == 2
    assert "which is no file of its folder" in capsys.readouterr().err
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert main(["export", str(tmp_path), "--to", "safetensors"]) == 2
    assert "is no list of shards" in capsys.readouterr().err
    for architectures in (["logging"], [3], "pipeline"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        assert main(["export", str(tmp_path), "--to", "safetensors"]) == 2
        assert "which is no model of transformers" in capsys.readouterr().err


def test_an_export_is_not_written_through_a_link_in_a_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "run/export-onnx").symlink_to(tmp_path / "outside")
    assert main(["export", str(tmp_path / "run")]) == 2
    assert "is a link that leads out" in capsys.readouterr().err and not list((tmp_path / "outside").iterdir())
