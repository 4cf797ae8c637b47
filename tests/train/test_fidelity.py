"""The shares of exact gradients against an independent composition with autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fourbit import recipes
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.train import gradient_fidelity, load, train
from fourbit.train._fidelity import exact_gradients


@pytest.fixture
def run(make_config):
    return train(make_config(epochs=1)).folder


def test_full_precision_keeps_everything(run):
    found = gradient_fidelity(run, ["fp32"])["fp32"]
    assert len(found) == 6
    for layer in found.values():
        assert layer.projection == pytest.approx(1) and layer.cosine == pytest.approx(1)


def test_the_last_layer_is_what_float64_says(run):
    """Its gradient needs no backward pass through others: dW = round(s g)^T x / s, where both operands are in FP16 1-6-9."""
    trained = load(run, recipe="ibm2020")
    model = trained.model.eval()
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)][-1]
    seen = {}
    last.register_forward_hook(lambda m, x, y: seen.update(x=x[0].detach(), y=y.detach()))
    x, y = next(iter(trained.task.batches("train", epoch=10_000)))
    for _ in range(2):
        model.train()(x)
    g = (F.softmax(seen["y"].double(), -1) - F.one_hot(y, seen["y"].shape[1])) / len(y)
    exact = (g.t() @ seen["x"].double()).flatten()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    rounded = last.weight.grad.double().flatten()
    found = gradient_fidelity(run, ["ibm2020"])["ibm2020"][name]
    assert found.projection == pytest.approx(float(rounded @ exact / (exact @ exact)), abs=2e-3)
    assert found.cosine == pytest.approx(float(F.cosine_similarity(rounded, exact, dim=0)), abs=2e-3)


def test_radix_4_shrinks_towards_the_input_and_stochastic_rounding_does_not(run):
    found = gradient_fidelity(run, ["ibm2020", "ibm2020-luq"])
    first = next(iter(found["ibm2020"]))
    assert found["ibm2020"][first].projection < 0.8 < found["ibm2020-luq"][first].projection < 1.2


def test_only_gradients_differ_in_the_reference():
    for rule in exact_gradients(recipes.get("ibm2020-1x1fp8")).rules:
        assert rule.spec is None or (rule.spec.g_dgrad is None and rule.spec.output is not None)


def test_the_command_prints_and_writes(run, tmp_path, capsys):
    assert main(["fidelity", str(run), "--recipes", "ibm2020,luq", "--markdown", str(tmp_path / "t.md")]) == 0
    assert "ibm2020" in capsys.readouterr().out
    assert (tmp_path / "t.md").read_text().startswith("| layer | ibm2020 | luq |")
    assert main(["fidelity", str(run), "--recipes", "luq", "--markdown", str(tmp_path / "no" / "t.md")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["fidelity", str(run), "--threads", "0"]) == 2
    assert "threads is 0, but must be 1 to 4096" in capsys.readouterr().err
    assert main(["fidelity", str(tmp_path / "none")]) == 2
    assert "there is no run in" in capsys.readouterr().err
    with pytest.raises(UserError, match="ibm2021"):
        gradient_fidelity(run, ["ibm2021"])
