"""Recipes: conversion in place and back, rules, explanations, parameter groups, the loss scale, golden traces."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit import backends, models
from fourbit.errors import UserError
from fourbit.quantizers import Amax, QuantSpec
from fourbit.recipes.catalog import variants

# On a network without attention "ibm2020-attention" is "ibm2020", tests/nn/test_attention.py has it; with phases or upkeep a
# recipe is another one before they begin, test_phases.py and test_upkeep.py have them.
RECIPES = [
    name
    for name, recipe in fb.recipes.CATALOG.items()
    if name != "ibm2020-attention" and not (recipe.phases or recipe.upkeep)
]
GOLDEN = Path(__file__).parent / "golden.json"
VARIANTS = set(variants.NAMES[2:])
"""They differ from others in one thing each, and what a recipe is made of is tested with those."""


class Net(nn.Module):
    """Every property that recipes ask for: 3x3, 1x1 that reduce and expand, depthwise, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.reduce = nn.Conv2d(8, 4, 1, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 4, 4, 4, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        layers = (self.stem, self.reduce, self.depthwise, self.conv, self.expand)
        for layer, norm in zip(layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.fc(x.mean((2, 3)))


class Wide(Net):
    """The same with 64 channels everywhere, which all rotations divide."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(64, 64, 3, padding=1)
        self.reduce = nn.Conv2d(64, 64, 1, bias=False)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False)
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(64, 64, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(5))
        self.fc = nn.Linear(64, 5)

    def forward(self, x):
        return super().forward(x.repeat(1, 22, 1, 1)[:, :64])


def network(recipe: str) -> Net:
    """One that the rotations of a recipe divide."""
    specs = [rule.spec for rule in fb.recipes.get(recipe).rules if rule.spec is not None]
    rotated = any(spec.transform(slot) for spec in specs for slot in ("x_fprop", "g_dgrad"))
    return Wide() if rotated else Net()


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def draws_rows(recipe: str) -> bool:
    """Whether a recipe leaves out rows of products at random."""
    specs = [rule.spec for rule in fb.recipes.get(recipe).rules if rule.spec is not None]
    resolved = [spec.resolved(slot) for spec in specs for slot in ("g_dgrad", "g_wgrad")]
    return any(found is not None and found.leverage is not None for found in resolved)


def trace(recipe: str, steps: int = 20) -> list[float]:
    """Losses of a short training run; in float64 where the last bit of a sum can decide whether a whole row is left out."""
    torch.manual_seed(0)
    net = fb.convert(network(recipe), recipe, seed=0)
    wide = torch.float64 if draws_rows(recipe) else torch.float32
    net.to(wide)
    optimizer = torch.optim.SGD(fb.param_groups(net, 1e-4), lr=0.2, momentum=0.9)
    scaler = fb.loss_scaler(net)
    x, y = batch()
    x = x.to(wide)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler is None or scaler.unscale_(optimizer):
            optimizer.step()
        if scaler:
            scaler.update()
        losses.append(loss.item())
    return losses


def assert_same_trace(losses: list[float], golden: list[float]) -> None:
    torch.testing.assert_close(losses[:8], golden[:8], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        losses[8:], golden[8:], rtol=3e-2, atol=1e-3
    )  # another processor may sum in another order


# Of each family one; the golden traces, which start as the kernels' do, fall for all.
QUICK = (
    "int4-fwd",
    "ibm2020",
    "ibm2020-channel-gradscale",
    "ibm2020-global-scale",
    "ibm2020-acc",
    "luq",
    "luq-smp2",
    "fourbit",
    "nvfp4",
    "quartet",
    "fp8-rowwise",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_every_recipe_trains(name):
    losses = trace(name)
    assert losses[-1] < 0.8 * losses[0], losses


LONG = ("ibm2020-acc", "ibm2020-acc-nochunk")
"""Their reference rounds after every product that it adds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in {*LONG, *VARIANTS} else ()) for name in RECIPES]
)
def test_every_recipe_reproduces_its_golden_trace(name):
    """Regenerate with `python tests/recipes/test_recipes.py` and say why under *Numerics* in the changelog."""
    golden = json.loads(GOLDEN.read_text())[name]
    torch.set_num_threads(1)
    with backends.without():
        assert_same_trace(trace(name, len(golden)), golden)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in RECIPES]
)
def test_kernels_start_on_the_trace_of_the_reference(name, isa):
    golden = json.loads(GOLDEN.read_text())[name]
    # One update: later losses depend on single roundings that fall the other way, and drift apart. After a rotation each
    # number depends on a whole block, and more of them fall.
    rtol = 5e-3 if isinstance(network(name), Wide) else 1e-3
    torch.testing.assert_close(trace(name, steps=2), golden[:2], rtol=rtol, atol=0.0)


