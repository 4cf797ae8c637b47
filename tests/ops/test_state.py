"""What a layer remembers: when it is decided, and what averages, checkpoints, learning rates and default dtypes leave of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit.ops import LayerState
from fourbit.quantizers import UNSET, best_clip_value

IBM = fb.recipes.get("ibm2020").rules[-1].spec


def network(recipe: str = "ibm2020", fuse: bool = True) -> nn.Module:
    """Four layers: the second gets inputs that are not negative, the third some that are."""
    torch.manual_seed(0)
    layers = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return fb.convert(nn.Sequential(*layers), recipe, fuse=fuse)


def batches(n: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 8, generator=generator) for _ in range(n)]


def train(model: nn.Module, xs: list[Tensor], after=lambda: None) -> None:
    optimizer = torch.optim.SGD(fb.param_groups(model), lr=0.01)
    for x in xs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        after()


def clipped(model: nn.Module) -> dict[str, LayerState]:
    return {n: layer.quant for n, layer in fb.quantized_layers(model).items() if "x" in layer.quant.scalings}


def forms(model: nn.Module) -> dict[str, int]:
    return {name: state.scalings["x"].signed(state) for name, state in clipped(model).items()}


# ---------------------------------------------------------------------------------------------------------- averages


def in_place(ema: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    """Every entry, whatever its dtype, copied back into it."""
    for key, value in now.items():
        ema[key].copy_(ema[key] * 0.9 + value * 0.1)


def new_tensors(ema: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    """Every entry as a new tensor: integers become floats."""
    for key, value in now.items():
        ema[key] = ema[key] * 0.9 + value * 0.1


def floats_only(ema: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    """Floats are averaged, integers copied."""
    for key, value in now.items():
        ema[key] = torch.lerp(ema[key], value, 0.1) if value.is_floating_point() else value.clone()


@pytest.mark.parametrize("average", [in_place, new_tensors, floats_only])
@pytest.mark.parametrize("recipe", ["ibm2020", "luq"])
def test_a_hand_written_average_from_before_the_first_batch_on_computes_with_averaged_clip_values(average, recipe):
    model = network(recipe)
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    history: dict[str, list[float]] = {name: [] for name in clipped(model)}

    def after() -> None:
        average(ema, model.state_dict())
        for name, state in clipped(model).items():
            history[name].append(float(state.x_alpha.detach()))

    train(model, batches(20), after)
    averaged = network(recipe)
    averaged.load_state_dict(ema)
    assert forms(averaged) == forms(model) and (recipe == "luq" or set(forms(model).values()) == {0, 1})
    # the same average of the clip values alone, over the steps since there has been one
    want = copy.deepcopy(model)
    with torch.no_grad():
        for name, t in want.named_parameters():
            if "quant" not in name:
                t.copy_(ema[name])
        for name, state in clipped(want).items():
            weights = [0.9**k for k in reversed(range(20))]
            state.x_alpha.fill_(sum(w * a for w, a in zip(weights, history[name], strict=True)) / sum(weights))
    x = batches(1, 5)[0]
    with torch.no_grad():
        torch.testing.assert_close(averaged.eval()(x), want.eval()(x), rtol=2e-3, atol=2e-3)
    averaged.train()
    train(averaged, batches(3, 7))  # and goes on from there
    assert all(t.isfinite().all() for t in averaged.state_dict().values())
    assert forms(averaged) == forms(model)
    for name, state in clipped(averaged).items():
        assert state.x_form.sum() == 1
        assert 0.5 < float(state.x_alpha.detach()) / float(dict(clipped(model))[name].x_alpha.detach()) < 2


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torch_s_averaged_model_keeps_signs_and_clip_values(use_buffers):
    model = network()
    averaged = AveragedModel(model, use_buffers=use_buffers)
    train(model, batches(6), lambda: averaged.update_parameters(model))
    assert forms(averaged.module) == forms(model)
    for name, state in clipped(averaged.module).items():
        assert float(state.x_form.sum()) == pytest.approx(1)
        assert float(state.x_alpha.detach()) == pytest.approx(float(clipped(model)[name].x_alpha.detach()), rel=0.1)


def test_the_average_of_an_exponent_with_an_unset_one_is_set_by_the_next_gradient():
    model, x = network(), batches(1)[0]
    start = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, [x])
    both = {key: start[key] * 0.75 + value * 0.25 for key, value in model.state_dict().items()}
    for share in (1.0, 2.0**-26):  # far from any exponent, and among them
        for key in [k for k in both if k.endswith("g_exponent")]:
            both[key] = torch.where(start[key] == UNSET, share * UNSET + 0.5, start[key])
        found, fresh = network(), network()
        found.load_state_dict(both)
        fresh.load_state_dict({k: start[k] if k.endswith("g_exponent") else v for k, v in both.items()})
        for each in (found, fresh):
            each(x).square().mean().backward()
        for mine, theirs in zip(fb.quantized_layers(found).values(), fb.quantized_layers(fresh).values(), strict=True):
            if "g" in mine.quant.scalings:
                assert torch.equal(mine.quant.g_exponent, theirs.quant.g_exponent)


# -------------------------------------------------------------------------------------------------------- checkpoints


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict as it was: 0-d clip values, int8 signs, integer exponents."""
    found = {}
    for key, value in state.items():
        stem, _, name = key.rpartition(".")
        if name.endswith("_form"):
            signed = -1 if not value.any() else int(value[1])
            found[f"{stem}.{name[0]}_signed"] = torch.tensor(signed, dtype=torch.int8)
        elif name.endswith("_alpha"):
            found[key] = value[0] if state[f"{stem}.{name[0]}_form"].any() else torch.tensor(1.0)
        elif name == "g_exponent":
            found[key] = value.to(torch.int32)
        elif not name.endswith("_floor"):
            found[key] = value
    return found


