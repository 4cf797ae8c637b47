"""`explain` says which operations of each layer run in a kernel, and why the others do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit import backends
from fourbit.cli import main

needs_kernels = pytest.mark.skipif(
    not any(kernel.operation == "round" and kernel.backend == "cpu" for kernel in backends.kernels()),
    reason="the CPU kernels are not built",
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


@needs_kernels
def test_kernels_are_told_for_each_layer_with_the_reason_why_one_declines():
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = {entry.name: entry for entry in fb.explain(model, "ibm2020", (16, 32)).kernels}
    assert list(found) == ["0", "2", "4"]
    assert "round (cpu)" in found["2"].taken
    assert any(line.startswith("gemm (cpu): ") and "does not fit int8" in line for line in found["0"].declined)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_without_kernels_the_reference_does_everything():
    with backends.without():
        assert all(
            not entry.taken and not entry.declined for entry in fb.explain(network(), "ibm2020", (16, 32)).kernels
        )


class OnlyEvaluates(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("this network is not to be trained")
        return super().forward(input)


def test_a_model_that_does_not_train_on_the_input_is_said_to():
    (entry,) = fb.explain(OnlyEvaluates(*network()), "ibm2020", (16, 32)).kernels
    assert entry.name == "" and "this network is not to be trained" in entry.declined[0]


@needs_kernels
def test_the_command_shows_them_when_asked(capsys: pytest.CaptureFixture[str]):
    for asked in (False, True):
        main(["explain", "--model", "resnet20", "--input", "3x8x8", *(["--kernels"] if asked else [])])
        out = capsys.readouterr().out
        assert ("kernels in a training step, by layer:" in out) == asked
    assert "gemm (cpu): fp16_169 does not fit int8" in " ".join(out.split())
