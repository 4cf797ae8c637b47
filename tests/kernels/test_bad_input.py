"""Bad input to layers and quantizers: the right answer, with kernels and without, or one sentence that says what to do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import each_implementation, layouts
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends, formats, recipes
from fourbit.errors import UserError
from fourbit.quantizers import Amax, FixedScale, Packed, QuantSpec, Rounding, quantize

NAMES = ("ibm2020", "luq", "luq-smp2", "ibm2020-channel-gradscale", "int4-fwd", "ibm2020-global-scale", "ibm2020-dw8")
SPECS = {name: recipes.get(name).rules[-1].spec for name in NAMES} | {"FP16": recipes.get("ibm2020").rules[0].spec}
MAKES = {
    "Linear": (lambda **k: fb.nn.Linear(6, 4, **k), (5, 6)),
    "3x3": (lambda **k: fb.nn.Conv2d(6, 4, 3, padding=1, **k), (2, 6, 5, 5)),
    "1x1": (lambda **k: fb.nn.Conv2d(6, 4, 1, **k), (2, 6, 5, 5)),
    "Conv1d": (lambda **k: fb.nn.Conv1d(6, 4, 3, **k), (2, 6, 5)),
    "ConvTranspose2d": (lambda **k: fb.nn.ConvTranspose2d(6, 4, 3, **k), (2, 6, 5, 5)),
}
every_layer = pytest.mark.parametrize("case", MAKES.values(), ids=MAKES.keys())
# Every spec on a matrix and on an image, and every layer with clip values, with stochastic gradients and with scales per
# channel: the quantizers that a spec names are the same in all layers.
every_pair = pytest.mark.parametrize(
    ("case", "spec"),
    [
        pytest.param(MAKES[layer], SPECS[name], id=f"{layer}-{name}")
        for layer, name in itertools.product(MAKES, SPECS)
        if layer in ("Linear", "3x3") or name in ("ibm2020", "luq", "ibm2020-channel-gradscale")
    ],
)


@pytest.fixture(params=["kernels", "reference"])
def backend(request: pytest.FixtureRequest):
    """With the kernels of this machine, and without any."""
    if request.param == "kernels":
        yield
        return
    with backends.without():
        yield


def step(layer: nn.Module, x: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y) if g is None else g)
    assert x.grad is not None
    return y.detach(), x.grad, layer.weight.grad  # type: ignore[return-value]


def made(make, spec, **k) -> nn.Module:
    torch.manual_seed(0)
    return make(spec=spec, **k)


@each_implementation("unpack")
def test_bytes_of_codes_in_another_order_are_not_read_as_if_they_lay_in_order(implementation):
    data = torch.arange(64, dtype=torch.uint8).view(2, 32)
    codes = Packed(data.flatten(), torch.Size([128]), (1,), True)
    assert implementation(codes, torch.int8) is not None
    with pytest.raises(UserError, match="packed of a kernel must have 64 elements"):
        implementation(replace(codes, data=data.t().contiguous().t()), torch.int8)


@pytest.mark.usefixtures("backend")
@every_pair
def test_inputs_with_gaps_or_repeats_are_what_their_copies_are(case, spec):
    make, shape = case
    x = torch.randn(shape)
    views = layouts(x).values() if x.dim() == 4 else [x.repeat_interleave(3, -1)[..., ::3], x[:1].expand(shape)]
    for view in views:
        actual, expected = step(made(make, spec), view), step(made(make, spec), view.contiguous().clone())
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    y = made(make, spec)(x)
    for g in (torch.ones(()).expand(y.shape), torch.randn(*y.shape, 2)[..., 0]):
        actual, expected = step(made(make, spec), x, g), step(made(make, spec), x, g.contiguous().clone())
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("backend")
@every_pair
def test_views_that_torch_negates_when_it_reads_them_are_their_numbers(case, spec):
    """As the imaginary part of a conjugate: memory has the opposite sign."""
    make, shape = case
    x = torch.randn(shape)
    expected = step(made(make, spec), x)
    assert all(torch.equal(a, b) for a, b in zip(step(made(make, spec), torch._neg_view(-x)), expected, strict=True))
    g = torch.randn_like(expected[0])
    actual, expected = (step(made(make, spec), x, t) for t in (torch._neg_view(-g), g))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("backend")
@every_pair
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(case, spec):
    make, shape = case
    y, dx, dw = step(made(make, spec), torch.zeros(0, *shape[1:]))
    assert y.shape[0] == 0 and dx.shape == (0, *shape[1:]) and not dw.any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["ibm2020", "luq", "int4-fwd"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_inputs_or_outputs_work(name):
    assert step(fb.nn.Linear(0, 3, bias=False, spec=SPECS[name]), torch.ones(2, 0))[0].tolist() == [[0.0] * 3] * 2
    y, dx, dw = step(fb.nn.Linear(4, 0, spec=SPECS[name]), torch.ones(2, 4))
    assert y.shape == (2, 0) and not dx.any() and dw.shape == (0, 4)


@pytest.mark.usefixtures("backend")
@every_pair
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_come_out_as_such_and_are_counted(case, spec, bad):
    make, shape = case
    layer, x = made(make, spec), torch.randn(shape)
    step(layer, x)
    broken = x.clone()
    broken[(1,) * x.dim()] = bad
    assert not layer(broken).isfinite().all()
    assert fb.nonfinite_layers(nn.Sequential(layer))["0"]["x"] >= 1
    g = torch.ones_like(layer(x))
    g[(1,) * g.dim()] = bad
    _, dx, dw = step(layer, x, g)
    assert not dx.isfinite().all() and not dw.isfinite().all()
    assert fb.nonfinite_layers(nn.Sequential(layer))["0"]["g"] >= 1
    assert all(t.isfinite().all() for t in step(layer, x))  # nothing of it stays


@pytest.mark.usefixtures("backend")
@every_pair
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1e30])
def test_tiny_and_huge_numbers_give_finite_results(case, spec, size):
    make, shape = case
    layer = made(make, spec)
    for _ in range(2):
        y, dx, dw = step(layer, torch.randn(shape).sign() * size)
        assert all(t.isfinite().all() for t in (y, dx, dw))
    g = torch.randn(y.shape).sign() * min(size, 1e20)
    assert all(t.isfinite().all() for t in step(layer, torch.randn(shape), g))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_value_that_an_optimizer_ruined_crashes_nothing(alpha):
    layer = fb.nn.Linear(8, 4, spec=SPECS["ibm2020"])
    x = torch.rand(5, 8)
    step(layer, x)
    with torch.no_grad():
        layer.quant.x_alpha.fill_(alpha)
    y, dx, dw = step(layer, x)
    assert y.shape == (5, 4) and dx.shape == x.shape and dw.shape == (4, 8)
    assert y.isfinite().all() == (alpha <= 0)  # too small a clip value is held at the smallest number


@pytest.mark.usefixtures("backend")
@every_layer
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_dtypes_without_arithmetic_are_refused(case, dtype):
    make, shape = case
    for spec in SPECS.values():
        with pytest.raises(UserError, match="floating-point dtype of 16 bits or more"):
            made(make, spec)(torch.ones(shape).to(dtype))


@pytest.mark.usefixtures("backend")
@every_layer
def test_shapes_that_do_not_fit_are_refused_with_those_that_do(case):
    make, shape = case
    layer = made(make, SPECS["ibm2020"])
    axis = 1 if len(shape) > 2 else -1
    wrong = list(shape)
    wrong[axis] = 5
    for bad in ((), tuple(wrong)):
        with pytest.raises(
            UserError, match=f"{type(layer).__name__} got an input of shape .* needs 6 elements on axis"
        ):
            layer(torch.ones(bad))
    if len(shape) > 2:
        for bad in (shape[-1:], (1, 1, *shape)):
            with pytest.raises(UserError, match=r"3 or 4 axes|2 or 3 axes"):
                layer(torch.ones(bad))


@pytest.mark.usefixtures("backend")
@every_pair
def test_the_meta_device_is_refused(case, spec):
    make, shape = case
    real, empty = torch.ones(shape), torch.ones(shape, device="meta")
    for layer, x in (
        (made(make, spec), empty),
        (made(make, spec, device="meta"), real),
        (made(make, spec, device="meta"), empty),
    ):
        with pytest.raises(UserError, match="meta device"):
            layer(x)


@pytest.mark.parametrize("layout", ["to_sparse", "to_mkldnn"])
def test_sparse_and_other_layouts_are_refused(layout):
    x = getattr(torch.ones(2, 6), layout)()
    for call in (
        lambda: fb.nn.Linear(6, 4, spec=SPECS["ibm2020"])(x),
        lambda: quantize(x, QuantSpec("int4_sym", Amax())),
    ):
        with pytest.raises(UserError, match="to_dense"):
            call()


@pytest.mark.parametrize("name", formats.names())
def test_quantizers_give_shapes_on_a_device_without_kernels(name):
    """On the meta device: kernels keep off, the reference follows shapes and dtypes."""
    for spec in (QuantSpec(name, Amax()), QuantSpec(name, FixedScale(0.5), rounding=Rounding.STOCHASTIC)):
        found = quantize(torch.ones(3, 5, device="meta"), spec, key=1)
        wanted = quantize(torch.ones(3, 5), spec, key=1)
        assert found.q.is_meta and (found.q.shape, found.q.dtype) == (wanted.q.shape, wanted.q.dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", formats.names())
def test_scalars_float64_and_empty_tensors_quantize(name):
    spec = QuantSpec(name, FixedScale(0.5))
    for x in (torch.tensor(0.75), torch.zeros(0), torch.zeros(3, 0, 2), torch.tensor([0.75], dtype=torch.float64)):
        found = quantize(x, spec)
        assert found.q.shape == x.shape
        assert found.q.float().tolist() == fb.round_to_format(x.float() * 2, spec.format).tolist()


def test_an_axis_that_is_not_there_is_refused():
    spec = QuantSpec("int4_sym", Amax(), "channel")
    for axis in (2, -3):
        with pytest.raises(UserError, match="has 2 axes"):
            quantize(torch.ones(2, 3), spec, sums=axis)
