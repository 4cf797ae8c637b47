"""A converted model under torch.compile: one graph, the same numbers, no compilation after the first step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit.ops import Contraction, Convolution, LinearMap, Matmul
from fourbit.ops._compiled import _canonical, _full

RECIPES = ["int4-fwd", "ibm2020", "ibm2020-channel-gradscale", "luq"]
RECIPES += [pytest.param(name, marks=pytest.mark.slow) for name in ("ibm2020-dw8", "luq-smp2")]


def network() -> nn.Module:
    """No batch normalization: compiled, its sums are taken in another order, and roundings fall the other way."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Conv2d(8, 16, 1),
        nn.Flatten(),
        nn.Linear(16 * 9, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


def train(run, model, steps=3) -> list[float]:
    optimizer = torch.optim.SGD(fb.param_groups(model, 1e-4), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator)
        loss = F.cross_entropy(run(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_model_is_one_graph_with_the_same_numbers(recipe):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, model = (fb.convert(network(), recipe) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert train(compiled, model) == pytest.approx(train(eager, eager), rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for (name, mine), theirs in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_two_copies_of_a_compiled_model_keep_their_own_state():
    torch._dynamo.reset()
    model = fb.convert(network(), "ibm2020")
    twin = copy.deepcopy(model)
    train(torch.compile(model, fullgraph=True, backend="aot_eager"), model)
    assert int(model[2].quant.g_exponent) != int(twin[2].quant.g_exponent)


def test_a_compiled_model_evaluates_and_works_without_gradients():
    torch._dynamo.reset()
    model = fb.convert(network(), "ibm2020")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, model, steps=2)
    x = torch.randn(4, 3, 8, 8)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_the_default_compiler_with_autocast_trains_alike():
    torch._dynamo.reset()
    eager, model = (fb.convert(network(), "ibm2020") for _ in range(2))
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert train(compiled, model, 2) == pytest.approx(train(eager, eager, 2), rel=2e-2)


@pytest.mark.parametrize(
    "contraction",
    [
        LinearMap(),
        Matmul(),
        Convolution((2,), (1,), (1,)),
        Convolution((2, 1), (0, 2), (1, 3), 4),
        Convolution((1, 2, 1), (0, 1, 0), (1, 1, 1), 1, True, (0, 1, 0)),
    ],
)
def test_contractions_survive_their_encoding(contraction):
    assert Contraction.decode(contraction.encode()) == contraction


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 1, 5), (1, 8, 1, 1)])
def test_images_lie_in_one_order_whatever_they_came_in_and_are_not_copied_if_they_do(shape):
    """Graphs know operands by their strides."""
    convolution = Convolution((1, 1), (0, 0), (1, 1))
    rows, last = torch.randn(shape), torch.randn(shape).contiguous(memory_format=torch.channels_last)
    lies = _canonical(rows, convolution)
    assert torch.equal(lies, rows)
    assert (
        lies.stride()
        == _canonical(last, convolution).stride()
        == _full(rows.new_empty(()).expand(shape), convolution).stride()
    )
    assert _canonical(lies, convolution) is lies
