"""`explain` counts every product of a forward pass, and names what no rule is about."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fourbit as fb
from fourbit.errors import UserError
from fourbit.recipes import Explanation, catalog
from fourbit.recipes._count import counting

ONE = fb.Recipe("one", (fb.Rule(catalog.TPR),))


class Attention(nn.Module):
    def __init__(self, size: int = 8):
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self, size: int = 8):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, size, size)) for _ in range(2))

    def forward(self, x):
        rows = x.flatten(0, -2)
        half = torch.tensor([rows.shape[0] // 2, rows.shape[0]], dtype=torch.int32)
        hidden = F.grouped_mm(rows, self.up, offs=half)
        return torch.cat([part @ w for part, w in zip(hidden.chunk(2), self.down, strict=True)]).view_as(x)


class Block(nn.Module):
    """A layer in front, attention, experts, and a norm and a table that multiply nothing."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.embed = nn.Embedding(20, size)
        self.position = nn.Parameter(torch.randn(6, size))
        self.norm = nn.LayerNorm((6, size))
        self.attention, self.experts, self.head = Attention(size), Experts(size), nn.Linear(size, 20)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens) + self.position)
        return self.head(self.experts(self.attention(x)))


TOKENS = torch.arange(12).view(2, 6)


class Last(nn.Module):
    """A recurrent layer behind another one."""

    def __init__(self, cls: type[nn.RNNBase], **options):
        super().__init__()
        self.embed, self.rnn = nn.Linear(8, 8), cls(8, 8, 2, **options)
        self.out = nn.Linear(self.rnn(torch.randn(1, 1, 8))[0].shape[-1], 3)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


def convolutions(groups: int) -> nn.Module:
    transposed = nn.ConvTranspose2d(8, 4, 3, 2, groups=groups)
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), transposed, nn.Flatten(), nn.Linear(324, 3))


NETS = {
    "convolutions": (lambda: convolutions(1), torch.randn(2, 4, 6, 6)),
    "grouped convolutions": (lambda: convolutions(2), torch.randn(2, 4, 6, 6)),
    "attention": (Attention, torch.randn(2, 5, 8)),
    "torch's attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
    "block": (Block, TOKENS),
}
RECURRENT = {
    "LSTM": lambda: Last(nn.LSTM, bidirectional=True),
    "projected LSTM": lambda: Last(nn.LSTM, proj_size=4),
    "GRU": lambda: Last(nn.GRU, batch_first=True),
    "RNN": lambda: Last(nn.RNN),
}


def torch_count(net: nn.Module, x: torch.Tensor, backward: bool) -> float:
    """By torch, with attention and recurrent layers as the plain products that its counter knows; `_grouped_mm` it does not."""

    def grouped(a_shape, b_shape, *args, out_shape=None, **kwargs):
        return 2 * a_shape[0] * a_shape[1] * b_shape[-1]

    known = {torch.ops.aten._grouped_mm: grouped}
    plain = sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False)
    with plain[0], plain[1], FlopCounterMode(display=False, custom_mapping=known) as counter:
        y = net(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops() / 2


def forward_macs(explanation: Explanation) -> int:
    return sum((part.num_macs or {}).get("fprop", 0) for part in (*explanation.layers, *explanation.calls))


@pytest.mark.parametrize("name", [*NETS, *RECURRENT])
def test_all_products_of_the_forward_pass_are_counted_as_torch_counts_them(name):
    make, x = NETS.get(name) or (RECURRENT[name], torch.randn(4, 2, 8))
    net = make().eval()
    assert forward_macs(fb.explain(net, "fp32", x)) == torch_count(net, x, backward=False)


@pytest.mark.parametrize("name", ["convolutions", "attention", "torch's attention"])
def test_all_products_of_a_training_step_are_counted_as_torch_counts_them(name):
    make, x = NETS[name]
    net = make().eval()
    explanation = fb.explain(net, "fp32", x)
    assert explanation.num_macs == torch_count(net, x, backward=True)
    assert explanation.shares() == {"32 x 32": 1.0}


def test_the_gradient_of_a_grouped_convolution_has_as_many_products_as_its_result():
    (layer,) = fb.explain(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), "fp32", (2, 4, 6, 6)).layers
    macs = 2 * 4 * 4 * 8 * 2 * 9  # torch's count of wgrad has the groups in it once more
    assert layer.num_macs == {"fprop": macs, "dgrad": 0, "wgrad": macs}


