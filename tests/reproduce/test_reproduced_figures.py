"""The figures: each is drawn at the scale smoke, and what they measure agrees with independent computations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fourbit import data, formats
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.reproduce.figures import FIGURES, draw
from fourbit.reproduce.figures._base import Studio
from fourbit.reproduce.figures._bias import calibration_error, predictions
from fourbit.reproduce.figures._formats import MULTIPLIERS, _lognormal, quantized
from fourbit.reproduce.figures._probe import one_batch, output_gradients, sample
from fourbit.reproduce.figures._statistics import batch_means
from fourbit.train import load


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module")
def run(out) -> Path:
    """A trained network in full precision."""
    studio = Studio("smoke", out / "x", out / "networks-smoke", threads=1)
    return studio.train("residual", ["fp32"])["fp32", 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_is_drawn(name, out, capsys):
    assert main(["reproduce", name, "--scale", "smoke", "--threads", "1", "--out", str(out), "--no-progress"]) == 0
    printed = capsys.readouterr().out
    folder = out / f"{name}-smoke"
    text = (folder / f"{name}.md").read_text()
    assert text.startswith("# ") and "|---|" in text and text.strip() in printed
    picture = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
    assert picture.shape[1] > 800 and 0.001 < (picture < 128).mean() < 0.3
    assert "nan" not in text


def test_the_least_error_lies_at_1_6_and_the_bias_vanishes_near_1_85():
    """On log-normal numbers, against the expectation over many placements of the largest."""
    errors, biases = {m: [] for m in MULTIPLIERS}, {m: [] for m in MULTIPLIERS}
    generator = np.random.default_rng(0)
    x = np.exp(1.5 * generator.standard_normal(50_000))
    for level in np.geomspace(32, 64, 9)[1:]:
        scaled = x * level / x.max()
        for m in MULTIPLIERS:
            power = np.floor(np.log(scaled * m) / math.log(4))
            q = np.where(power < -3, 0.0, 4.0 ** np.minimum(power, 3))
            errors[m].append(((q - scaled) ** 2).sum() / (scaled**2).sum())
            biases[m].append((q.sum() - scaled.sum()) / scaled.sum())
    best = min(MULTIPLIERS, key=lambda m: np.mean(errors[m]))
    unbiased = min(MULTIPLIERS, key=lambda m: abs(np.mean(biases[m])))
    assert abs(best - 1.6) < 0.11 and abs(unbiased - 1.85) < 0.11


@pytest.mark.parametrize("name", ["fp4_r4_even", "fp4_r4_odd", "fp4_r2", "fp4_121"])
def test_quantized_scales_as_gradscale_does_and_rounds_as_the_format_says(name):
    x = _lognormal(1.0, 300) * 3e-5
    format = formats.get(name)
    scale = 2.0 ** math.floor(math.log2(64 / float(x.abs().max())))
    assert 32 < float(x.abs().max()) * scale <= 64
    expected = [format.round(float(torch.tensor(v * scale).float())) / scale for v in x.tolist()]
    assert quantized(x, format).tolist() == expected


def test_output_gradients_are_those_of_autograd(run):
    trained = load(run, fuse=False)
    x, y = one_batch(trained.task)
    outputs = []
    first = next(m for m in trained.model.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda _m, _x, out: outputs.append(out))
    loss = torch.nn.functional.cross_entropy(trained.model(x), y)
    (exact,) = torch.autograd.grad(loss, outputs)
    found = next(iter(output_gradients(run, None).values()))
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-8)


def test_batch_means_are_those_of_the_inputs_of_each_norm(run):
    found = batch_means(run, None)
    trained = load(run, fuse=False)
    first = next(m for m in trained.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    before = first.running_mean.clone(), first.running_var.clone()
    first.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach()))
    trained.model(one_batch(trained.task)[0])
    mean = seen[0].double().mean((0, 2, 3))
    means, drift = next(iter(found.values()))
    assert np.allclose(means, mean, atol=1e-5)
    assert np.allclose(drift, (mean - before[0]) / (before[1] + 1e-5).sqrt(), atol=1e-4)


def test_calibration_error_of_what_can_be_reckoned_by_hand():
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.3, 0.7]] * 4)
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0])
    assert calibration_error(probabilities, labels) == pytest.approx(0.5 * abs(0.75 - 0.9) + 0.5 * abs(0.5 - 0.7))


def test_predictions_are_of_the_test_images(run):
    probabilities, labels, classes = predictions(run, None)
    assert probabilities.shape == (360, 10) and len(labels) == 360 and len(classes) == 10
    trained = load(run)
    hits = sum(float(trained.task.loss(trained.model.eval(), b)[1][1]) for b in trained.task.batches("test"))
    assert (probabilities.argmax(1) == labels).sum() == hits


def test_kept_checkpoints_and_the_network_of_a_run(run):
    late, early = load(run), load(run, epoch=1)
    last = load(run, epoch=4)
    name = next(iter(late.model.state_dict()))
    assert torch.equal(late.model.state_dict()[name], last.model.state_dict()[name])
    assert not torch.equal(late.model.state_dict()[name], early.model.state_dict()[name])
    with pytest.raises(UserError, match="has no checkpoint of epoch 9"):
        load(run, epoch=9)
    with pytest.raises(UserError, match="there is no run in"):
        load(run / "nothing")


def test_a_figure_at_the_scale_of_the_paper_takes_no_stand_in(tmp_path, monkeypatch):
    part = dataclasses.replace(data.load("digits"), name="cifar10")
    monkeypatch.setattr(data, "load", lambda name, folder=None: part)
    with pytest.raises(UserError, match="needs all of cifar10, at least 50,000 training images"):
        draw("fig6", scale="paper", out=tmp_path)
    assert not list(tmp_path.rglob("config.json"))


def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path):
    assert main(["reproduce", "fig7"]) == 2
    assert "unknown thing to reproduce 'fig7'" in capsys.readouterr().err
    assert main(["reproduce", "fig1a", "--row", "x"]) == 2
    assert "fig1a is a figure and has neither rows nor columns" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown scale 'tiny'"):
        draw("fig1a", scale="tiny", out=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there is no data folder"):
        draw("fig6", scale="small", data_dir=tmp_path / "none", out=tmp_path)
    assert not (tmp_path / "fig6-small").exists()
    assert main(["reproduce", "list", "--row", "x"]) == 2
    assert "list shows everything there is" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="could not be written"):
        draw("fig1a", out=blocked)


@pytest.mark.slow
def test_the_ends_of_the_line_between_two_checkpoints_are_the_checkpoints(out, run):
    """The losses that fig5 writes at 0 and at 1, against the test loss of the two checkpoints."""
    text = draw("fig5", scale="smoke", out=out, threads=1).text
    row = next(line for line in text.splitlines() if line.startswith("| `fp32` | interpolated"))
    at_0, at_1 = (float(cell) for cell in row.split("|")[3:5])
    for epoch, found in ((4, at_0), (3, at_1)):
        trained = load(run, epoch=epoch, fuse=False)
        sums = sum(trained.task.loss(trained.model.eval(), b)[1] for b in trained.task.batches("test"))
        assert found == pytest.approx(float(sums[0] / sums[2]), abs=6e-4)  # type: ignore[index]


def test_samples_are_spread_over_all_columns():
    x = torch.arange(64).repeat(4096).view(-1)
    found = sample(x, 1 << 12)
    assert len(found) == 1 << 12 and len(found.unique()) == 64
