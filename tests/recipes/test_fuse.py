"""Fused chains of convolution, batch normalization, residual, activation and quantization, against the modules one by one."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit import backends, models
from fourbit.nn import conv_norm_act, run_layer
from fourbit.ops import OperandHandover
from fourbit.recipes import catalog

pytestmark = pytest.mark.skipif(
    not any(k.operation == "norm_forward" for k in backends.kernels()), reason="no backend has kernels for fused chains"
)

SPECS = {
    "ibm2020": catalog.TPR,
    "one phase": catalog.IBM2020_NO_TPR.rules[-1].spec,
    "dw8": catalog.IBM2020_DW8.rules[-1].spec,
    "int4-fwd": catalog.INT4_FORWARD,
    "luq": catalog.LUQ.rules[-1].spec,
    "bfloat16 results": replace(catalog.TPR, output=fb.formats.BFLOAT16),
    "fp16": catalog.FP16,
}
CAPS = {"no activation": None, "relu": float("inf"), "relu6": 6.0}


def pair(spec, channels: int) -> nn.ModuleList:
    torch.manual_seed(1)
    before = fb.nn.Conv2d(8, channels, 3, padding=1, bias=False, spec=spec, index=1)
    behind = fb.nn.Conv2d(channels, 8, 3, padding=1, stride=2, bias=False, spec=spec, index=2)
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    return nn.ModuleList([before, norm, behind])


def plainly(layers, x, cap, residual):
    before, norm, behind = layers
    z = norm(before(x))
    z = z if residual is None else z + residual
    out = z if cap is None else F.relu(z) if cap == float("inf") else F.relu6(z)
    return out, behind(out)


def fused(layers, x, cap, residual, want_out=True):
    before, norm, behind = layers
    out, operand = conv_norm_act(before, norm, x, cap, residual, behind, want_out)
    return out, run_layer(behind, operand)


def results(run, spec, channels, cap, with_residual, steps=3) -> dict[str, torch.Tensor]:
    """Everything that a few steps leave, of a chain whose middle result is used twice."""
    layers = pair(spec, channels)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 9, 7, generator=generator).relu().requires_grad_()
    residual = (torch.randn(4, channels, 9, 7, generator=generator) * 0.3).requires_grad_() if with_residual else None
    found: dict[str, torch.Tensor] = {}
    for _ in range(steps):
        for t in (*layers.parameters(), x, residual):
            if t is not None:
                t.grad = None
        out, y = run(layers, x, cap, residual)
        gy, go = torch.randn(y.shape, generator=generator), torch.randn(out.shape, generator=generator)
        ((y * gy).sum() + (out * go).sum() * 0.1).backward()
        found = {"y": y.detach(), "out": out.detach(), "dx": x.grad}
        found |= {f"grad of {n}": p.grad for n, p in layers.named_parameters() if p.grad is not None}
        found |= {f"buffer {n}": b.clone() for n, b in layers.named_buffers()}
        if residual is not None:
            found["grad of residual"] = residual.grad
    return found


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("channels", [3, 16, 20, 64, 130])
def test_a_fused_chain_equals_its_modules(channels, cap, with_residual):
    expected = results(plainly, catalog.TPR, channels, cap, with_residual)
    found = results(fused, catalog.TPR, channels, cap, with_residual)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, name)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_fused_chain_equals_its_modules_whatever_the_spec(spec):
    expected, found = (results(run, spec, 16, float("inf"), True) for run in (plainly, fused))
    for name, value in expected.items():
        close(found[name], value, name)


def close(found, expected, name):
    """Sums are taken in another order: now and then a number falls to the other side of a decision point."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error < 1e-2, (name, float(error))
    scale = expected.double().abs().max().clamp_min(1e-30)
    apart = ((found.double() - expected.double()).abs() > 1e-5 * scale).double().mean()
    assert apart < 0.05, (name, float(apart))  # one code enters up to 72 of 640 results


