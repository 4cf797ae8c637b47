"""Whole layers, every kind, under every layer spec of the recipes: outputs, gradients and state with kernels and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import needs_library, threads
from torch import Tensor

import fourbit as fb
from fourbit import backends, recipes
from fourbit.ops import SLOTS, LayerSpec
from fourbit.recipes.catalog import variants

pytestmark = needs_library

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda **k: fb.nn.Linear(24, 17, **k), (9, 24)),
    "Linear, three axes, one output": (lambda **k: fb.nn.Linear(7, 1, bias=False, **k), (2, 3, 7)),
    "Linear, a vector": (lambda **k: fb.nn.Linear(7, 4, **k), (7,)),
    "Conv1d": (lambda **k: fb.nn.Conv1d(3, 4, 3, padding=1, **k), (2, 3, 8)),
    "Conv2d": (lambda **k: fb.nn.Conv2d(16, 16, 3, padding=1, bias=False, **k), (2, 16, 8, 8)),
    "Conv2d, strided, odd channels": (lambda **k: fb.nn.Conv2d(3, 5, 3, stride=2, padding=1, **k), (1, 3, 7, 7)),
    "Conv2d, 1x1": (lambda **k: fb.nn.Conv2d(17, 8, 1, bias=False, **k), (2, 17, 5, 5)),
    "Conv2d, 1x1, one channel": (lambda **k: fb.nn.Conv2d(1, 1, 1, **k), (2, 1, 5, 3)),
    "Conv2d, 1x1, strided": (lambda **k: fb.nn.Conv2d(4, 8, 1, stride=2, **k), (2, 4, 7, 7)),
    "Conv2d, unbatched": (lambda **k: fb.nn.Conv2d(3, 4, 3, **k), (3, 7, 7)),
    "Conv2d, dilated": (lambda **k: fb.nn.Conv2d(3, 4, 3, dilation=2, **k), (2, 3, 7, 7)),
    "Conv2d, grouped": (lambda **k: fb.nn.Conv2d(4, 6, 3, groups=2, **k), (2, 4, 7, 7)),
    "Conv2d, depthwise": (lambda **k: fb.nn.Conv2d(4, 8, 3, groups=4, padding=1, **k), (2, 4, 7, 7)),
    "Conv2d, reflect": (lambda **k: fb.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", **k), (2, 3, 7, 7)),
    "Conv3d": (lambda **k: fb.nn.Conv3d(2, 3, 3, padding=1, **k), (2, 2, 4, 5, 4)),
    "ConvTranspose1d": (lambda **k: fb.nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1, **k), (2, 3, 5)),
    "ConvTranspose2d": (lambda **k: fb.nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, **k), (2, 3, 5, 5)),
    "ConvTranspose3d": (lambda **k: fb.nn.ConvTranspose3d(2, 3, 2, **k), (2, 2, 3, 3, 3)),
}
QUICK = ("Linear", "Linear, three axes, one output", "Conv2d", "Conv2d, strided, odd channels", "Conv2d, 1x1")
FEW = [
    recipes.get(name).rules[-1].spec for name in ("int4-fwd", "ibm2020", "ibm2020-channel-gradscale", "luq", "fourbit")
]
"""Fast products of all pairs of formats are in test_kernel_products.py, and quantizers are the same for exact ones."""
SPECS = [
    spec
    for spec in dict.fromkeys(
        r.spec for name in recipes.names() if name not in variants.NAMES for r in recipes.get(name).rules
    )
    if spec is not None
    and not any(map(spec.transform, SLOTS))  # rotations want features of their size: test_round_tiles.py
]


def train(make, spec: LayerSpec, products: str, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that three training steps leave behind."""
    torch.manual_seed(0)
    layer = make(spec=spec, products=products).to(dtype)
    found: dict[str, Tensor] = {}
    for i in range(3):  # the third knows its scales beforehand
        layer.zero_grad()
        x = x.to(dtype).detach().requires_grad_()
        y = layer(x)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(i)) * 2.0 ** (-3 * i)
        y.backward(g.to(y.dtype))
        found |= {f"y{i}": y.detach(), f"dx{i}": x.grad}
        found |= {f"d {name} {i}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found | {f"state {name}": t for name, t in layer.quant.named_buffers()}


def _marked() -> list[Any]:
    """Where products have no kernel of their own the quantizers alone are compared: those are slow tests."""
    marks = {name: [] if name in QUICK else [pytest.mark.slow] for name in LAYERS}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in LAYERS.items()]


