"""`explain` says which chains are fused, which are not, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit import backends

pytestmark = pytest.mark.skipif(
    not any(k.operation == "norm_apply" for k in backends.kernels()), reason="no backend has kernels for fused chains"
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.norm_b = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c, self.d = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.norm_d = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm_a(self.a(x)))
        h = self.norm_b(self.b(h)) + h
        h = nn.functional.silu(self.c(h))
        return self.head(self.norm_d(torch.cat([self.d(h)], 1)).mean((2, 3)))


def test_each_chain_is_told_with_where_it_ends():
    model = Net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = {chain.steps: chain for chain in fb.explain(model, "ibm2020", (4, 3, 8, 8)).chains}
    assert str(found["a", "norm_a", "activation"]) == "a > norm_a > activation > codes for b"
    assert str(found["b", "norm_b", "sum"]) == "b > norm_b > sum > codes for c"
    assert str(found["c",]) == "c: not fused, its result goes to silu"
    assert str(found["d",]) == "d: not fused, its result goes to cat"
    assert not found["norm_d",].fused and "no convolution in low precision stands before it" in str(found["norm_d",])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # a copy was trained


def test_the_text_has_a_line_for_each():
    model = fb.convert(Net(), "ibm2020")
    text = str(fb.explain(model, "ibm2020", (4, 3, 8, 8)))
    assert "chains computed at once in training: 2 of" in text
    assert "  a > norm_a > activation > codes for b\n" in text


def test_a_model_that_does_not_train_on_the_input_says_so():
    (chain,) = fb.explain(Net(), "ibm2020", (1, 3, 1, 1)).chains
    assert not chain.fused and "Expected more than 1 value per channel" in str(chain)


def test_without_normalization_there_are_none():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    explanation = fb.explain(net, "ibm2020", (2, 4))
    assert explanation.chains == () and "chains" not in str(explanation)
