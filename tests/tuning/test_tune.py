"""Which products need 8 bits: the choice, the recipe that comes out, and a whole run of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit import recipes
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.ops import REUSE
from fourbit.train import TrainConfig
from fourbit.tuning._candidates import Candidate, Candidates, alternative, raised
from fourbit.tuning._choose import choose
from fourbit.tuning._output import recipe_file
from fourbit.tuning._probe import Measured, Record

A, B, C = (Candidate(layer, "wgrad") for layer in "abc")
HIGH = alternative(recipes.get("hfp8"))
IBM = recipes.get("ibm2020").rules[-1].spec
assert IBM is not None


def chosen_of(gains: Any, costs: dict[Candidate, float], limit: float) -> list[Candidate]:
    steps = choose(
        list(costs), lambda chosen: 1 - gains(chosen), lambda c: costs[c], lambda chosen: sum(costs[c] for c in chosen) <= limit
    )  # fmt: skip
    assert all(step.gain > 0 for step in steps)
    return [step.candidate for step in steps]


def test_the_greatest_gain_per_cost_comes_first_until_the_budget_is_used_up():
    values = {A: 0.3, B: 0.2, C: 0.05}
    costs = {A: 3.0, B: 1.0, C: 1.0}
    assert chosen_of(lambda chosen: sum(values[c] for c in chosen), costs, 4) == [B, A]
    assert chosen_of(lambda chosen: sum(values[c] for c in chosen), costs, 2) == [B, C]
    assert chosen_of(lambda chosen: sum(values[c] for c in chosen), costs, 0.5) == []


def test_a_gain_is_measured_with_what_is_chosen_already():
    """A and B are each good alone, and no better together."""

    def gains(chosen: tuple[Candidate, ...]) -> float:
        return 0.3 * bool({A, B} & set(chosen)) + 0.1 * (C in chosen)

    assert chosen_of(gains, {A: 1.0, B: 1.01, C: 1.0}, 3.1) == [A, C]


def test_what_raises_the_error_is_never_taken():
    assert chosen_of(lambda chosen: -len(chosen), {A: 1.0, B: 1.0}, 9) == []


def test_enough_ends_the_choice():
    steps = choose([A, B, C], lambda chosen: -len(chosen), lambda c: 1.0, lambda chosen: True, lambda c: len(c) >= 2)
    assert len(steps) == 2


def test_a_product_in_8_bits_changes_its_own_operands_alone():
    dgrad, wgrad, fprop = (raised(IBM, gemm, HIGH) for gemm in ("dgrad", "wgrad", "fprop"))
    assert dgrad is not None and wgrad is not None and fprop is not None
    assert dgrad == dataclasses.replace(IBM, g_dgrad=dataclasses.replace(IBM.g_dgrad, format=fb.formats.FP8_152))
    assert wgrad == dataclasses.replace(IBM, g_wgrad=dataclasses.replace(IBM.g_wgrad, format=fb.formats.FP8_152))
    assert (fprop.x_fprop, fprop.w_fprop) == (HIGH.x_fprop, HIGH.w_fprop)
    assert (fprop.g_dgrad, fprop.w_dgrad) == (IBM.g_dgrad, REUSE)
    assert raised(dgrad, "dgrad", HIGH) is None


def test_a_gradient_that_serves_both_products_is_told_apart():
    one_phase = recipes.get("ibm2020-no-tpr").rules[-1].spec
    assert one_phase is not None
    assert one_phase.g_wgrad is REUSE
    found = raised(one_phase, "dgrad", HIGH)
    assert found is not None
    assert found.g_wgrad == one_phase.g_dgrad


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 2))


def candidates_of(recipe: str = "ibm2020") -> Candidates:
    return Candidates(network(), recipes.get(recipe), HIGH, torch.randn(4, 8), None, None)


def test_shares_and_energy_are_those_of_the_recipe_that_comes_out():
    found = candidates_of()
    assert {c.layer for c in found.all} == {"1", "2"}
    chosen = [Candidate("1", "dgrad"), Candidate("1", "wgrad"), Candidate("2", "fprop")]
    recipe = found.recipe_with(chosen)
    shares = recipes.explain(network(), recipe, torch.randn(4, 8)).shares()
    before = recipes.explain(network(), recipes.get("ibm2020"), torch.randn(4, 8)).shares()
    assert found.share(chosen) == pytest.approx(before["4 x 4"] - shares["4 x 4"])
    # the forward operands of 2 are reused, so its other products have an operand with 8 bits as well
    assert found.share(chosen[2:]) == pytest.approx(3 * found.share([Candidate("2", "dgrad")]))
    base, now = found.joules(()), found.joules(chosen)
    assert base is not None and now is not None and now > base


def test_the_file_says_why_and_is_the_recipe():
    found = candidates_of()
    recipe = found.recipe_with([Candidate("2", "wgrad"), Candidate("1", "dgrad")], "mine")
    text = recipe_file(recipe, [["dgrad: because"], ["wgrad: as well", "and more"]])
    assert recipes.parse_recipe(text) == recipe or recipes.differences(recipes.parse_recipe(text), recipe) == []
    lines = text.splitlines()
    assert lines[lines.index("# dgrad: because") + 1] == "[[rules]]"
    assert lines[lines.index("# and more") + 2] == "where = \"name('^2$')\""


def test_a_name_with_dots_means_that_layer_alone():
    model = nn.ModuleDict({"a": nn.Sequential(*network()), "aX0": nn.Linear(2, 2)})

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["aX0"](self.parts["a"](x))

    found = Candidates(Whole(), recipes.get("ibm2020"), HIGH, torch.randn(4, 8), None, None)
    whole = fb.convert(Whole(), found.recipe_with([Candidate("parts.a.1", "wgrad")]))
    raised_layers = [
        n for n, m in fb.quantized_layers(whole).items() if m.spec.g_wgrad == raised(IBM, "wgrad", HIGH).g_wgrad
    ]  # type: ignore[union-attr]
    assert raised_layers == ["parts.a.1"]


def test_what_was_measured_is_read_again_and_a_line_that_was_cut_off_is_not(tmp_path: Path):
    measured = Measured(0.5, 1.5, None, None, {"a": (0.9, 0.1)})
    Record(tmp_path / "m.jsonl").add("a:wgrad", measured)
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"key": "b:wg')
    record = Record(tmp_path / "m.jsonl")
    assert record.get("a:wgrad") == measured
    assert record.get("b:wgrad") is None
    record.add("b:wgrad", measured)
    assert Record(tmp_path / "m.jsonl").get("b:wgrad") == measured


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--budget", "0"], "budget is 0, but must be"),
        (["--budget", "1.5"], "budget is 1.5, but must be"),
        (["--budget", "nan"], "budget is nan, but must be"),
        (["--max-loss", "-1"], "max_loss is -1, but must be"),
        (["--budget", "0.1", "--max-loss", "1"], "give one of them"),
        (["--num-batches", "0"], "num_batches is 0"),
        (["--high", "luq"], "luq has no operands with 8 bits"),
        (["--high", "fp32"], "fp32 has no operands with 8 bits"),
        (["--high", "none"], "unknown recipe 'none'"),
        (["--model", "transformer_small", "--data", "multi30k", "--max-loss", "1"], "give --budget instead"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    network = [] if "--model" in flags else ["--model", "digits_cnn", "--data", "digits"]
    given = ["tune", *network, "--out", str(tmp_path / "t"), *flags]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_a_recipe_without_4_bit_layers_has_nothing_to_choose_from():
    for recipe in ("hfp8", "fp32"):
        with pytest.raises(UserError, match="nothing to choose from"):
            candidates_of(recipe)


@pytest.mark.slow
def test_a_recipe_within_the_budget_comes_out_the_same_twice_and_its_measurements_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def config(name: str) -> TrainConfig:
        small = {
            "model": "digits_cnn",
            "data": "digits",
            "max_steps": 12,
            "batch_size": 64,
            "lr": 0.05,
            "device": "cpu",
        }
        quick = {"log_to": (), "progress": False, "observe_every": 0, "max_test_batches": 1}
        return TrainConfig(recipe="ibm2020", out=tmp_path / name, **small, **quick)  # type: ignore[arg-type]

    found = fb.tune(config("a"), budget=0.15, num_batches=1)
    assert found.steps
    assert 0 < found.share <= 0.15
    assert found.after.error < found.before.error
    written = recipes.read_recipe(found.path)
    assert recipes.differences(written, found.recipe) == []
    assert (tmp_path / "a" / "tune.png").stat().st_size > 1000
    assert json.loads((tmp_path / "a" / "tune.json").read_text())["share"] == found.share
    again = fb.tune(config("b"), budget=0.15, num_batches=1)
    assert [(s.candidate, s.after) for s in again.steps] == [(s.candidate, s.after) for s in found.steps]

    monkeypatch.setattr("fourbit.tuning._probe.Probe.measure", lambda *_: pytest.fail("measured again"))
    resumed = fb.tune(config("a"), budget=0.15, num_batches=1)
    assert [s.candidate for s in resumed.steps] == [s.candidate for s in found.steps]
    monkeypatch.undo()
    with pytest.raises(UserError, match="was begun with num_batches 1, not 2"):
        fb.tune(config("a"), budget=0.15)

    by_loss = fb.tune(config("a"), max_loss=0.0, num_batches=1)
    assert all(s.candidate.gemm == "fprop" for s in by_loss.steps)
    assert by_loss.after.test_loss is not None and by_loss.before.test_loss is not None
    assert by_loss.after.test_loss <= by_loss.before.test_loss