@pytest.mark.parametrize("steps", [0, 2])
def test_checkpoints_of_earlier_versions_load(steps):
    model = network()
    train(model, batches(steps))
    kept = older(model.state_dict())
    assert any(t.dim() == 0 for name, t in kept.items() if name.endswith("x_alpha"))
    loaded = network()
    before = dict(kept)
    assert not any(loaded.load_state_dict(kept))
    assert kept.keys() == before.keys()  # what the caller passed stays as it was
    for x in batches(3, 4):
        assert torch.equal(loaded(x), model(x))
        loaded(x).sum().backward()
        model(x).sum().backward()
    for name, t in model.state_dict().items():
        assert torch.equal(t, loaded.state_dict()[name]), name


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["ibm2020", "luq", "ibm2020-global-scale", "ibm2020-channel-gradscale"])
def test_state_is_float32_under_any_default_dtype(default, recipe):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    torch.set_default_dtype(default)
    try:
        fb.convert(net, recipe)
        x = torch.randn(4, 8, dtype=torch.float32)
        net(x).sum().backward()
        again = fb.convert(nn.Sequential(*(copy.deepcopy(m) for m in fb.restore(copy.deepcopy(net)))), recipe)
        again.load_state_dict(net.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    for model in (net, again):
        for name, t in model.state_dict().items():
            if "quant" in name and t.is_floating_point():
                assert t.dtype == torch.float32, name
    assert torch.equal(net.eval()(x), again.eval()(x)) or recipe == "luq"


# ---------------------------------------------------------------------------------------------------- the first batch


def test_passes_without_gradients_leave_the_decision_to_the_first_pass_with_them():
    first, second = torch.rand(64, 8) * 100, torch.randn(64, 8)
    for frame in (torch.no_grad, torch.inference_mode):
        layer = fb.nn.Linear(8, 2, spec=IBM)
        fresh = copy.deepcopy(layer)
        with frame():
            rounded = layer(first)
        assert layer.quant.x_form.tolist() == [0, 0] and float(layer.quant.x_alpha.detach()) == 0
        assert torch.equal(rounded, fresh(first).detach())  # by what that batch says
        layer(second)
        assert layer.quant.x_form.tolist() == [0, 1]
        assert float(layer.quant.x_alpha.detach()) == pytest.approx(
            best_clip_value(second, fb.formats.INT4_SYM), rel=1e-6
        )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_micro_batches_through_a_shared_layer_start_as_those_that_are_not(reentrant):
    def run(checkpointed: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), shared := fb.nn.Linear(6, 6, spec=IBM), nn.Tanh(), shared)
        found, xs = [], [(size * torch.randn(9, 6)).requires_grad_() for size in (1, 10)]
        for _ in range(2):
            ys = [checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x) for x in xs]
            net.zero_grad()
            for y in ys:
                y.square().sum().backward()
            found += [*(y.detach() for y in ys), *(p.grad.clone() for p in net.parameters())]
        return found, net.state_dict()

    (plain, state), (recomputed, state2) = run(False), run(True)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(state[k], state2[k]) for k in state)


