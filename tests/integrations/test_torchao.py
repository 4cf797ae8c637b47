"""torchao's optimizers, whose states have 8 or 4 bits, train converted models: groups, schedules, phases, upkeep, resuming."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fourbit as fb

optim = pytest.importorskip("torchao.optim")
KINDS = ("AdamW8bit", "AdamW4bit", "AdamWFp8")


@pytest.fixture(autouse=True)
def without_compiler() -> Iterator[None]:
    """They compile their step for every shape, which takes a minute each and computes the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def network(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    return fb.convert(
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), recipe
    )


def optimizer_of(model: nn.Module, kind: str) -> Any:
    return getattr(optim, kind)(fb.param_groups(model, 0.01, alpha_weight_decay=0.1), lr=1e-2)


def train(model: nn.Module, optimizer: Any, steps: range, scheduler: Any = None, rates: Any = None) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        if scheduler is not None:
            scheduler.at(step)
        optimizer.zero_grad()
        loss = (model(x) - torch.cat((x, x.abs()), 1)).square().mean()
        loss.backward()
        optimizer.step()
        if rates is not None:
            rates.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_goes_on_to_the_bit(kind, tmp_path):
    model = network("ibm2020")
    optimizer = optimizer_of(model, kind)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    losses = train(model, optimizer, range(6), rates=rates)
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rates": rates.state_dict()}
    torch.save(parts, tmp_path / "state.pt")
    losses += train(model, optimizer, range(6, 12), rates=rates)
    assert losses[-1] < 0.8 * losses[0]
    assert [g["name"] for g in optimizer.param_groups] == ["weights", "alpha"]
    states = {n: type(optimizer.state[p]["exp_avg"]).__name__ for n, p in model.named_parameters()}
    assert states["2.weight"] == f"OptimState{kind.removeprefix('AdamW')}" and states["2.quant.x_alpha"] == "Tensor"

    again = network("ibm2020")
    other = optimizer_of(again, kind)
    later = torch.optim.lr_scheduler.CosineAnnealingLR(other, 12)
    stored = torch.load(tmp_path / "state.pt", weights_only=False)
    again.load_state_dict(stored["model"])
    other.load_state_dict(stored["optimizer"])
    later.load_state_dict(stored["rates"])
    assert train(again, other, range(6, 12), rates=later) == losses[6:]
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.slow
def test_it_trains_nearly_as_with_states_of_32_bits():
    """Not AdamWFp8: it rounds second moments to 0 where first ones are not, and divides by epsilon."""
    last, kinds = {}, KINDS[:2]
    for kind in ("AdamW", *kinds):
        model = network("nvfp4")
        groups = fb.param_groups(model, 0.01)
        optimizer = torch.optim.AdamW(groups, lr=1e-2) if kind == "AdamW" else getattr(optim, kind)(groups, lr=1e-2)
        last[kind] = sum(train(model, optimizer, range(40))[-8:]) / 8
    assert all(last[kind] < 1.1 * last["AdamW"] for kind in kinds), last


@pytest.mark.parametrize("recipe", ["nvfp4-bf16-end", "tetrajet-qramping"])
def test_phases_and_upkeep_are_carried_out(recipe):
    model = network(recipe)
    optimizer = optimizer_of(model, "AdamW8bit")
    scheduler = fb.scheduler(model, recipe, 12)
    scheduler.attach(optimizer)
    losses = train(model, optimizer, range(12), scheduler)
    assert losses[-1] < 0.9 * losses[0]


def test_weights_whose_time_has_not_come_keep_states_of_few_bits():
    """Q-Ramping takes back what a step changed, codes and scales of blocks among it."""
    model = network("tetrajet-qramping")
    optimizer = optimizer_of(model, "AdamW8bit")
    scheduler = fb.scheduler(model, "tetrajet-qramping", 100)
    scheduler.attach(optimizer)
    train(model, optimizer, range(3), scheduler)
    layer = next(
        each
        for each in fb.quantized_layers(model).values()
        if hasattr(each.quant, "ramping") and each.weight.numel() > 4096
    )
    layer.quant.ramping.period.fill_(1000)
    weight, state = layer.weight.detach().clone(), optimizer.state[layer.weight]
    before = {n: state[n].dequantize() for n in ("exp_avg", "exp_avg_sq")}
    train(model, optimizer, range(3, 4), scheduler)
    assert torch.equal(layer.weight.detach(), weight)
    assert all(torch.equal(state[name].dequantize(), t) for name, t in before.items())