def test_the_operand_is_handed_over_without_a_float_tensor():
    layers = pair(catalog.TPR, 16)
    x = torch.randn(4, 8, 9, 7).relu()
    fused(layers, x, float("inf"), None)[1].sum().backward()  # the first batch decides PACT's form
    out, operand = conv_norm_act(layers[0], layers[1], x, float("inf"), None, layers[2], False)
    assert out is None
    assert isinstance(operand, OperandHandover)


@pytest.mark.parametrize("watch", ["forward hook", "evaluation", "autocast", "no kernels"])
def test_what_watches_a_chain_takes_it_apart(watch):
    layers = pair(catalog.TPR, 16)
    x = torch.randn(4, 8, 9, 7).relu()
    fused(layers, x, float("inf"), None)[1].sum().backward()
    seen = []
    if watch == "forward hook":
        layers[2].register_forward_hook(lambda module, inputs, y: seen.append(inputs[0].shape))
    if watch == "evaluation":
        layers.eval()
    with (
        fb.observe(layers) as stats,
        torch.autocast("cpu", torch.bfloat16, enabled=watch == "autocast"),
        backends.without(*([] if watch == "no kernels" else ["cpu"])) if watch == "no kernels" else torch.enable_grad(),
    ):
        out, y = fused(layers, x, float("inf"), None, want_out=False)
        y.float().sum().backward()
    assert isinstance(out, torch.Tensor)
    assert set(stats["2"]) >= {"x_fprop", "w_fprop", "g_dgrad", "g_wgrad"}
    assert watch != "forward hook" or seen == [(4, 16, 9, 7)]


def test_an_observed_chain_computes_the_same_numbers_and_shows_every_operand():
    losses, grads = [], []
    for watch in (False, True):
        layers = pair(catalog.TPR, 16)
        x = torch.randn(4, 8, 9, 7, generator=torch.Generator().manual_seed(3)).relu()
        fused(layers, x, float("inf"), None)[1].sum().backward()
        layers.zero_grad()
        with fb.observe(layers) if watch else contextlib.nullcontext({}) as stats:
            out, y = fused(layers, x, float("inf"), None, want_out=False)
            y.square().sum().backward()
        assert out is None
        losses.append(y.detach())
        grads.append({name: p.grad for name, p in layers.named_parameters()})
        if watch:
            for name in ("0", "2"):
                assert set(stats[name]) == {"x_fprop", "w_fprop", "g_dgrad", "g_wgrad"}
            assert 0 < stats["2"]["x_fprop"].sqnr_db < 60
            assert 0 < stats["0"]["g_wgrad"].sqnr_db < 60
    assert torch.equal(*losses)
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.fc = nn.Linear(8, 4)
        self.doubled = False

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)))
        y = F.relu(self.norms[1](self.convs[0](x)))
        x = F.relu(self.norms[2](self.convs[1](y)) + x)
        return self.fc(x.mean((2, 3))) * (2 if self.doubled else 1)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x) if x.sum() > -1e9 else x