@pytest.mark.parametrize("case", _marked())
@pytest.mark.parametrize("products", ["exact", "fast"])
def test_layers_with_kernels_equal_layers_without(case, products):
    for i, spec in enumerate(SPECS if products == "exact" else FEW):
        check(case, products, spec, i % 2 == 1, torch.float32)
    for name in ("ibm2020", "luq"):
        check(case, products, recipes.get(name).rules[-1].spec, True, torch.bfloat16)


@pytest.mark.parametrize("case", [pytest.param(LAYERS[name], id=name) for name in QUICK])
@pytest.mark.parametrize("products", ["exact", "fast"])
def test_layers_with_the_kernels_of_every_instruction_set_equal_layers_without(isa, case, products):
    for i, name in enumerate(("ibm2020", "ibm2020-dw8", "luq")):
        check(case, products, recipes.get(name).rules[-1].spec, i == 2, torch.float32)


def check(case, products: str, spec: LayerSpec | None, signed: bool, dtype: torch.dtype) -> None:
    """Everything that three steps leave, with kernels and without."""
    make, shape = case
    assert spec is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    arguments = (make, spec, products, x if signed else x.relu(), dtype)
    with threads(2):
        actual = train(*arguments)
    with backends.without():
        expected = train(*arguments)
    # a sum in another order may land on the other side of a decision point of the output format
    relative = 2.0**-7 if dtype == torch.bfloat16 or products == "fast" else 2.0**-9 if spec.output else 1e-6
    for name, wanted in expected.items():
        got = actual[name]
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        if name.startswith("state"):
            assert torch.equal(got, wanted), (name, spec)
            continue
        error, largest = (got - wanted).abs().double(), float(wanted.abs().max())
        if name.startswith("d quant"):  # a sum over dx, with cancellation
            largest = float(expected[f"dx{name[-1]}"].abs().sum()) + largest
            assert float(error) <= relative * largest, (name, spec)
        else:  # padding other than zero folds several results into one
            slack = relative if getattr(make(), "padding_mode", "zeros") != "zeros" else 1e-5
            close = error <= relative * wanted.abs() + slack * largest
            assert close.all(), (name, spec, got[~close][:3], wanted[~close][:3])


@pytest.mark.parametrize(
    "case", [LAYERS["Linear"], LAYERS["Conv2d"], LAYERS["Conv2d, 1x1"]], ids=["Linear", "3x3", "1x1"]
)
def test_exact_products_of_four_bit_layers_are_the_same_to_the_bit(case):
    """All sums fit float32, so the reference is exact too."""
    make, shape = case
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu()
    spec = recipes.get("ibm2020").rules[-1].spec
    assert spec is not None
    actual = train(make, spec, "exact", x, torch.float32)
    with backends.without():
        expected = train(make, spec, "exact", x, torch.float32)
    for name, wanted in expected.items():
        if not name.startswith("d quant"):
            assert torch.equal(actual[name], wanted), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_order_of_axes_of_the_input_does_not_matter(memory_format):
    spec = recipes.get("ibm2020").rules[-1].spec
    x = torch.randn(2, 16, 6, 6).relu()
    make = LAYERS["Conv2d"][0]
    expected = train(make, spec, "fast", x, torch.float32)
    for view in (x.contiguous(memory_format=memory_format), x.repeat_interleave(2, 3)[..., ::2]):
        actual = train(make, spec, "fast", view, torch.float32)
        assert all(torch.equal(actual[name], wanted) for name, wanted in expected.items())
