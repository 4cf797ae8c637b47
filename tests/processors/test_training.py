"""Training steps of every kind of layer on every instruction set, against the reference.

Small enough to run on emulated processors (test_emulated.py), where an instruction that the processor lacks ends the process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends
from fourbit.chains import watch_chains


class Residual(nn.Module):
    """Convolution, batch normalization, sum, activation: a chain."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(h)) + x).relu()


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: Any, **options: Any):
        super().__init__()
        self.before, self.rnn = nn.Linear(6, 10), kind(10, 16, **options)
        self.behind = nn.Linear(32 if options.get("bidirectional") else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.rnn(self.before(x))[0])


def chain() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    return nn.Sequential(*stem, Residual(16), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (
        lambda: nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 5)),
        (9, 12),
    ),
    "Conv2d": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 20, 3, stride=2), nn.ReLU()),
            *(nn.Conv2d(20, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4, padding=1), nn.Conv2d(16, 4, 3)),
        ),
        (2, 3, 12, 12),
    ),
    "Conv1d, Conv3d, ConvTranspose2d": (
        lambda: nn.Sequential(
            *(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Unflatten(2, (4, 5))),
            *(nn.ConvTranspose2d(8, 8, 3, stride=2), nn.Unflatten(3, (1, -1)), nn.Conv3d(8, 3, (3, 1, 3))),
        ),
        (2, 4, 24),
    ),
    "chain": (chain, (4, 3, 8, 8)),
    "LSTM": (lambda: Recurrent(nn.LSTM, bidirectional=True), (5, 4, 6)),
    "GRU": (lambda: Recurrent(nn.GRU, num_layers=2), (5, 4, 6)),
    "attention": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), nn.Linear(16, 5))
        ),
        (3, 7, 6),
    ),
}


def train(network: str, recipe: str, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of some steps, and what the first one leaves: output and gradients."""
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    model = fb.convert(make(), recipe)
    optimizer = torch.optim.SGD(fb.param_groups(model), lr=0.05, momentum=0.9)
    x = torch.randn(shape)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        loss = (y - target).square().mean()
        loss.backward()
        if not losses:
            first = {"y": y.detach().clone()}
            first |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


@lru_cache
def reference(network: str, recipe: str) -> tuple[list[float], dict[str, Tensor]]:
    with backends.without():
        return train(network, recipe)


@pytest.mark.parametrize("recipe", ["ibm2020", "luq"])
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_agree_with_the_reference(isa, network, recipe):
    """Sums are taken in another order: now and then a number falls to the other side of a decision point. What is computed
    wrongly is off by as much as it is large. (A clip value's gradient is a sum with cancellation; other tests have it.)"""
    losses, found = train(network, recipe)
    wanted_losses, wanted = reference(network, recipe)
    assert losses == pytest.approx(wanted_losses, rel=0.1) and losses[0] == pytest.approx(wanted_losses[0], rel=1e-2)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].isfinite().all()
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert name.endswith("alpha") or error < 0.25, (name, float(error))


def test_chains_are_fused_on_every_instruction_set(isa):
    if isa is None:
        pytest.skip("the CPU kernels are not built")
    links: list[str] = []
    with watch_chains(lambda link, end: links.append(link.kind)):
        fb.convert(chain(), "ibm2020")(torch.randn(2, 3, 8, 8)).sum().backward()
    assert links == ["act"] * 5