def test_golden_traces_tell_recipes_apart():
    golden = json.loads(GOLDEN.read_text())
    apart = [
        name for name in golden if not name.startswith("e2m1-block")
    ]  # blocks of other sizes lie within the tolerance
    for a, b in itertools.permutations(apart, 2):
        with pytest.raises(AssertionError):
            assert_same_trace(golden[a][: len(golden[b])], golden[b][: len(golden[a])])


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "fp32"])
def test_conversion_keeps_parameters_and_float_checkpoints_load_both_ways(name):
    net = network(name)
    parameters = dict(net.named_parameters())
    stored = {k: v.clone() for k, v in net.state_dict().items()}
    fb.convert(net, name)
    now = dict(net.named_parameters())
    assert all(now[k] is p for k, p in parameters.items())
    extra = set(net.state_dict()) - set(stored)
    assert all(".quant." in key for key in extra)
    states = [layer.quant for layer in fb.quantized_layers(net).values()]
    assert extra or not any(state.spec.stochastic or list(state.parameters()) for state in states)
    assert set(stored) <= set(net.state_dict())
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    net.load_state_dict(stored)  # strict: a float checkpoint lacks nothing
    network(name).load_state_dict(fb.float_state_dict(net))
    twin = fb.convert(network(name), name)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin.eval()(x), net.eval()(x))
    fb.restore(net)
    assert set(net.state_dict()) == set(stored) and type(net.conv) is nn.Conv2d
    assert all(dict(net.named_parameters())[k] is p for k, p in parameters.items())


def test_a_restored_model_computes_what_it_did_before():
    net, x = Net().eval(), batch()[0]
    before = net(x)
    assert torch.equal(fb.restore(fb.convert(net, "ibm2020"))(x), before)


def assigned(name: str) -> dict[str, str]:
    return {layer.name: layer.rule for layer in fb.explain(Net(), name).layers}


def test_the_paper_s_rules_fall_where_they_should():
    base = {"stem": "first and last", "depthwise": "depthwise", "fc": "first and last"}
    four = dict.fromkeys(("reduce", "conv", "expand"), "4-bit")
    assert assigned("ibm2020") == {**four, **base}
    for name, layers in {
        "ibm2020-1x1fp8": ("reduce", "expand"),
        "ibm2020-bottom1x1fp8": ("reduce",),
        "ibm2020-top1x1fp8": ("expand",),
        "ibm2020-3x3fp8": ("conv",),
    }.items():
        assert assigned(name) == {**four, **base, **dict.fromkeys(layers, "FP8 gradients")}


def test_a_rule_that_matches_nothing_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"rule 3, FP8 gradients \[kernel_size\(1\)\], matches no layer"):
        fb.convert(models.build("vgg16", num_classes=10), "ibm2020-1x1fp8")


def test_a_rule_whose_layers_are_all_taken_names_the_rules_that_took_them():
    taken = r"rule 3, 4-bit \[every layer\], is left without a layer: rule 1, first and last .* came first"
    with pytest.raises(UserError, match=taken):
        fb.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "ibm2020")


def test_a_rule_for_a_misspelt_layer_names_the_nearest_layers():
    spec = fb.recipes.get("luq").rules[-1].spec
    with pytest.raises(UserError, match="nearest layer names: reduce"):
        fb.convert(Net(), fb.Recipe("mine", (fb.Rule(spec, where=fb.name("^redcue$")), fb.Rule(None))))
    with pytest.raises(UserError, match="not a regular expression"):
        fb.name("(")
    with fb.observe(fb.convert(Net(), "luq")) as stats, pytest.raises(UserError, match="unknown layer"):
        stats["redcue"]


def test_a_rotation_that_divides_no_features_is_refused_before_anything_is_converted():
    net = Net()
    says = r"'quartet': a Hadamard transform of 32 does not divide the 3 numbers that fprop of stem sums over: .* rule before"
    with pytest.raises(UserError, match=says):
        fb.convert(net, "quartet")
    assert not fb.quantized_layers(net)


def test_a_failed_conversion_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(UserError):
        fb.convert(net, "ibm2020")
    assert all(type(m) is nn.Linear for m in net)