def test_a_converted_model_has_the_counts_of_the_plain_one():
    net = Block()
    plain = fb.explain(net, ONE, TOKENS)
    assert fb.explain(fb.convert(net, ONE), ONE, TOKENS).calls == plain.calls
    assert fb.explain(net, ONE, TOKENS).shares() == plain.shares()


def test_what_no_layer_multiplies_is_named_by_module_and_operation_with_its_share():
    explanation = fb.explain(Block(), ONE, TOKENS)
    rows = 12
    found = {(call.name, call.operation): call for call in explanation.calls}
    scores = found["attention", "scaled_dot_product_attention"]
    assert scores.num_macs == dict.fromkeys(("fprop", "dgrad", "wgrad"), 2 * 2 * 2 * 6 * 6 * 4)
    assert scores.reason == "product of activations" and scores.weights == ()
    up, down = found["experts", "grouped_mm"], found["experts", "mm"]
    assert up.num_macs == down.num_macs == dict.fromkeys(("fprop", "dgrad", "wgrad"), rows * 8 * 8)
    assert (up.weights, down.weights) == (("experts.up",), ("experts.down",))
    assert up.reason == "uses its parameter up"
    layers = sum(sum(layer.num_macs.values()) for layer in explanation.layers)
    assert explanation.shares()["4 x 4"] == pytest.approx(layers / explanation.num_macs)
    text = str(explanation)
    assert "outside all rules: 3 calls" in text
    for line in ("experts", "grouped_mm", "uses its parameter up", "scaled_dot_product_attention"):
        assert line in text


def test_weights_of_no_layer_are_named_with_and_without_an_input():
    net = Block()
    static = {m.name: m for m in fb.explain(net, ONE).matrices}
    assert set(static) == {
        *("attention.qkv.weight", "attention.out.weight", "head.weight", "experts.up", "experts.down", "position")
    }
    seen = {m.name: m for m in fb.explain(net, ONE, TOKENS).matrices}
    assert set(seen) == set(static) - {"position"}  # added, not multiplied
    assert {name for name, m in seen.items() if m.reason} == {"experts.up", "experts.down"}
    inside, outside = 3 * 64 + 64 + 8 * 20, 2 * 2 * 64
    shares = fb.explain(net, ONE, TOKENS).weight_shares()
    assert shares == pytest.approx({"4": inside / (inside + outside), "32": outside / (inside + outside)})
    assert "parameter of Experts, not of a layer" in str(fb.explain(net, ONE))


def test_tied_weights_count_once_and_an_embedding_that_is_multiplied_counts():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, tokens):
            return F.linear(self.b(self.a(self.embed(tokens))), self.embed.weight)

    explanation = fb.explain(Tied(), ONE, TOKENS % 9)
    assert [(m.name, m.numel) for m in explanation.matrices] == [("a.weight", 64), ("embed.weight", 72)]
    assert [call.reason for call in explanation.calls] == ["uses embed.weight"]
    net = fb.convert(Tied(), ONE)
    net(TOKENS % 9).sum().backward()
    assert net.a.weight is net.b.weight


@pytest.mark.parametrize("change", [lambda w: w, lambda w: w.half().float(), lambda w: (w * 2.0).t().contiguous().t()])
def test_the_weight_of_a_layer_used_outside_its_forward_is_told(change):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.out(F.linear(x, change(self.qkv.weight), self.qkv.bias))

    explanation = fb.explain(fb.convert(Functional(), ONE), ONE, (3, 8))
    (call,) = explanation.calls
    assert call.reason == "uses qkv.weight outside its layer's forward"
    assert call.num_macs == {"fprop": 192, "dgrad": 0, "wgrad": 192}
    assert next(layer for layer in explanation.layers if layer.name == "qkv").num_macs is None
    matrix = next(m for m in explanation.matrices if m.name == "qkv.weight")
    assert (matrix.bits, matrix.reason) == (32, "used outside its layer's forward")
    assert "MACs not counted, and not part of the shares: qkv" in str(explanation)


