"""`only` and `skip`: which layers of a model a recipe is for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.train import CompareConfig, TrainConfig, load, train

WEIGHTS = fb.QuantSpec("int4_sym", fb.Amax())
EVERY = fb.Recipe("every", (fb.Rule(fb.LayerSpec(w_fprop=WEIGHTS)),))
INSIDE = fb.Recipe("inside", (fb.Rule(None, where=fb.first(1) | fb.last(1)), *EVERY.rules))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def converted(recipe=EVERY, **options):
    return set(fb.quantized_layers(fb.convert(network(), recipe, **options)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": "^[12]$"}, {"1", "2"}),
        ({"skip": "^[12]$"}, {"0", "3"}),
        ({"only": "[0-2]", "skip": "0"}, {"1", "2"}),
        ({"only": lambda name, module: int(name) % 2 == 0 and module.in_features == 8}, {"0", "2"}),
        ({"skip": lambda name, module: name == "3"}, {"0", "1", "2"}),
    ],
)
def test_only_and_skip_choose_the_layers_that_are_converted(options, expected):
    assert converted(**options) == expected
    layers = fb.explain(network(), EVERY, **options).layers
    assert {layer.name for layer in layers if layer.spec is not None} == expected
    assert all("stays in full precision" in layer.note for layer in layers if layer.spec is None)


def test_first_and_last_are_those_of_the_whole_model():
    assert converted(INSIDE, skip="0") == {"1", "2"} and converted(INSIDE, only="0|1") == {"1"}


def test_the_random_words_of_a_layer_do_not_depend_on_what_is_left_out():
    drawn = fb.QuantSpec("int4_sym", fb.Amax(), rounding=fb.Rounding.STOCHASTIC)
    recipe, x = fb.Recipe("drawn", (fb.Rule(fb.LayerSpec(w_fprop=drawn)),)), torch.randn(5, 8)
    whole, part = (fb.convert(network(), recipe, seed=3, **options) for options in ({}, {"only": "2"}))
    assert torch.equal(whole[2](x), part[2](x)) and not torch.equal(whole[1](x), part[1](x))


def test_a_rule_whose_layers_are_all_left_out_is_no_error_and_parts_of_a_layer_have_names():
    recipe = fb.Recipe("two", (fb.Rule(EVERY.rules[0].spec, types=(nn.LSTM,)), *EVERY.rules))
    net = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "linear": nn.Linear(8, 8)})
    assert set(fb.quantized_layers(fb.convert(net, recipe, skip="lstm"))) == {"linear"}
    fb.restore(net)
    names = [layer.name for layer in fb.explain(net, recipe).layers if layer.name.startswith("lstm")]
    left = {a.name for a in fb.explain(net, recipe, skip=f"^{names[0]}$").layers if a.spec is None}
    assert len(names) > 1 and left == {names[0]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"only": "conv"}, r"^only 'conv' chooses no layer that can be converted: give one that matches, such as '0'"),
        ({"skip": lambda name, module: False}, "^skip <lambda> chooses no layer"),
        ({"skip": "."}, "^only and skip leave no layer to convert"),
        ({"only": "1", "skip": "1"}, "^only and skip leave no layer"),
        ({"only": "("}, r"^only is '\(', which is not a regular expression"),
        ({"skip": ""}, "^skip is '', but must be"),
        ({"skip": 3}, "^skip is 3, but must be a regular expression"),
    ],
)
def test_what_chooses_nothing_or_leaves_nothing_is_refused(options, sentence):
    for call in (fb.convert, fb.explain):
        with pytest.raises(UserError, match=sentence):
            call(network(), EVERY, **options)


def test_layers_that_the_recipe_keeps_in_full_precision_are_refused_as_the_only_ones():
    with pytest.raises(UserError, match="leave nothing that recipe 'inside' quantizes"):
        converted(INSIDE, only="0|3")
    assert converted(fb.Recipe("none", (fb.Rule(None),)), only="0") == set()


def test_explain_of_a_converted_model_that_is_told_less_says_what_was_left_out():
    net = fb.convert(network(), EVERY, skip="2")
    assert "left out by its only or skip" in next(a.note for a in fb.explain(net, EVERY).layers if a.name == "2")
    assert "chosen by skip '2'" in str(fb.explain(net, EVERY, skip="2"))


def test_a_run_keeps_its_choice_in_its_configuration_and_is_loaded_by_it(tmp_path):
    options = {"model": "digits_cnn", "data": "digits", "max_steps": 1, "progress": False, "log_to": ()} | {
        "max_test_batches": 1,
        "observe_every": 0,
    }
    net = fb.convert(fb.models.build("digits_cnn", num_classes=10, in_channels=1), "int4-fwd")
    chosen = next(iter(fb.quantized_layers(net)))
    config = TrainConfig(**options, recipe="int4-fwd", skip=f"^{chosen}$", out=tmp_path / "run")
    assert f"--skip '^{chosen}$'" in config.command()
    train(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skip"] == f"^{chosen}$"
    assert chosen not in fb.quantized_layers(load(tmp_path / "run").model)
    with pytest.raises(UserError, match="was made with skip"):
        train(TrainConfig(**options, recipe="int4-fwd", out=tmp_path / "run"), resume=True)


def test_commands_take_only_and_skip_and_refuse_what_chooses_nothing(tmp_path, capsys):
    assert (
        main(["explain", "--model", "digits_cnn", "--recipe", "int4-fwd", "--input", "1x8x8", "--skip", "nothing"]) == 2
    )
    assert "skip 'nothing' chooses no layer" in capsys.readouterr().err
    assert CompareConfig(only="conv").run("fp32", 0).only == "conv"
    flags = [
        "--model",
        "digits_cnn",
        "--data",
        "digits",
        "--recipes",
        "int4-fwd",
        "--only",
        "(",
        "--out",
        str(tmp_path),
    ]
    assert main(["compare", *flags]) == 2 and "not a regular expression" in capsys.readouterr().err
