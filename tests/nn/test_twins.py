"""Subclasses of torch's layers, and layers with parametrized weights, are converted and restored as torch's own are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fourbit as fb
from fourbit.errors import UserError
from fourbit.quantizers import Amax, QuantSpec

TERNARY = fb.Recipe("w2", (fb.Rule(fb.LayerSpec(w_fprop=QuantSpec("int2_sym", Amax()))),))
"""Weights of three values: what it converts computes something else."""


class Tagged(nn.Linear):
    def __init__(self, inputs: int, outputs: int, tag: str):
        super().__init__(inputs, outputs)
        self.tag = tag

    def doubled(self) -> torch.Tensor:
        return 2 * self.weight

    def extra_repr(self) -> str:
        return f"tag={self.tag}, {super().extra_repr()}"


class Deeper(Tagged):
    pass


class WithLastState(nn.LSTM):
    pass


class Heads(nn.MultiheadAttention):
    pass


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.norm(), bias)


class Crowded(nn.Linear):
    def attach(self) -> None: ...


@pytest.mark.parametrize("cls", [Tagged, Deeper])
def test_a_subclass_without_a_forward_of_its_own_is_converted_and_keeps_what_it_has(cls):
    plain, ours = nn.Linear(8, 4), cls(8, 4, "a")
    ours.load_state_dict(plain.state_dict())
    fb.convert(plain, TERNARY)
    fb.convert(ours, TERNARY)
    x = torch.randn(3, 8)
    assert isinstance(ours, cls) and isinstance(ours, fb.nn.Linear) and type(ours).__name__ == cls.__name__
    assert torch.equal(plain(x), ours(x)) and torch.equal(ours.doubled(), 2 * ours.weight)
    assert "tag=a" in repr(ours) and "int2_sym" in repr(ours)
    fb.restore(ours)
    assert type(ours) is cls
    assert torch.equal(ours(x), nn.functional.linear(x, ours.weight, ours.bias))


def test_a_converted_subclass_is_copied_and_pickled_as_what_it_is():
    layer, x = fb.convert(Tagged(8, 4, "a"), TERNARY), torch.randn(3, 8)
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and twin.tag == "a" and torch.equal(twin(x), layer(x))
    assert type(fb.restore(pickle.loads(pickle.dumps(layer)))) is Tagged


@pytest.mark.parametrize(
    ("layer", "x"),
    [(WithLastState(8, 4, 2), (torch.randn(5, 2, 8),)), (Heads(8, 2), (torch.randn(5, 2, 8),) * 3)],
    ids=["LSTM", "attention"],
)
def test_subclasses_of_layers_of_several_products_are_converted(layer, x):
    cls, before = type(layer), layer(*x)[0]
    fb.convert(layer, TERNARY)
    assert isinstance(layer, cls) and not torch.allclose(layer(*x)[0], before, atol=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(*x)[0], layer(*x)[0])
    fb.restore(layer)
    assert type(layer) is cls and torch.allclose(layer(*x)[0], before)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OwnForward(4, 4), "OwnForward has a forward of its own"),
        (OwnConvolution(4, 4, 1), "OwnConvolution has a _conv_forward of its own"),
        (Crowded(4, 4), "Crowded has an attribute 'attach'"),
        (nn.RNN(4, 4), "RNN cannot be converted"),
    ],
)
def test_what_cannot_be_converted_is_told_with_the_reason_and_left_as_it_is(layer, reason):
    cls = type(layer)
    net = nn.Sequential(nn.Linear(4, 4), layer)
    note = next(found.note for found in fb.explain(net, TERNARY).layers if found.name == "1")
    assert note.startswith(reason) and note.endswith("stays in full precision")
    fb.convert(net, TERNARY)
    assert type(layer) is cls
    with pytest.raises(UserError, match=f"nothing to convert: of the layers of Sequential, {reason}"):
        fb.convert(nn.Sequential(layer), TERNARY)


def test_a_layer_whose_forward_was_replaced_is_not_converted():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = net[1].forward
    net[1].forward = lambda x: before(x) + 1
    fb.convert(net, TERNARY)
    assert type(net[0]) is fb.nn.Linear and type(net[1]) is nn.Linear


def test_a_subclass_of_attention_with_its_own_forward_keeps_its_projections_in_full_precision():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return super().forward(query, key, value, need_weights=False)

    net = nn.ModuleList([nn.Linear(8, 8), Own(8, 2)])
    x = torch.randn(5, 2, 8)
    before = net[1](x, x, x)[0]
    fb.convert(net, TERNARY)
    assert torch.equal(net[1](x, x, x)[0], before) and set(fb.quantized_layers(net)) == {"0"}


def test_rules_for_a_class_are_rules_for_its_subclasses():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Tagged(4, 4, "a"))
    spec = TERNARY.rules[0].spec
    fb.convert(net, fb.Recipe("linear", (fb.Rule(spec, types=(nn.Linear,)),)))
    assert set(fb.quantized_layers(net)) == {"1"}


def test_layers_without_a_shape_are_refused():
    with pytest.raises(UserError, match=r"1\.weight has no shape yet"):
        fb.convert(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), TERNARY)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("first", ["parametrized", "converted"])
@pytest.mark.parametrize("way", list(PARAMETRIZATIONS))
def test_the_parametrized_weight_is_what_is_quantized_in_either_order(way, first):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 6, 6)
    steps = [lambda: PARAMETRIZATIONS[way](layer), lambda: fb.convert(layer, TERNARY)]
    for step in steps if first == "parametrized" else reversed(steps):
        step()
    layer.eval()
    assert isinstance(layer, fb.nn.Conv2d)
    by_hand = nn.Conv2d(4, 4, 3)
    by_hand.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    y = layer(x)
    assert torch.allclose(y, fb.convert(by_hand, TERNARY)(x), atol=1e-6)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parametrizations.parameters())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):  # as torch has it
        pickle.dumps(layer)
    fb.restore(layer)
    assert not isinstance(layer, fb.nn.QuantizedLayer) and parametrize.is_parametrized(layer)
    assert torch.allclose(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias), atol=1e-6)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Conv2d


def test_restore_gives_back_the_very_class_that_was_parametrized():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    before = type(layer)
    assert type(fb.restore(fb.convert(layer, TERNARY))) is before


def test_parametrizations_come_and_go_on_a_converted_layer():
    layer, x = parametrizations.weight_norm(Tagged(4, 4, "a")), torch.randn(2, 4)
    fb.convert(layer, TERNARY)
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer, fb.nn.Linear) and isinstance(layer, Tagged) and isinstance(layer.weight, nn.Parameter)
    layer(x).sum().backward()
    fb.restore(layer)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is Tagged


def test_a_parametrized_layer_that_is_freed_while_converted_is_an_ordinary_one():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    fb.convert(layer, TERNARY)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is fb.nn.Linear
    assert type(fb.restore(layer)) is nn.Linear


@pytest.mark.parametrize("first", ["changed", "converted"])
@pytest.mark.parametrize("way", [nn.utils.weight_norm, nn.utils.spectral_norm, prune.l1_unstructured])
def test_weights_that_a_hook_makes_are_what_is_quantized(way, first):
    """The older functions of torch: the weight is an attribute that a hook sets before each forward."""
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    options = {"name": "weight", "amount": 0.5} if way is prune.l1_unstructured else {}
    steps = [lambda: way(layer, **options), lambda: fb.convert(layer, TERNARY)]
    for step in steps if first == "changed" else reversed(steps):
        step()
    y = layer.eval()(x)
    by_hand = nn.Linear(8, 4)
    by_hand.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    assert torch.allclose(y, fb.convert(by_hand, TERNARY)(x), atol=1e-6)
    y.square().sum().backward()
    assert any(name.startswith("weight") and p.grad.any() for name, p in layer.named_parameters())
    assert type(fb.restore(layer)) is nn.Linear
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
