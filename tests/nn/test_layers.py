"""Layers as modules: they equal torch where nothing is quantized, and survive everything that modules go through."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit import formats
from fourbit.errors import UserError
from fourbit.ops import LayerSpec, LayerState
from fourbit.quantizers import UNSET, Amax, QuantSpec, Rounding

TPR = fb.recipes.get("ibm2020").rules[-1].spec
LUQ = fb.recipes.get("luq").rules[-1].spec

LAYERS = {
    "Linear": (lambda n: n.Linear(6, 4), (3, 6)),
    "Linear, no bias": (lambda n: n.Linear(6, 4, bias=False), (2, 3, 6)),
    "Conv1d": (lambda n: n.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
    "Conv2d": (lambda n: n.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 7)),
    "Conv2d, unbatched": (lambda n: n.Conv2d(3, 4, 3), (3, 7, 7)),
    "Conv2d, dilated": (lambda n: n.Conv2d(3, 4, 3, dilation=2), (2, 3, 7, 7)),
    "Conv2d, grouped": (lambda n: n.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "Conv2d, depthwise": (lambda n: n.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 7)),
    "Conv2d, same": (lambda n: n.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 7, 6)),
    "Conv2d, same, dilated": (lambda n: n.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 9, 8)),
    "Conv2d, valid": (lambda n: n.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 7)),
    "Conv2d, reflect": (lambda n: n.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 7, 7)),
    "Conv2d, replicate": (lambda n: n.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (2, 3, 7, 7)),
    "Conv2d, circular": (lambda n: n.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), (2, 3, 7, 7)),
    "Conv3d": (lambda n: n.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 4)),
    "ConvTranspose1d": (lambda n: n.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5)),
    "ConvTranspose2d": (lambda n: n.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (2, 3, 5, 5)),
    "ConvTranspose2d, grouped": (lambda n: n.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    "ConvTranspose3d": (lambda n: n.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
}
every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


def pair(make, spec: LayerSpec):
    """torch's layer and ours, with the same parameters."""
    torch.manual_seed(0)
    theirs = make(nn)
    torch.manual_seed(0)
    ours = make(fb.nn)
    ours.attach(spec)
    return theirs, ours