# ------------------------------------------------------------------------------------------- clip values and optimizers


def test_a_clip_value_that_is_pushed_below_zero_is_half_of_what_it_was_and_comes_back():
    layer = fb.nn.Linear(8, 2, spec=IBM)
    x = torch.rand(32, 8) * 0.02
    layer(x).sum().backward()
    alpha = layer.quant.x_alpha
    last = float(alpha.detach())
    for _ in range(3):
        with torch.no_grad():
            alpha.sub_(0.5)
        layer.eval()
        below = layer(x)
        assert float(alpha.detach()) < 0  # evaluation changes nothing
        layer.train()
        assert torch.equal(layer(x), below)  # but sees what the next training pass will
        assert float(alpha.detach()) == pytest.approx(last / 2)
        last /= 2
    with torch.no_grad():
        alpha.fill_(0.015)
    layer(x)
    assert float(alpha.detach()) == pytest.approx(0.015)  # what is positive is left alone, however it moved
    resumed = fb.nn.Linear(8, 2, spec=IBM)
    with torch.no_grad():
        alpha.fill_(-1)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(resumed(x), layer(x)) and float(resumed.quant.x_alpha.detach()) == pytest.approx(0.0075)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_network_in_small_units_goes_on_learning_with_an_ordinary_learning_rate(kernels):
    torch.manual_seed(0)
    first, middle, last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)
    net = nn.ModuleList([first, middle, last])
    fb.convert(net, fb.Recipe("all", (fb.Rule(fb.recipes.get("int4-fwd").rules[-1].spec),)))
    optimizer = torch.optim.Adam(fb.param_groups(net), lr=0.02)
    x = torch.randn(256, 8)
    target = (x @ torch.randn(8, 3)).argmax(1)
    losses = []
    with fb.backends.without("cpu") if not kernels else torch.enable_grad():
        for _ in range(60):
            hidden = torch.relu(net[1](torch.relu(net[0](x)) * 0.01) / 0.01)
            loss = nn.functional.cross_entropy(net[2](hidden), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# --------------------------------------------------------------------------------------------------------- frozen layers


@pytest.mark.parametrize("grad", [True, False])
def test_frozen_layers_get_frozen_clip_values_and_build_no_graph(grad):
    body = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 16), nn.GRU(16, 8)
    )
    net = nn.ModuleList([body, nn.Linear(8, 4)])
    body.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        fb.convert(net, fb.Recipe("all", (fb.Rule(IBM),)))
    assert not any(p.requires_grad for p in body.parameters())
    assert all(p.requires_grad for p in net[1].parameters())
    with fb.backends.without("cpu"):
        h = body(torch.randn(3, 5, 8))[0]
        assert not h.requires_grad
        assert body[2].quant.x_form.tolist() == [1, 0]  # decided all the same
    assert sum(len(g["params"]) for g in fb.param_groups(net)) == len(list(net[1].parameters()))
    for p in net.parameters():
        p.requires_grad_(True)
    with fb.backends.without("cpu"):
        net[1](body(torch.randn(3, 5, 8))[0]).sum().backward()
    assert body[2].quant.x_alpha.grad is not None