def test_the_first_matching_rule_wins():
    a, b = fb.recipes.get("ibm2020").rules[-1].spec, fb.recipes.get("luq").rules[-1].spec
    recipe = fb.Recipe("mine", (fb.Rule(a, where=fb.name("conv")), fb.Rule(b, types=(nn.Conv2d,)), fb.Rule(None)))
    net = fb.convert(Net(), recipe)
    assert net.conv.spec is a and net.reduce.spec is b and type(net.fc) is nn.Linear


def test_unknown_names_empty_recipes_double_conversion_and_nothing_to_convert_are_refused():
    with pytest.raises(UserError, match="did you mean 'ibm2020'"):
        fb.convert(Net(), "ibm202")
    with pytest.raises(UserError, match="no rules"):
        fb.Recipe("empty", ())
    with pytest.raises(UserError, match="already converted"):
        fb.convert(fb.convert(Net(), "ibm2020"), "luq")
    with pytest.raises(UserError, match="nothing to convert"):
        fb.convert(nn.Sequential(nn.ReLU()), "ibm2020")


def test_layers_that_cannot_be_converted_are_reported_and_left_in_float():
    class Custom(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    net = nn.ModuleDict(
        {
            "a": nn.Linear(4, 4),
            "b": Custom(4, 4),
            "c": nn.RNN(4, 4),
            "d": nn.Bilinear(4, 4, 4),
            "e": nn.Linear(4, 4),
        }
    )
    recipe = fb.Recipe("all", (fb.Rule(fb.recipes.get("luq").rules[-1].spec),))
    text = str(fb.explain(net, recipe))
    for reason in ("Custom has a forward of its own", "RNN cannot be converted", "Bilinear cannot be converted"):
        assert f"{reason}, stays in full precision" in text
    fb.convert(net, recipe)
    assert type(net["b"]) is Custom and type(net["c"]) is nn.RNN and set(fb.quantized_layers(net)) == {"a", "e"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.scores = fb.nn.MatMul()

    def forward(self, x):
        return self.out(self.scores(self.q(x), self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x))


def test_a_matmul_of_activations_is_quantized_by_a_rule_that_names_it_and_only_then():
    activations = QuantSpec("int4_sym", Amax())
    score = fb.LayerSpec(x_fprop=activations, w_fprop=activations)
    x = torch.randn(2, 5, 8)
    plain = fb.convert(Attention(), "ibm2020")
    assert plain.scores.spec.is_identity and fb.explain(plain, "ibm2020", x).shares()["32 x 32"] > 0
    recipe = fb.Recipe("scores", (fb.Rule(score, types=(fb.nn.MatMul,)), *fb.recipes.get("ibm2020").rules))
    net = fb.convert(Attention(), recipe)
    assert net.scores.spec is score and type(net.q) is fb.nn.Linear and type(net.out) is fb.nn.Linear
    net(x).sum().backward()
    assert fb.restore(net).scores.spec.is_identity and type(net.q) is nn.Linear


def test_torch_s_fast_path_for_encoder_layers_does_not_bypass_the_recipe():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    ternary = QuantSpec("int2_sym", Amax())
    fb.convert(layer, fb.Recipe("w2", (fb.Rule(fb.LayerSpec(w_fprop=ternary), types=(nn.Linear,)),)))
    layer.eval()
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x).detach())
    fb.restore(layer)
    assert not layer.linear1._forward_pre_hooks


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(UserError, match="meta device"):
        fb.convert(net, "ibm2020")


def test_explain_counts_layers_that_no_rule_matches_and_those_that_cannot_be_converted():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    recipe = fb.Recipe("convs", (fb.Rule(fb.recipes.get("luq").rules[-1].spec, types=(nn.Conv2d,)),))
    shares = fb.explain(net, recipe, (1, 3, 8, 8)).shares()
    assert set(shares) == {"4 x 4", "32 x 32"}

    class Custom(nn.Linear):
        def forward(self, input):
            return nn.functional.linear(input, self.weight, self.bias)

    net[2] = Custom(144, 2)
    assert fb.explain(net, recipe, (1, 3, 8, 8)).shares() == shares


def test_explain_takes_a_batch_by_the_names_of_the_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

        def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.layers(left + right)

    batch = {"left": torch.ones(5, 8), "right": torch.ones(5, 8)}
    found = fb.explain(Named(), "ibm2020", batch).layers
    assert [layer.num_macs["fprop"] for layer in found] == [5 * 64] * 3
    assert len(fb.memory_report(fb.convert(Named(), "ibm2020"), batch).layers) == 3
    with pytest.raises(UserError, match=r"does not run on an input of shape middle=\(5, 8\)"):
        fb.explain(Named(), "ibm2020", {"middle": torch.ones(5, 8)})