def test_frozen_weights_have_no_wgrad():
    net = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.LSTM(8, 8))
    for p in net.parameters():
        p.requires_grad_(False)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.layers = nn.Linear(8, 8), net

        def forward(self, x):
            x = self.layers[0](self.front(x))
            return self.layers[2](self.layers[1](x, x, x)[0])[0]

    for layer in fb.explain(Chain(), ONE, (3, 2, 8)).layers:
        macs = layer.num_macs
        assert macs["fprop"] == (macs["wgrad"] or macs["dgrad"])
        assert (macs["wgrad"] == 0) == (layer.name != "front")


def counted(f, *tensors: torch.Tensor) -> tuple[int, list[tuple[bool, bool]]]:
    with counting(nn.Module(), set()) as counts:
        f(*tensors)
    return sum(call.size.macs for call in counts.calls), [(call.x, call.w) for call in counts.calls]


@pytest.mark.parametrize(
    ("f", "shapes", "macs"),
    [
        (torch.mv, [(5, 8), (8,)], 40),
        (torch.dot, [(8,), (8,)], 8),
        (torch.matmul, [(2, 5, 8), (8,)], 80),
        (torch.bmm, [(2, 5, 8), (2, 8, 3)], 240),
        (torch.addmm, [(5, 3), (5, 8), (8, 3)], 120),
        (torch.baddbmm, [(2, 5, 3), (2, 5, 8), (2, 8, 3)], 240),
        (torch.addbmm, [(5, 3), (2, 5, 8), (2, 8, 3)], 240),
        (torch.addmv, [(5,), (5, 8), (8,)], 40),
        (torch.addr, [(5, 8), (5,), (8,)], 40),
        (lambda a, b: torch.einsum("bij,kj->bik", a, b), [(2, 5, 8), (3, 8)], 240),
        (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [(2, 5, 8), (2, 3, 8)], 240),
        (torch.tensordot, [(5, 4, 2), (4, 2, 3)], 120),
        (F.bilinear, [(5, 8), (5, 3), (4, 8, 3)], 480),
        (F.conv1d, [(2, 4, 9), (6, 4, 3)], 2 * 6 * 7 * 4 * 3),
        (lambda x, w: F.conv2d(x, w, groups=2), [(2, 4, 5, 5), (6, 2, 3, 3)], 2 * 6 * 9 * 2 * 9),
        (F.conv_transpose1d, [(2, 4, 9), (4, 6, 3)], 2 * 9 * 4 * 6 * 3),
        (torch.conv_tbc, [(9, 2, 4), (3, 4, 6), (6,)], 7 * 2 * 6 * 4 * 3),
        (F.scaled_dot_product_attention, [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], 2 * 2 * 3 * 5 * 7 * 8),
        (F.grouped_mm, [(2, 5, 8), (2, 8, 4)], 320),
        (lambda a, b: a * b, [(5, 8), (5, 8)], 0),
    ],
)
def test_every_operator_that_multiplies_matrices_is_counted(f, shapes, macs):
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert counted(f, *tensors)[0] == macs
    with torch.inference_mode():
        assert counted(f, *(t.detach().clone() for t in tensors))[0] == macs


def test_groups_of_queries_share_keys():
    q, kv = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    found = counted(lambda: F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True))
    assert found[0] == 2 * 2 * 4 * 5 * 5 * 8


def test_a_weight_on_the_left_is_still_the_weight():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return self.w @ x

    with counting(net := Left(), set()) as counts:
        net(torch.randn(8, 3))
    (call,) = counts.calls
    assert (call.x, call.w, call.weights, call.size.n) == (False, True, ("w",), 4)


def test_products_that_make_a_parametrized_weight_are_told_apart_from_the_layer_s():
    net = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    explanation = fb.explain(net, ONE, (3, 8))
    assert [layer.num_macs["fprop"] for layer in explanation.layers] == [192, 192]
    assert {call.reason for call in explanation.calls} == {"makes the weight of a layer"}
    assert [(m.name, m.numel) for m in explanation.matrices] == [("0.weight", 64), ("1.weight", 64)]


def test_operators_of_other_libraries_that_take_weights_are_named():
    @torch.library.custom_op("left_out_test::scaled", mutates_args=())
    def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return scaled(self.front(x), self.w)

    explanation = fb.explain(Foreign(), ONE, (3, 4))
    assert explanation.uncounted == ("the model: left_out_test.scaled",)
    assert "products not known, and not part of the shares: the model: left_out_test.scaled" in str(explanation)


