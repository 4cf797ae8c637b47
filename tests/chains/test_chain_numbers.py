"""Fused chains of convolution, batch normalization, residual, activation and quantization, against the modules one by one."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit import backends, models
from fourbit.chains import watch_chains
from fourbit.ops import LayerState
from fourbit.recipes import catalog

pytestmark = pytest.mark.skipif(
    not any(k.operation == "norm_apply" for k in backends.kernels()), reason="no backend has kernels for fused chains"
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


def run(layers, x, cap, residual):
    before, norm, behind = layers
    z = norm(before(x))
    z = z if residual is None else z + residual
    out = z if cap is None else F.relu(z) if cap == float("inf") else F.relu6(z)
    return out, behind(out)


def results(fuse, spec, channels, cap, with_residual, held, steps=3) -> dict[str, torch.Tensor]:
    """Everything that a few steps leave, of a chain whose middle result is used twice; `held`: and known until backward."""
    layers = pair(spec, channels)
    for layer in fb.quantized_layers(layers).values():
        layer.quant.fuse = fuse
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
        found = {"y": y.detach(), "out": out.detach()}
        loss = (y * gy).sum() + (out * go).sum() * 0.1
        if not held:
            del out
        loss.backward()
        found["dx"] = x.grad
        found |= {f"grad of {n}": p.grad for n, p in layers.named_parameters() if p.grad is not None}
        found |= {f"buffer {n}": b.clone() for n, b in layers.named_buffers()}
        if residual is not None:
            found["grad of residual"] = residual.grad
    return found


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("channels", [3, 20, 64])
def test_a_fused_chain_equals_its_modules(channels, cap, with_residual, held):
    expected, found = (results(fuse, catalog.TPR, channels, cap, with_residual, held) for fuse in (False, True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, name)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_fused_chain_equals_its_modules_whatever_the_spec(spec):
    expected, found = (results(fuse, spec, 16, float("inf"), True, False) for fuse in (False, True))
    for name, value in expected.items():
        close(found[name], value, name)


def close(found, expected, name):
    """Sums are taken in another order: now and then a number falls to the other side of a decision point."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error < 1e-2, (name, float(error))
    scale = expected.double().abs().max().clamp_min(1e-30)
    apart = ((found.double() - expected.double()).abs() > 1e-5 * scale).double().mean()
    assert apart < 0.05, (name, float(apart))  # one code enters up to 72 of 640 results


def ends(model, *inputs) -> list[object]:
    """What the chains of one forward pass end at: the state of a layer that takes codes, or the name of an operation."""
    found: list[object] = []
    with watch_chains(lambda link, end: found.append(end) if link.kind != "product" else None):
        model(*inputs)
    return found


def test_the_operand_is_handed_over_as_codes():
    layers = pair(catalog.TPR, 16)
    net, x = nn.Sequential(*layers[:2], nn.ReLU(), layers[2]), torch.randn(4, 8, 9, 7).relu()
    assert ends(net, x) == ["a layer that quantizes it itself"]  # the first batch decides PACT's form
    net(x).sum().backward()
    assert ends(net, x) == [layers[2].quant]


@pytest.mark.parametrize("watch", ["evaluation", "autocast", "no kernels"])
def test_without_a_chain_the_layers_see_the_same_operands(watch):
    layers = pair(catalog.TPR, 16)
    net, x = nn.Sequential(*layers[:2], nn.ReLU(), layers[2]), torch.randn(4, 8, 9, 7).relu()
    net(x).sum().backward()
    if watch == "evaluation":
        net.eval()
    with (
        fb.observe(net) as stats,
        torch.autocast("cpu", torch.bfloat16, enabled=watch == "autocast"),
        backends.without() if watch == "no kernels" else contextlib.nullcontext(),
    ):
        assert ends(net, x) == []
        net(x).float().sum().backward()
    assert set(stats["3"]) >= {"x_fprop", "w_fprop", "g_dgrad", "g_wgrad"}


def test_an_observed_chain_computes_the_same_numbers_and_shows_every_operand():
    losses, grads = [], []
    for watch in (False, True):
        layers = pair(catalog.TPR, 16)
        x = torch.randn(4, 8, 9, 7, generator=torch.Generator().manual_seed(3)).relu()
        run(layers, x, float("inf"), None)[1].sum().backward()
        layers.zero_grad()
        with fb.observe(layers) if watch else contextlib.nullcontext({}) as stats:
            y = run(layers, x, float("inf"), None)[1]
            y.square().sum().backward()
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

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)))
        y = F.relu(self.norms[1](self.convs[0](x)))
        x = F.relu(self.norms[2](self.convs[1](y)) + x)
        return self.fc(x.mean((2, 3)))


def step(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    loss = F.cross_entropy(
        model(torch.randn(8, 3, 6, 6, generator=generator)), torch.randint(0, 4, (8,), generator=generator)
    )
    loss.backward()
    return float(loss)


def converted(fuse=True):
    torch.manual_seed(0)
    return fb.convert(Block(), "ibm2020", fuse=fuse)


def test_the_loss_stays():
    plain, model = converted(fuse=False), converted()
    assert len(ends(model, torch.randn(8, 3, 6, 6))) == 3 and not ends(plain, torch.randn(8, 3, 6, 6))
    plain, model = converted(fuse=False), converted()
    for seed in range(3):
        assert step(model, seed) == pytest.approx(step(plain, seed), rel=2e-3)
    assert list(model.state_dict()) == list(plain.state_dict())


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
    ("name", "taken", "others"),
    [
        ("resnet20", 18, 1),
        ("resnet18", 16, 4),
        ("resnet50", 48, 5),
        ("vgg16", 8, 5),
        ("mobilenet_v2", 35, 22),
        ("digits_cnn", 4, 1),
    ],
)
def test_every_normalization_of_the_shipped_networks_is_in_a_chain(name, taken, others):
    grey = name == "digits_cnn"
    model = fb.convert(models.build(name, num_classes=10, in_channels=1 if grey else 3), "ibm2020")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn((2, 1, 8, 8) if grey else (2, 3, 32, 32))
    model(x).sum().backward()
    found = ends(model, x)
    kinds = [isinstance(end, LayerState) for end in found]
    assert (norms, sum(kinds), len(kinds) - sum(kinds)) == (taken + others, taken, others), found


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