def test_explain_leaves_modes_and_the_random_generator_alone():
    net = Net()
    net.norms[0].eval()
    state = torch.get_rng_state()
    fb.explain(net, "ibm2020", (1, 3, 8, 8))
    assert torch.equal(state, torch.get_rng_state()) and not net.norms[0].training and net.norms[1].training


def test_explain_counts_macs_and_shares_and_changes_nothing():
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    explanation = fb.explain(net, "ibm2020-1x1fp8", (2, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    macs = {layer.name: layer.num_macs for layer in explanation.layers}
    pixels = 2 * 64
    assert macs["stem"] == {"fprop": pixels * 8 * 27, "dgrad": 0, "wgrad": pixels * 8 * 27}
    assert macs["reduce"]["dgrad"] == pixels * 8 * 4 and macs["depthwise"]["fprop"] == pixels * 4 * 9
    assert macs["fc"]["fprop"] == 2 * 8 * 5
    shares = explanation.shares("bits")
    assert sum(shares.values()) == pytest.approx(1)
    eight = 4 * pixels * 32  # dgrad and wgrad of both 1x1 layers
    assert shares["8 x 4"] == pytest.approx(eight / explanation.num_macs)
    text = str(explanation)
    for part in ("uint4, PACT", "int4_sym, SAWB", "fp8_152, GradScale 64", "int4_sym (reused)", "8 x 4", "fp16_169"):
        assert part in text


def test_explain_shows_what_the_layers_of_a_trained_model_have_learned():
    net = fb.convert(Net(), "ibm2020", products="exact")
    x, y = batch()
    text = str(fb.explain(net, "ibm2020", x))
    assert "alpha of x not decided yet, g not scaled yet" in text
    F.cross_entropy(net(x), y).backward()
    explanation = fb.explain(net, "ibm2020", x)
    state = {layer.name: layer.state for layer in explanation.layers}
    quant = net.conv.quant
    assert state["conv"] == f"alpha of x {quant.x_alpha.item():.4g} (unsigned), g times 2^{int(quant.g_exponent)}"
    assert state["fc"] == f"g times 2^{int(net.fc.quant.g_exponent)}"
    assert state["conv"] in str(explanation)
    assert "products: exact: every result is rounded once" in str(explanation)
    other = fb.explain(net, "luq")
    assert not any(layer.state for layer in other.layers)  # the state of another recipe would mislead
    assert "alpha of x" not in str(fb.explain(Net(), "ibm2020"))


def test_explain_shows_the_range_of_scales_where_channels_have_their_own():
    net = fb.convert(Net(), "ibm2020-channel-gradscale")
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    net.conv.quant.g_exponent.copy_(torch.tensor([9, 7, 12, 9]))
    state = next(layer.state for layer in fb.explain(net, "ibm2020-channel-gradscale").layers if layer.name == "conv")
    assert state.endswith("g times 2^7 to 2^12")


def test_explain_names_the_kernels_and_says_what_fast_products_are_and_what_a_loss_scale_needs():
    text = str(fb.explain(Net(), "ibm2020"))
    assert all(f"kernels: {status}" in text for status in backends.statuses())
    assert "products: fast, unless" in text
    assert "2^-8" in text
    assert "loss_scaler" not in text
    assert "a loop of your own needs fourbit.loss_scaler(model)" in str(fb.explain(Net(), "ibm2020-global-scale"))


def test_parameter_groups_hold_each_parameter_once_and_alphas_apart():
    net = fb.convert(Net(), "ibm2020")
    groups = {g["name"]: g for g in fb.param_groups(net, 1e-2, alpha_weight_decay=1e-3, no_decay_norm_bias=True)}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {"weights": 1e-2, "norm_bias": 0.0, "alpha": 1e-3}
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in net.parameters()}
    assert len(groups["alpha"]["params"]) == 3
    assert {g["name"]: g["weight_decay"] for g in fb.param_groups(net, 1e-2)} == {"weights": 1e-2, "alpha": 1e-2}


def test_the_loss_scale_halves_on_overflow_doubles_after_clean_steps_and_leaves_gradients_unscaled():
    net = fb.convert(Net(), "ibm2020-global-scale")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    scaler = fb.LossScaler(net, init=2.0**30, interval=3)
    x, y = batch()
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        assert scaler.unscale_(optimizer)
        scaler.update()
        values.append(scaler.value)
    assert values[0] == 2.0**29 and min(values) < 2.0**20
    assert any(b == 2 * a for a, b in itertools.pairwise(values))
    exact = Net()
    exact.load_state_dict(fb.float_state_dict(net))
    F.cross_entropy(exact(x), y).backward()
    similarity = F.cosine_similarity(net.fc.weight.grad.flatten(), exact.fc.weight.grad.flatten(), dim=0)
    ratio = net.fc.weight.grad.norm() / exact.fc.weight.grad.norm()
    assert similarity > 0.9 and 0.5 < ratio < 2
    restored = fb.LossScaler(net)
    restored.load_state_dict(scaler.state_dict())
    assert restored.value == scaler.value and restored.clean_steps == scaler.clean_steps


def test_the_loss_scale_starts_where_the_first_gradients_just_fit():
    torch.manual_seed(0)
    net = fb.convert(Net(), "ibm2020-global-scale")
    scaler = fb.loss_scaler(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    x, y = batch()
    fullness = []
    for _ in range(2):
        scaler.scale(F.cross_entropy(net(x), y) * 2.0**-9).backward()
        assert scaler.unscale_(optimizer)
        optimizer.zero_grad()
        layers = fb.nn.quantized_layers(net).values()
        fullness.append(max(float(layer.quant.g_amax) / layer.spec.g_scaling.scaling.max for layer in layers))
        scaler.update()
    assert 0.5 < fullness[1] <= 1 and not 0.5 < fullness[0] <= 1
    restored = fb.LossScaler(net)
    restored.load_state_dict({"value": 4.0, "clean_steps": 3})  # of a run that began before
    restored.update()
    assert restored.value == 4.0 and restored.clean_steps == 4


@pytest.mark.parametrize("interval", [1, 2])
def test_the_loss_scale_doubles_after_so_many_steps_without_overflow(interval):
    net = fb.convert(Net(), "ibm2020-global-scale")
    scaler, (x, y), found = fb.loss_scaler(net, interval), batch(), []
    scaler.load_state_dict({"value": 1.0, "clean_steps": 0})
    for _ in range(4):
        (scaler.scale(F.cross_entropy(net(x), y)) * 2.0**-30).backward()
        scaler.update()
        found.append(scaler.value)
    assert found == {1: [2.0, 4.0, 8.0, 16.0], 2: [1.0, 2.0, 2.0, 4.0]}[interval]


def test_the_loss_scale_sees_the_largest_gradient_of_all_backward_passes_of_a_step():
    """The second of two passes is small; the first, out of range, still halves the scale, and is forgotten after it."""
    net = fb.convert(Net(), "ibm2020-global-scale")
    scaler, (x, y) = fb.LossScaler(net, init=2.0**10), batch()
    layers = fb.nn.quantized_layers(net).values()
    for factor in (2.0**30, 2.0**-30):
        (scaler.scale(F.cross_entropy(net(x), y)) * factor).backward()
    scaler.update()
    assert scaler.value == 2.0**9
    assert all(float(layer.quant.g_amax) == -1 for layer in layers)
    (scaler.scale(F.cross_entropy(net(x), y)) * 2.0**-30).backward()
    scaler.update()
    assert (scaler.value, scaler.clean_steps) == (2.0**9, 1)


def test_the_loss_scale_asks_to_skip_a_step_with_bad_gradients():
    net = fb.convert(Net(), "ibm2020-global-scale")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = fb.loss_scaler(net)
    for p in net.parameters():
        p.grad = torch.full_like(p, float("inf"))
    before = scaler.value
    assert not scaler.unscale_(optimizer)
    scaler.update()
    assert scaler.value == before / 2
    assert fb.loss_scaler(fb.convert(Net(), "ibm2020")) is None


def test_luq_uses_one_sample_for_both_gemms_and_smp_averages_two():
    luq, smp = (fb.recipes.get(n).rules[-1].spec for n in ("luq", "luq-smp2"))
    assert luq.g_wgrad is fb.REUSE and smp.g_wgrad.samples == 2 and smp.g_dgrad.samples == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or RECIPES
    traces = json.loads(GOLDEN.read_text()) if sys.argv[1:] else {}
    with backends.without():
        # From the fifth step on, single roundings have decided about rows.
        traces |= {name: trace(name, 4 if draws_rows(name) else 20) for name in chosen}
    GOLDEN.write_text(json.dumps(traces, indent=1) + "\n")