def step(layer: nn.Module, x: torch.Tensor, seed: int = 1):
    """Output and all gradients of one pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    y.backward(g.to(y.dtype))
    weights = [layer.weight.grad] + ([layer.bias.grad] if layer.bias is not None else [])
    return [y.detach(), x.grad, *weights]


@every_layer
def test_an_identity_spec_equals_torch_bit_for_bit(case):
    make, shape = case
    theirs, ours = pair(make, LayerSpec())
    x = torch.randn(shape)
    for a, b in zip(step(theirs, x), step(ours, x), strict=True):
        assert torch.equal(a, b)


@every_layer
def test_sixteen_bit_operands_come_close_to_torch(case):
    """Geometry, padding, bias and transposition are right: only rounding separates the two."""
    make, shape = case
    theirs, ours = pair(make, fb.recipes.get("ibm2020").rules[0].spec)
    x = torch.randn(shape)
    for a, b in zip(step(theirs, x), step(ours, x), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@every_layer
def test_four_bit_gradients_point_where_torch_s_do(case):
    make, shape = case
    theirs, ours = pair(make, TPR)
    x = torch.randn(shape).relu()
    for a, b in zip(step(theirs, x), step(ours, x), strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.75


def test_the_output_size_argument_of_transposed_convolutions_works():
    layer = fb.nn.ConvTranspose2d(3, 4, 3, stride=2, spec=TPR)
    assert layer(torch.randn(1, 3, 4, 4), output_size=[10, 10]).shape == (1, 4, 10, 10)


def test_one_vote_per_backward_pass_however_often_a_layer_is_used():
    layer = fb.nn.Linear(4, 4, bias=False, spec=TPR)
    nn.init.eye_(layer.weight).data.mul_(0.5)  # the gradient does not grow on its way through the second use
    x = torch.randn(3, 4)
    step_once = lambda scale: (layer(layer(x)) * scale).sum().backward()  # noqa: E731
    step_once(1.0)
    first = int(layer.quant.g_exponent)
    step_once(2.0**-20)  # two uses, both far too small: still one vote
    assert int(layer.quant.g_exponent) == first
    layer(x)
    assert int(layer.quant.g_exponent) == first + 1
    layer(x)
    assert int(layer.quant.g_exponent) == first + 1  # no new gradient, no new vote


def test_both_uses_of_a_shared_layer_are_quantized_with_one_scale():
    layer = fb.nn.Linear(4, 4, bias=False, spec=TPR)
    scales = []

    class Watch:
        def record(self, slot, x, quantized):
            if slot == "g_dgrad":
                scales.append(float(quantized.scale))

    layer.quant.observer = Watch()
    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(4):
        scales.clear()
        (layer(layer(x)) * 1e-3).sum().backward()
        assert len(scales) == 2 and scales[0] == scales[1]


def test_the_scale_follows_a_gradient_that_shrinks_and_stays_put_on_zeros():
    layer = fb.nn.Linear(4, 4, spec=TPR)
    x = torch.randn(8, 4)
    for i in range(30):
        (layer(x) * 2.0 ** (-i)).sum().backward()
    assert float(layer.quant.g_amax) > 16
    before = int(layer.quant.g_exponent)
    for _ in range(20):
        (layer(x) * 0).sum().backward()
    layer(x)
    assert abs(int(layer.quant.g_exponent) - before) <= 1


def test_gradients_are_divided_by_the_scale_again():
    """Gradients that differ by a power of two give results that differ by exactly that."""
    x = torch.randn(8, 6).relu()
    grads = []
    for scale in (1.0, 2.0**-30):
        torch.manual_seed(0)
        layer = fb.nn.Linear(6, 4, bias=False, spec=TPR)
        (layer(x) * scale).square().sum().mul(1 / scale).backward()
        grads.append(layer.weight.grad)
    assert torch.equal(grads[0] * 2.0**-30, grads[1])


def test_evaluation_and_no_grad_change_no_state():
    layer = fb.nn.Conv2d(3, 4, 3, spec=TPR)
    x = torch.randn(2, 3, 5, 5)
    layer(x).sum().backward()
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    layer(x * 100)
    with torch.no_grad():
        layer(x)
    after = layer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_evaluation_before_training_works_and_decides_nothing():
    layer = fb.nn.Linear(4, 2, spec=TPR).eval()
    y = layer(torch.randn(5, 4))
    assert y.isfinite().all() and layer.quant.x_form.tolist() == [0, 0]
    layer.train()
    layer(torch.randn(5, 4).abs())
    assert layer.quant.x_form.tolist() == [1, 0]


def test_the_first_training_batch_decides_between_unsigned_and_signed():
    for sign, x in ((0, torch.rand(64, 8)), (1, torch.randn(64, 8))):
        layer = fb.nn.Linear(8, 2, spec=TPR)
        layer(x)
        assert layer.quant.x_form.tolist() == [1 - sign, sign]
        assert 0 < float(layer.quant.x_alpha.detach()) <= float(x.abs().max())
        layer(torch.randn(64, 8))
        assert layer.quant.x_form.tolist() == [1 - sign, sign]


def test_an_all_zero_first_batch_decides_nothing():
    layer = fb.nn.Linear(8, 2, spec=TPR)
    assert torch.equal(layer(torch.zeros(3, 8)), layer.bias.expand(3, 2))
    assert layer.quant.x_form.tolist() == [0, 0]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_equal(copy_of):
    layer = fb.nn.Conv2d(3, 4, 3, spec=LUQ)
    x = torch.randn(2, 3, 6, 6)
    step(layer, x)
    twin = copy_of(layer)
    for _ in range(3):
        for a, b in zip(step(layer, x), step(twin, x), strict=True):
            assert torch.equal(a, b)
    assert twin.quant.step is not layer.quant.step


def test_stochastic_layers_replay_from_their_state_dict():
    def make():
        torch.manual_seed(0)
        layer = fb.nn.Linear(6, 4)
        layer.attach(LUQ, seed=3, index=1)
        return layer

    x = torch.randn(5, 6)
    layer = make()
    for _ in range(3):
        step(layer, x)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    first, second = step(layer, x), step(resumed, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(step(layer, x)[1], first[1])  # the next step draws other words


def test_stochastic_uses_of_a_shared_layer_draw_different_words():
    layer = fb.nn.Linear(4, 4, bias=False, spec=LayerSpec(g_dgrad=LUQ.g_dgrad, g_wgrad=LUQ.g_wgrad))
    seen = []

    class Watch:
        def record(self, slot, x, quantized):
            seen.append(quantized.q)

    layer.quant.observer = Watch()
    x = torch.randn(50, 4, requires_grad=True)
    g = torch.randn(50, 4)
    (layer(x) * g + layer(x) * g).sum().backward()
    assert len(seen) == 2 and not torch.equal(*seen)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "spec", [TPR, LUQ, LayerSpec(x_fprop=QuantSpec("int4_sym", Amax(), rounding=Rounding.STOCHASTIC))]
)
def test_gradient_checkpointing_gives_the_same_numbers(reentrant, spec):
    def train(checkpointed: bool):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), fb.nn.Linear(6, 6, spec=spec), nn.ReLU(), nn.Linear(6, 2))
        x = torch.randn(9, 6, requires_grad=True)
        for _ in range(4):
            y = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
            net.zero_grad()
            y.square().sum().backward()
        return [p.grad for p in net.parameters()], net[2].quant.state_dict()

    (plain, state), (recomputed, state2) = train(False), train(True)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(state[k], state2[k]) for k in state)


def test_gradients_accumulate_and_each_backward_pass_votes():
    layer = fb.nn.Linear(4, 2, spec=TPR)
    x = torch.randn(8, 4)
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    first = int(layer.quant.g_exponent)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)
    for _ in range(3):
        (layer(x) * 1e-6).sum().backward()
    layer(x)
    assert int(layer.quant.g_exponent) == first + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_keep_their_scales_in_float32(dtype):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), fb.nn.Linear(8, 4, spec=TPR)).to(dtype)
    y = net(torch.randn(5, 6, dtype=dtype))
    y.float().square().sum().backward()
    layer = net[2]
    assert y.dtype == layer.weight.grad.dtype == dtype
    assert layer.quant.x_alpha.dtype == layer.quant.g_amax.dtype == torch.float32
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0


def test_autocast_gives_autocast_s_dtype_and_float32_gradients():
    layer = fb.nn.Linear(8, 4, spec=TPR)
    x = torch.rand(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()  # inside the region, where backward would be autocast too
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    reference = fb.nn.Linear(8, 4, spec=TPR)
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y.float(), reference(x), rtol=1e-2, atol=1e-2)


def test_tied_weights_and_shared_modules_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.again = self.a

        def forward(self, x):
            return self.c(self.again(self.b(self.a(x))))

    net = fb.convert(Tied(), fb.Recipe("all", (fb.Rule(TPR),)))
    assert net.b.weight is net.a.weight and net.again is net.a
    net(torch.randn(3, 4)).sum().backward()
    assert net.a.weight.grad is not None and len(fb.quantized_layers(net)) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_and_gradients_are_counted_propagated_and_poison_no_scale(bad):
    net = fb.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), fb.Recipe("all", (fb.Rule(TPR),)))
    x = torch.randn(3, 4)
    net(x).sum().backward()
    exponent = int(net[1].quant.g_exponent)
    broken = x.clone()
    broken[0, 0] = bad
    y = net(broken)
    assert y.isnan().any()
    assert fb.nonfinite_layers(net)["0"]["x"] == 1
    y.backward(torch.full_like(y, bad))
    assert fb.nonfinite_layers(net)["1"]["g"] >= 1
    net(x)
    assert int(net[1].quant.g_exponent) == exponent


def test_observation_changes_no_number_and_measures_what_it_says():
    def train(observed: bool):
        torch.manual_seed(0)
        net = fb.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), fb.Recipe("all", (fb.Rule(TPR),)))
        x = torch.randn(40, 6)
        stats = None
        if observed:
            with fb.observe(net, histograms=True) as stats:
                net(x).square().sum().backward()
        else:
            net(x).square().sum().backward()
        return [p.grad for p in net.parameters()], stats, net

    plain, _, _ = train(False)
    watched, stats, net = train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert set(stats) == {"0", "2"} and set(stats["2"]) == {"x_fprop", "w_fprop", "g_dgrad", "g_wgrad"}
    w = net[2].weight.detach()
    xq = fb.quantize(w, TPR.w_fprop).dequantize()
    measured = stats["2"]["w_fprop"]
    expected = 10 * torch.log10(w.square().sum() / (w - xq).square().sum())
    assert measured.sqnr_db == pytest.approx(float(expected), rel=1e-4)
    assert measured.underflow == pytest.approx(float((xq == 0).float().mean()))
    assert measured.amax == float(w.abs().max()) and measured.numel == w.numel()
    histogram = stats.histograms()["2"]["g_wgrad"]
    assert sum(histogram["counts"]) + histogram["zeros"] == 120
    assert histogram["grid"] == [v for v in formats.FP4_R4_ODD.grid if v > 0]
    assert len(histogram["counts"]) == len(histogram["log2_edges"]) - 1


def test_integer_inputs_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="floating-point"):
        fb.nn.Linear(3, 2, spec=TPR)(torch.ones(1, 3, dtype=torch.long))


def test_per_channel_gradscale_gives_each_channel_its_own_exponent():
    spec = fb.recipes.get("ibm2020-channel-gradscale").rules[-1].spec
    layer = fb.nn.Conv2d(3, 4, 3, spec=spec)
    y = layer(torch.rand(2, 3, 6, 6))
    sizes = 2.0 ** -torch.arange(0, 40, 10.0)
    y.backward(torch.randn_like(y) * sizes.view(1, -1, 1, 1))
    exponents = layer.quant.g_exponent
    assert exponents.shape == (4,) and (exponents != UNSET).all()
    assert ((exponents[1:] - exponents[:-1] - 10).abs() <= 2).all()
    assert layer.weight.grad.abs().amax((1, 2, 3))[3] > 0  # the smallest channel did not underflow


def test_a_backward_pass_in_evaluation_mode_leaves_the_state_alone_and_loses_nothing():
    layer = fb.nn.Linear(8, 4, spec=TPR)
    x = torch.rand(16, 8)
    layer(x).sum().backward()
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    for size in (1e6, 1e-6):
        layer.zero_grad()
        (layer(x) * size).sum().backward()
        exact = x.sum(0).expand(4, 8)  # dw of a sum
        assert 0.4 < layer.weight.grad.norm() / size / exact.norm() < 1.6  # the most that rounding one number can do
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_a_stochastic_layer_draws_new_words_in_evaluation_mode_too():
    layer = fb.nn.Linear(6, 4, spec=LUQ).eval()
    x = torch.randn(20, 6)
    first, second = step(layer, x), step(layer, x)
    assert not torch.equal(first[1], second[1])


def test_a_channel_without_gradients_does_not_hurt_the_others():
    spec = fb.recipes.get("ibm2020-channel-gradscale").rules[-1].spec
    x = torch.rand(32, 6)
    grads = []
    for dead in (False, True):
        torch.manual_seed(0)
        layer = fb.nn.Linear(6, 4, bias=False, spec=spec)
        g = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)) * 2.0**-40
        g[:, 3] *= not dead
        layer(x).backward(g)
        grads.append(layer.weight.grad[:3])
    assert torch.equal(*grads) and grads[0].abs().min() > 0


@pytest.mark.parametrize("shape", [(0, 6), (6,)])
def test_per_channel_gradscale_takes_empty_and_one_dimensional_inputs(shape):
    layer = fb.nn.Linear(6, 4, spec=fb.recipes.get("ibm2020-channel-gradscale").rules[-1].spec)
    layer(torch.rand(shape)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_matmul_refuses_gradscale_per_channel():
    with pytest.raises(UserError, match="granularity='tensor'"):
        fb.nn.MatMul(spec=fb.recipes.get("ibm2020-channel-gradscale").rules[-1].spec)


def test_layers_with_different_indices_draw_different_words():
    grads = []
    for index in (0, 1):
        torch.manual_seed(0)
        layer = fb.nn.Linear(6, 4, spec=LUQ, seed=5, index=index)
        grads.append(step(layer, torch.ones(9, 6))[1])
    assert not torch.equal(*grads)


def test_observations_nest():
    net = nn.Sequential(fb.nn.Linear(3, 3, spec=TPR))
    with fb.observe(net) as outer:
        with fb.observe(net) as inner:
            net(torch.rand(2, 3))
        net(torch.rand(2, 3)).sum().backward()
    assert set(inner["0"]) == {"x_fprop", "w_fprop"}
    assert {"g_dgrad", "g_wgrad"} & set(outer["0"])
    assert net[0].quant.observer is None


def test_a_state_made_for_another_spec_is_refused():
    x, w, spec = torch.randn(2, 3), torch.randn(4, 3), LayerSpec(w_fprop=QuantSpec(formats.INT4_SYM, Amax()))
    state = LayerState(spec)
    assert fb.nn.functional.linear(x, w, None, spec, state).shape == (2, 4)
    with pytest.raises(UserError, match="the state was made for another spec"):
        fb.nn.functional.linear(x, w, None, LayerSpec(), state)


@pytest.mark.parametrize("recipe", ["ibm2020", "luq", "nvfp4"])
def test_a_linear_layer_takes_a_vector_as_it_takes_one_row(recipe):
    torch.manual_seed(0)
    model = fb.convert(nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), recipe)
    twin, x = copy.deepcopy(model), torch.randn(32)
    found = []
    for net, given in ((model, x.clone().requires_grad_()), (twin, x[None].clone().requires_grad_())):
        y = net(given)
        y.square().sum().backward()
        found.append([y.detach().view(-1), given.grad.view(-1), net[1].weight.grad])
    assert model(x).shape == (32,)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