def step(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    loss = F.cross_entropy(
        model(torch.randn(8, 3, 6, 6, generator=generator)), torch.randint(0, 4, (8,), generator=generator)
    )
    loss.backward()
    return float(loss)


def converted(cls=Block, fuse=True):
    torch.manual_seed(0)
    return fb.convert(cls(), "ibm2020", fuse=fuse)


def chains(model) -> int:
    """Calls of a fused chain in one training step."""
    count = 0
    original = fb.nn._fused.normalize

    def counting(*args):
        nonlocal count
        count += 1
        return original(*args)

    fb.nn._fused.normalize = counting
    try:
        step(model)
    finally:
        fb.nn._fused.normalize = original
    return count


@pytest.mark.parametrize("cls", [Block, Untraceable])
def test_convert_finds_the_chains_and_the_loss_stays(cls):
    model, plain = converted(cls), converted(cls, fuse=False)
    assert (chains(model), chains(plain)) == (3, 0)
    plain, model = converted(cls, fuse=False), converted(cls)
    for seed in range(3):
        assert step(model, seed) == pytest.approx(step(plain, seed), rel=2e-3)
    assert isinstance(model, cls)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_restore_gives_the_class_back():
    model = fb.restore(converted())
    assert type(model) is Block
    assert type(model.convs[0]) is nn.Conv2d
    assert chains(model) == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_independent(how):
    model = converted()
    step(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert step(twin, 1) == step(model, 1)
    assert chains(twin) == 3
    with torch.no_grad():
        twin.fc.weight.zero_()
    assert model.fc.weight.abs().max() > 0


def test_a_changed_setting_is_noticed():
    model = converted()
    step(model)
    x = torch.randn(8, 3, 6, 6)
    once = model(x)
    model.doubled = True
    torch.testing.assert_close(model(x), 2 * once, rtol=1e-2, atol=1e-2)


def test_a_second_backward_pass_through_a_kept_graph_gives_the_same():
    model = converted()
    step(model)
    loss = model(torch.randn(8, 3, 6, 6)).square().sum()
    grads = [torch.autograd.grad(loss, model.stem.weight, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(grads[0], grads[1])


def test_nothing_of_a_graph_outlives_it():
    """Tensors of a node must not lead back to the node: cycles through autograd are never collected."""
    model = converted()
    x = torch.randn(8, 3, 6, 6)
    counts = []
    for _ in range(4):
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
        model(x)  # without backward
    assert len(set(counts[1:])) == 1, counts


def test_a_chain_keeps_no_float_copy_of_its_input():
    model = converted()
    step(model)
    stored: dict[int, int] = {}

    def pack(t):
        stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(8, 3, 6, 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    elements = 8 * 8 * 6 * 6
    # Per chain: 16 bits of the normalization's input, 4-bit codes and mask; the stem's FP16 input, weights, and the mean.
    assert sum(stored.values()) < 3 * elements * 3.5 + 8 * 3 * 36 * 4 + 16_000


def test_evaluation_and_no_grad_work():
    model = converted()
    step(model)
    with torch.no_grad():
        assert not model(torch.randn(8, 3, 6, 6)).requires_grad


def test_nan_reaches_the_loss_and_is_counted():
    model = converted()
    step(model)
    loss = model(torch.full((8, 3, 6, 6), float("nan"))).sum()
    assert loss.isnan()
    loss.backward()
    assert "stem" in fb.nonfinite_layers(model)
    assert "convs.0" in fb.nonfinite_layers(model)
    assert int(model.convs[0].quant.g_exponent) != 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet20", 19), ("resnet18", 20), ("resnet50", 53), ("vgg16", 13), ("mobilenet_v2", 57), ("digits_cnn", 5)],
)
def test_every_normalization_of_the_shipped_networks_is_in_a_chain(name, expected):
    grey = name == "digits_cnn"
    model = fb.convert(models.build(name, num_classes=10, in_channels=1 if grey else 3), "ibm2020")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    shape = (2, 1, 8, 8) if grey else (2, 3, 32, 32)
    count = 0
    original = fb.nn._fused.normalize

    def counting(*args):
        nonlocal count
        count += 1
        return original(*args)

    fb.nn._fused.normalize = counting
    try:
        model(torch.randn(shape))
    finally:
        fb.nn._fused.normalize = original
    assert (norms, count) == (expected, expected)


@pytest.mark.parametrize("recipe", ["ibm2020", "int4-fwd", "luq"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_what_the_forward_pass_did_from_the_first_step_on(recipe, reentrant):
    def train(checkpointed: bool):
        model = fb.convert(models.build("resnet20", num_classes=10), recipe)
        generator = torch.Generator().manual_seed(0)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.track_running_stats = False  # recomputation would count the batch twice, as it does in any network
        found = []
        for _ in range(3):
            x = torch.randn(4, 3, 16, 16, generator=generator).requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            model.zero_grad()
            y.square().mean().backward()
            found += [y.detach(), x.grad, *(p.grad for p in model.parameters())]
        return found, model.state_dict()

    torch.manual_seed(0)
    plain, state = train(False)
    torch.manual_seed(0)
    recomputed, state2 = train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert all(torch.equal(state[k], state2[k]) for k in state)
