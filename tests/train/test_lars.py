"""LARS against its formula, and what it is for: the length of a gradient does not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.train import TrainConfig, train
from fourbit.train._lars import Lars


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def test_steps_are_those_of_the_formula():
    net = network().double()
    optimizer = Lars(fb.param_groups(net, weight_decay=0.1), 0.05, 0.9)
    mine = {name: (p.detach().numpy().copy(), np.zeros(p.shape)) for name, p in net.named_parameters()}
    for lr in (0.05, 0.05, 0.02):
        optimizer.zero_grad()
        net(torch.randn(7, 6, dtype=torch.float64)).pow(2).mean().backward()
        for name, p in net.named_parameters():
            (w, v), g = mine[name], p.grad.numpy()
            decay, share = 0.1, 10.0
            if w.ndim == 2:
                share = np.sqrt((w**2).sum()) / (np.sqrt((g**2).sum()) + decay * np.sqrt((w**2).sum()))
            v = 0.9 * v + lr * share * (g + decay * w)
            mine[name] = w - v, v
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        for name, p in net.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), mine[name][0], rtol=1e-12)


@pytest.mark.parametrize("factor", [2.0**-9, 1.0, 2.0**7])
def test_the_length_of_a_gradient_does_not_change_a_step(factor):
    """A power of two scales without rounding."""
    net, same = network(), network()
    x = torch.randn(4, 6)
    for model, scale in ((net, 1.0), (same, factor)):
        (model(x).pow(2).sum() * scale).backward()
        Lars([{"params": [model[0].weight, model[2].weight]}], 0.1, 0.9).step()
    assert torch.equal(net[0].weight, same[0].weight) and torch.equal(net[2].weight, same[2].weight)


def test_weights_and_gradients_of_zero_take_plain_steps():
    for w, g in ((torch.zeros(2, 2), torch.ones(2, 2)), (torch.ones(2, 2), torch.zeros(2, 2))):
        p = nn.Parameter(w.clone())
        p.grad = g
        Lars([{"params": [p]}], 0.1, 0.0).step()
        torch.testing.assert_close(p.detach(), w - 0.1 * 10.0 * g)


def test_it_learns(tmp_path):
    settings = {"model": "digits_cnn", "data": "digits", "recipe": "ibm2020", "optimizer": "lars", "batch_size": 16}
    settings |= {"threads": 1, "progress": False, "log_to": (), "observe_every": 0, "epochs": 15}
    result = train(TrainConfig(**settings, out=tmp_path / "run"))
    assert result.test_loss < 1.2  # 2.3 by guessing
