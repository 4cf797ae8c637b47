"""The way from a layer to the rounding of its operands is short, and kernels are asked once."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit import backends
from fourbit.ops import GEMM, PRODUCT

HOME = Path(fb.__file__).parent


def trained_layer() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    fb.convert(model, "ibm2020")
    for _ in range(2):
        model(torch.randn(32, 64)).sum().backward()
    return model[1]


def files_on_the_way(layer: nn.Module, x: torch.Tensor, rounding: str) -> list[str]:
    """The files of this package that are on the stack when a function of that name is first called."""
    found: list[str] = []

    def look(frame: FrameType | None, event: str, arg: object) -> None:
        if found or event != "call" or frame is None or frame.f_code.co_name != rounding:
            return
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(HOME):
                found.append(str(path.relative_to(HOME)))
            frame = frame.f_back

    sys.setprofile(look)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return list(dict.fromkeys(reversed(found)))


@pytest.mark.parametrize("kernels", [True, False])
def test_six_files_lie_between_a_linear_layer_and_the_rounding(kernels: bool):
    if kernels and not any(kernel.operation == "round" and kernel.backend == "cpu" for kernel in backends.kernels()):
        pytest.skip("the CPU kernels are not built")
    layer, x = trained_layer(), torch.randn(32, 64)
    if kernels:
        files = files_on_the_way(layer, x, "_clip")
        assert files[-1] == "kernels/cpu/_quantize.py"
    else:
        with backends.without():
            files = files_on_the_way(layer, x, "nearest_number")
        assert files[-1] == "quantizers/_round.py"
    assert files[0] == "nn/_layers.py" and len(files) <= 6, files


def asked(layer: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many products kernels are asked about in one step."""
    count = 0
    for operation in (GEMM, PRODUCT):
        before = type(operation).taken

        def taken(*args: object, before=before, operation=operation) -> object:
            nonlocal count
            count += 1
            return before(operation, *args)

        monkeypatch.setattr(operation, "taken", taken)
    layer(x).sum().backward()
    monkeypatch.undo()
    return count


def test_kernels_are_asked_about_a_product_once_for_each_shape_and_dtype(monkeypatch: pytest.MonkeyPatch):
    layer, x = trained_layer(), torch.randn(32, 64, requires_grad=True)
    asked(layer, x, monkeypatch)
    assert asked(layer, x, monkeypatch) == 0
    assert asked(layer, torch.randn(16, 64, requires_grad=True), monkeypatch) > 0
    assert asked(layer, torch.randn(16, 64, requires_grad=True), monkeypatch) == 0
    assert asked(layer, torch.randn(16, 64, requires_grad=True).double(), monkeypatch) == 0  # it is the reference's


@pytest.mark.parametrize("how", ["switched", "respec", "deepcopy", "pickle"])
def test_kernels_are_asked_again_where_they_may_answer_otherwise(how: str, monkeypatch: pytest.MonkeyPatch):
    layer, x = trained_layer(), torch.randn(32, 64)
    asked(layer, x, monkeypatch)
    assert asked(layer, x, monkeypatch) == 0
    if how == "switched":
        with backends.without():
            without = asked(layer, x, monkeypatch)
        assert without > 0
    elif how == "respec":
        spec = layer.spec
        layer.quant.respec(fb.LayerSpec(w_fprop=spec.w_fprop))
        layer(x)
        layer.quant.respec(spec)
    else:
        layer = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert asked(layer, x, monkeypatch) > 0


def test_switching_kernels_changes_no_number():
    layer, x = trained_layer().eval(), torch.randn(32, 64)
    y = layer(x)
    with backends.without():
        assert torch.equal(layer(x), y)
    assert torch.equal(layer(x), y)