def test_products_in_16_bits_count_as_such():
    net = Block().bfloat16()
    net.experts = nn.Identity()
    shares = fb.explain(net, fb.Recipe("head", (fb.Rule(catalog.TPR, where=fb.last(1)),)), TOKENS).shares()
    assert set(shares) == {"4 x 4", "16 x 16"}


def test_inputs_by_name():
    net = Block()
    assert fb.explain(net, ONE, {"tokens": TOKENS}).shares() == fb.explain(net, ONE, TOKENS).shares()
    with pytest.raises(fb.UserError, match=r"does not run on an input of shape words=\(2, 6\)"):
        fb.explain(net, ONE, {"words": TOKENS})
    assert fb.memory_report(fb.convert(net, ONE), {"tokens": TOKENS}).layers


def test_many_entries_that_differ_in_their_numbers_are_one_line():
    net = nn.Sequential(nn.Linear(8, 8), *(Attention() for _ in range(5)))
    text = str(fb.explain(net, ONE, (2, 5, 8)))
    assert "*.qkv (5)" in text and "1.qkv" not in text
    assert "* (5)  scaled_dot_product_attention" in text


def test_explain_does_not_call_train_or_eval_of_the_model():
    class Loud(nn.Linear):
        def train(self, mode: bool = True):
            raise AssertionError("a model may do work there")

    net = nn.Sequential(nn.Linear(4, 4), Loud(4, 4))
    fb.explain(net, ONE, (2, 4))
    assert net[0].training and net[1].training


def test_torchscript_and_quantized_parts_are_named_and_do_not_stop_the_rest():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.front = nn.Linear(4, 4)
            self.parts = nn.ModuleDict(
                {
                    "script": torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
                    "int8": torch.ao.nn.quantized.dynamic.Linear(4, 4),
                }
            )

        def forward(self, x):
            return self.front(self.parts["int8"](x)) + self.parts["script"](x)

    net = Mixed()
    explanation = fb.explain(net, ONE, (3, 4))
    notes = {layer.name: layer.note for layer in explanation.layers}
    assert notes == {
        "front": "",
        "parts.script": "TorchScript cannot be converted, stays in full precision",
        "parts.int8": "Linear cannot be converted, stays in full precision",
    }
    script = next(layer for layer in explanation.layers if layer.name == "parts.script")
    assert script.num_macs == {"fprop": 48, "dgrad": 48, "wgrad": 48}
    assert ("parts.script.0.weight", 16) in [(m.name, m.numel) for m in explanation.matrices]
    fb.convert(net, ONE)(torch.randn(3, 4)).sum().backward()
    assert set(fb.quantized_layers(fb.restore(net))) == set()
    with pytest.raises(fb.UserError, match=r"nothing to convert: .* TorchScript cannot be converted"):
        fb.convert(torch.jit.script(nn.Linear(4, 4)), ONE)


class Remembers(nn.Module):
    """Keeps a feature with its graph, as code with an auxiliary loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.feature = self.norm(self.first(x)).relu()
        return self.last(self.second(self.feature).mean((2, 3)))


def test_explain_leaves_nothing_on_a_model_that_stores_features_and_copies_one_that_has():
    net = Remembers()
    before = fb.explain(net, "ibm2020", (2, 3, 8, 8)).chains
    assert not hasattr(net, "feature") and not any("copy of the model" in c.end for c in before)
    net(torch.randn(2, 3, 8, 8))
    kept = net.feature
    assert fb.explain(net, "ibm2020", (2, 3, 8, 8)).chains == before and net.feature is kept


def test_a_layer_put_in_after_conversion_is_not_explained_as_converted():
    net = fb.convert(Remembers(), "ibm2020")
    whole = fb.explain(net, "ibm2020", (2, 3, 8, 8))
    net.second = nn.Conv2d(8, 8, 3)
    found = fb.explain(net, "ibm2020", (2, 3, 8, 8))
    layer = next(layer for layer in found.layers if layer.name == "second")
    assert layer.spec is None and "put in after the model was converted" in str(found)
    assert whole.shares()["4 x 4"] > 0.5 and "4 x 4" not in found.shares()


def test_what_is_no_module_is_refused():
    with pytest.raises(UserError, match=r"the model is of type NoneType, but must be a torch\.nn\.Module"):
        fb.convert(None, "ibm2020")
