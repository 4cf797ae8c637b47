"""LSTM and GRU: torch's own numbers without quantization, an independent composition with it, all that torch takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit import backends, recipes
from fourbit.ops import LayerState, LinearMap, contract
from fourbit.ops._gemms import fprop, quantize_weight
from fourbit.quantizers import Amax, ClipValue, GradScale, QuantSpec, Rounding, Sawb
from fourbit.recipes import catalog

TORCH = {fb.nn.LSTM: nn.LSTM, fb.nn.GRU: nn.GRU}
VARIANTS = [
    {},
    {"num_layers": 3},
    {"bidirectional": True, "num_layers": 2},
    {"bias": False},
    {"batch_first": True},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
]


def states(last) -> tuple[torch.Tensor, ...]:
    return last if isinstance(last, tuple) else (last,)


def run(rnn: nn.Module, x: torch.Tensor, lengths: list[int] | None, start) -> list[torch.Tensor]:
    """Outputs, last states and every gradient."""
    x = x.clone().requires_grad_()
    start = None if start is None else tuple(t.clone().requires_grad_() for t in start)
    given = x if lengths is None else pack_padded_sequence(x, lengths, rnn.batch_first, enforce_sorted=False)
    first = start if start is None or isinstance(rnn, nn.LSTM) else start[0]
    output, last = rnn(given, first)
    y = output.data if isinstance(output, PackedSequence) else output
    rnn.zero_grad()
    (y.sin().sum() + sum((i + 1) * t.square().sum() for i, t in enumerate(states(last)))).backward()
    used = [] if start is None else [t.grad for t in (start if isinstance(rnn, nn.LSTM) else start[:1])]
    return [y, *states(last), x.grad, *used, *(p.grad for p in rnn.parameters())]


@pytest.mark.parametrize("cls", [fb.nn.LSTM, fb.nn.GRU])
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("lengths", [None, [6, 2, 5, 1]])
@pytest.mark.parametrize("with_start", [True, False])
def test_without_quantization_every_number_is_torchs(cls, options, lengths, with_start, monkeypatch):
    if cls is fb.nn.GRU and "proj_size" in options:
        pytest.skip("torch's GRU has no projections")
    monkeypatch.setattr(cls, "_quantized", lambda self: True)  # our own steps, although no operand is quantized
    torch.manual_seed(0)
    ours, theirs = cls(5, 7, **options).double(), TORCH[cls](5, 7, **options).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, 5) if options.get("batch_first") else torch.randn(6, 4, 5)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    start = (torch.randn(layers, 4, options.get("proj_size", 7)).double(), torch.randn(layers, 4, 7).double())
    given = start if with_start else None
    for a, b in zip(run(ours, x.double(), lengths, given), run(theirs, x.double(), lengths, given), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", [fb.nn.LSTM, fb.nn.GRU])
def test_unbatched_input_and_dropout_are_as_torchs(cls, monkeypatch):
    monkeypatch.setattr(cls, "_quantized", lambda self: True)
    ours, theirs = cls(5, 7, 2, dropout=0.5), TORCH[cls](5, 7, 2, dropout=0.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 5)
    for mode in (True, False):
        found = []
        for rnn in (ours, theirs):
            torch.manual_seed(3)
            y, last = rnn.train(mode)(x)
            found.append((y, *states(last)))
        assert [t.shape for t in found[0]] == [t.shape for t in found[1]]
        if not mode:
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)
    kept = (ours.train()(torch.ones(400, 5))[0] != 0).float().mean()
    assert kept > 0.99  # dropout is between layers, never behind the last


# No rounding of results: a sum of rounded products is not the rounded product of all steps. Fixed exponents and clip values.
FIXED = replace(
    catalog.TPR,
    x_fprop=QuantSpec("int4_sym", ClipValue(init=0.7)),
    g_dgrad=QuantSpec("fp4_r4_even", GradScale(init=6)),
    g_wgrad=QuantSpec("fp4_r4_odd", GradScale(init=6)),
    output=None,
)


def composed_lstm(lstm: nn.LSTM, x: torch.Tensor) -> torch.Tensor:
    """The same LSTM written step by step, with one autograd node per product."""
    ih, hh = LayerState(FIXED, 28), LayerState(FIXED, 28)
    lstm.states = ih, hh
    h, c = x.new_zeros(x.shape[1], 7), x.new_zeros(x.shape[1], 7)
    outputs = []
    for step in x:
        gates = contract(step, lstm.weight_ih_l0, LinearMap(), ih) + lstm.bias_ih_l0
        gates = gates + contract(h, lstm.weight_hh_l0, LinearMap(), hh) + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("kernels", [True, False])
def test_quantized_steps_equal_a_composition_of_quantized_products(kernels):
    torch.manual_seed(0)
    ours = fb.nn.LSTM(5, 7, spec=FIXED)
    theirs = nn.LSTM(5, 7)
    theirs.load_state_dict(fb.nn.float_state_dict(ours))
    x, g = torch.randn(9, 4, 5), torch.randn(9, 4, 7)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with backends.without() if not kernels else torch.enable_grad():
        y = ours(a)[0]
        (y * g).sum().backward()
        z = composed_lstm(theirs, b)
        (z * g).sum().backward()
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=False):
        if "alpha" not in name:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    for part, state in zip(("ih_l0", "hh_l0"), theirs.states, strict=True):
        torch.testing.assert_close(ours.part(part).quant.x_alpha.grad, state.x_alpha.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.part(part).quant.g_amax, state.g_amax, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cls", [fb.nn.LSTM, fb.nn.GRU])
def test_sequences_in_one_batch_do_not_see_one_another(cls):
    torch.manual_seed(0)
    rnn = cls(5, 7, num_layers=2, bidirectional=True, spec=replace(FIXED, w_fprop=QuantSpec("int4_sym", Sawb())))
    lengths = [3, 6, 1]
    x = torch.randn(6, 3, 5)
    output, last = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, _ = nn.utils.rnn.pad_packed_sequence(output)
    for i, n in enumerate(lengths):
        alone, own = rnn(x[:n, i : i + 1])
        torch.testing.assert_close(padded[:n, i : i + 1], alone)
        torch.testing.assert_close(states(last)[0][:, i : i + 1], states(own)[0])


class Language(nn.Module):
    def __init__(self, cls=nn.LSTM, **options):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.rnn = cls(32, 32, 2, **options)
        self.out = nn.Linear(32 * (2 if options.get("bidirectional") else 1), 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(self.embed(x))[0])


def test_parts_are_layers_of_the_recipe():
    model = Language()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randint(0, 20, (12, 8))
    by_name = {layer.name: layer for layer in fb.explain(model, "ibm2020", x).layers}
    assert list(by_name) == ["rnn.ih_l0", "rnn.hh_l0", "rnn.ih_l1", "rnn.hh_l1", "out"]
    assert {name: layer.rule for name, layer in by_name.items()} == {
        **dict.fromkeys(["rnn.ih_l0", "rnn.hh_l0", "rnn.ih_l1", "rnn.hh_l1"], "4-bit"),
        "out": "first and last",
    }
    assert all(
        by_name[f"rnn.{p}"].num_macs == dict.fromkeys(("fprop", "dgrad", "wgrad"), 96 * 128 * 32)
        for p in ("ih_l0", "hh_l1")
    )
    assert not any("quant" in key for key in model.state_dict())
    fb.convert(model, "ibm2020")
    assert type(model.rnn) is fb.nn.LSTM and set(fb.quantized_layers(model)) == set(by_name)
    assert fb.nn.float_state_dict(model).keys() == before.keys()
    model.load_state_dict(before, strict=False)
    fb.restore(model)
    assert type(model.rnn) is nn.LSTM and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model(x)


def test_first_is_the_embedding_or_else_the_first_layer_of_the_rnn():
    rules = (fb.Rule(catalog.FP16, where=fb.first(1), label="first"), fb.Rule(catalog.TPR, label="4-bit"))
    with_embedding = fb.explain(Language(), fb.Recipe("x", rules)).layers
    assert {layer.rule for layer in with_embedding} == {"4-bit"}
    bare = fb.explain(nn.Sequential(nn.GRU(4, 4, 2, bidirectional=True)), fb.Recipe("x", rules)).layers
    assert [layer.name for layer in bare if layer.rule == "first"] == [
        "0.ih_l0", "0.hh_l0", "0.ih_l0_reverse", "0.hh_l0_reverse"
    ]  # fmt: skip
    assert len(bare) == 8


LONG = ("int4-fwd", "ibm2020-dw8", "ibm2020-channel-gradscale", "ibm2020-acc")


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("recipe", ["ibm2020", "luq", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_a_language_model_learns_in_4_bits(cls, recipe):
    torch.manual_seed(0)
    model = fb.convert(Language(cls), recipe)
    x = torch.randint(0, 20, (8, 6))
    optimizer = torch.optim.Adam(fb.param_groups(model), lr=1e-2)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 0).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.5  # half of what guessing gives, ln 20


def test_all_steps_share_one_exponent_that_moves_by_one():
    torch.manual_seed(0)
    rnn = fb.nn.LSTM(5, 8, spec=catalog.TPR)
    x = torch.randn(10, 3, 5)
    rnn(x)[0].sum().backward()  # the first exponent suits the step that backward sees first
    rnn(x)
    quant = rnn.part("hh_l0").quant
    first = int(quant.g_exponent)
    for _ in range(3):
        (rnn(x)[0].sum() * 1e-9).backward()
    rnn(x)
    assert int(quant.g_exponent) == first + 3
    for _ in range(8):
        (rnn(x)[0].sum() * 1e-3).backward()
    assert int(rnn.part("ih_l0").quant.g_exponent) == int(quant.g_exponent)


def test_the_first_clip_value_of_projections_fits_the_hidden_states_of_the_whole_sequence():
    torch.manual_seed(0)
    rnn = nn.LSTM(5, 64, proj_size=32)
    x = torch.randn(50, 4, 5) * 3
    largest = rnn(x)[0].abs().max().item()
    model = fb.convert(nn.Sequential(rnn), fb.Recipe("x", (fb.Rule(catalog.TPR),)))
    model(x)
    quant = model[0].part("hh_l0").quant
    assert quant.x_form.tolist() == [0, 1] and 0.4 * largest < quant.x_alpha.item() <= 1.01 * largest
    assert model[0].part("hr_l0").quant.x_alpha.item() == 1  # sigmoid times tanh


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_clip_values_of_hidden_states_start_at_their_bound(cls):
    torch.manual_seed(0)
    model = fb.convert(nn.Sequential(cls(5, 32, 2, dropout=0.2)), fb.Recipe("x", (fb.Rule(catalog.TPR),)))
    x = torch.randn(50, 4, 5) * 3
    model(x)
    found = {name: model[0].part(name).quant for name in ("hh_l0", "ih_l1", "hh_l1", "ih_l0")}
    assert [q.x_alpha.item() for q in found.values()][:3] == [1.0, 1.25, 1.0]
    assert all(q.x_form.tolist() == [0, 1] for q in found.values())
    assert (
        0.4 * x.abs().max() < found["ih_l0"].x_alpha.item() <= 1.01 * x.abs().max()
    )  # the input's fits the first batch


def test_a_clip_value_that_a_recipe_sets_is_kept():
    spec = fb.LayerSpec(x_fprop=fb.QuantSpec("uint4", fb.ClipValue(init=0.25)))
    lstm = fb.nn.LSTM(5, 8, spec=spec)
    lstm(torch.randn(3, 2, 5))
    assert lstm.part("hh_l0").quant.x_alpha.item() == 0.25


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_numbers(reentrant):
    def train(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        rnn = fb.nn.LSTM(5, 8, 2, bidirectional=True, spec=catalog.TPR)
        for _ in range(3):
            x = torch.randn(6, 3, 5, requires_grad=True)
            y = checkpoint(lambda t: rnn(t)[0], x, use_reentrant=reentrant) if checkpointed else rnn(x)[0]
            rnn.zero_grad()
            y.square().sum().backward()
        return [p.grad for p in rnn.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_products_leave_codes_and_a_bit_per_element():
    model = fb.convert(
        nn.Sequential(nn.LSTM(64, 64), nn.Linear(1, 1)), fb.Recipe("x", (fb.Rule(catalog.TPR, types=(nn.LSTM,)),))
    )
    report = fb.memory_report(model[0], (20, 16, 64))
    assert [layer.name for layer in report.layers] == ["ih_l0", "hh_l0"]
    for layer in report.layers:
        assert layer.fp32_bytes == 4 * (20 * 16 * 64 + 256 * 64)
        assert 0.125 < layer.ratio < 0.15 and layer.float_bytes < 0.02 * layer.saved_bytes + 200


def test_autocast_and_half_precision_models_run():
    rnn = fb.nn.LSTM(5, 8, spec=catalog.TPR)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = rnn(torch.randn(3, 2, 5))
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16
    y.sum().backward()
    half = fb.nn.GRU(5, 8, spec=catalog.TPR).bfloat16()
    y, _ = half(torch.randn(3, 2, 5, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == half.weight_hh_l0.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "start", "message"),
    [
        (torch.zeros(3, 2, 4), None, r"LSTM got an input of shape \(3, 2, 4\), but needs 5 elements on axis -1"),
        (torch.zeros(3, 2, 1, 5), None, "but needs 5 elements on axis -1 and 2 or 3 axes"),
        (torch.zeros(0, 2, 5), None, "there is no step in it"),
        (torch.zeros(3, 2, 5, dtype=torch.long), None, "LSTM"),
        (
            torch.zeros(3, 2, 5),
            (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)),
            r"first hidden state of shape \(1, 3, 8\), but needs \(1, 2, 8\)",
        ),
        (torch.zeros(3, 2, 5), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 7)), "first cell state"),
    ],
)
def test_bad_input_is_named(x, start, message):
    with pytest.raises(fb.UserError, match=message):
        fb.nn.LSTM(5, 8, spec=catalog.TPR)(x, start)


@pytest.mark.parametrize("name", list(recipes.CATALOG))
def test_every_recipe_takes_an_rnn_or_says_why_not(name):
    model = Language()
    if any(rule.when is not None and not rule.optional for rule in recipes.get(name).rules):
        with pytest.raises(fb.UserError, match="matches no layer"):
            fb.convert(model, name)
        return
    if recipes.get(name).upkeep:
        with pytest.raises(
            fb.UserError, match=r"looks after weights of linear and convolution layers|OutControl is for linear"
        ):
            fb.convert(model, name)
        return
    fb.convert(model, name)
    model(torch.randint(0, 20, (4, 2))).sum().backward()


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_the_first_exponent_fits_the_largest_gradient_of_all_steps(cls):
    torch.manual_seed(0)
    rnn = fb.convert(nn.Sequential(cls(32, 32)), fb.Recipe("x", (fb.Rule(catalog.TPR),)))[0]
    rnn.part("hh_l0").quant.x_alpha.data.fill_(0.5)  # fits the hidden states of these weights
    x, weights = torch.randn(35, 8, 32), 0.7 ** torch.arange(35).view(-1, 1, 1)  # late steps hardly count
    plain = TORCH[type(rnn)](32, 32)
    plain.load_state_dict(fb.nn.float_state_dict(rnn))
    for net in (rnn, plain):
        (net(x)[0] * weights).square().sum().backward()
    assert 32 < float(rnn.part("hh_l0").quant.g_amax) <= 64
    a, b = rnn.weight_hh_l0.grad, plain.weight_hh_l0.grad
    assert 0.7 < float(a.norm() / b.norm()) < 1.2 and torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cls", [fb.nn.LSTM, fb.nn.GRU])
def test_an_empty_batch_is_an_empty_result(cls):
    rnn = cls(4, 8, spec=catalog.TPR)
    y, last = rnn(torch.zeros(3, 0, 4))
    y.sum().backward()
    assert y.shape == (3, 0, 8) and states(last)[0].shape == (1, 0, 8)


def test_every_time_step_draws_its_own_random_words():
    """The same hidden state at three steps is rounded in three ways, and in the same three ways when it is done again."""
    torch.manual_seed(0)
    spec = fb.LayerSpec(x_fprop=QuantSpec("int4_sym", Amax(), rounding=Rounding.STOCHASTIC))
    x, w = torch.randn(5, 40), torch.eye(40)
    runs = []
    for _ in range(2):
        state = LayerState(spec, 40, seed=3)
        state.begin()
        weight = quantize_weight(w, LinearMap(), state)
        runs.append([fprop(x, weight, LinearMap(), state, torch.float32)[0] for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    first, second, third = runs[0]
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)
