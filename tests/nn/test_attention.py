"""MultiheadAttention and torch's Transformer layers: torch's own numbers without quantization, and whole layers in 4 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit.ops import LayerSpec
from fourbit.quantizers import ClipValue, QuantSpec
from fourbit.recipes import catalog

VARIANTS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 5, "vdim": 6},
]


def masks(kind: str | None, num_queries: int, num_keys: int) -> torch.Tensor | None:
    if kind is None:
        return None
    if kind == "bool":
        hidden = torch.rand(num_queries, num_keys) > 0.7
        hidden[:, 0] = False
        return hidden
    return torch.randn(num_queries, num_keys) if kind == "float" else torch.randn(6, num_queries, num_keys)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("kind", [None, "float", "bool", "per head"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_without_quantization_every_number_is_torchs(options, kind, padded, need_weights, monkeypatch):
    monkeypatch.setattr(fb.nn.MultiheadAttention, "_quantized", lambda self: True)
    torch.manual_seed(0)
    ours, theirs = (cls(8, 2, **options).double() for cls in (fb.nn.MultiheadAttention, nn.MultiheadAttention))
    theirs.load_state_dict(ours.state_dict())
    q = torch.randn(4, 3, 8).double()
    k, v = (torch.randn(7, 3, options.get(n, 8)).double() for n in ("kdim", "vdim"))
    if options.get("batch_first"):
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    mask = masks(kind, 4, 7)
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    padding = torch.arange(7) >= torch.tensor([[7], [4], [6]]) if padded else None
    found = []
    for attention in (ours, theirs):
        x = q.clone().requires_grad_()
        y, weights = attention(x, k, v, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
        y.sin().sum().backward()
        found.append([y, x.grad, *(p.grad for p in attention.parameters()), *([] if weights is None else [weights])])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_unbatched_input_and_weights_per_head_are_as_torchs(monkeypatch):
    monkeypatch.setattr(fb.nn.MultiheadAttention, "_quantized", lambda self: True)
    ours, theirs = fb.nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 8)
    for a, b in zip(
        ours(x, x, x, average_attn_weights=False), theirs(x, x, x, average_attn_weights=False), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [None, "float", "bool"])
def test_scaled_dot_product_attention_is_torchs_without_quantization(causal, kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 5)
    mask = masks(kind, 4, 7)
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # here True is what is seen
    none = LayerSpec()
    y, p = fb.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scores=none, values=none)
    seen = torch.ones(4, 7, dtype=torch.bool).tril() if causal else torch.ones(4, 7, dtype=torch.bool)
    both = seen if mask is None else mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, both))
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, 4))


FIXED = LayerSpec(
    x_fprop=QuantSpec("int4_sym", ClipValue(init=2.0)), w_fprop=QuantSpec("int4_sym", ClipValue(init=0.5))
)


def test_projections_and_products_are_those_of_quantized_layers():
    torch.manual_seed(0)
    layer = fb.nn.MultiheadAttention(8, 2, spec=FIXED)
    products = replace(FIXED, w_fprop=QuantSpec("int4_sym", ClipValue(init=2.0)))
    layer.attach("scores", products)
    layer.attach("values", products)
    x = torch.randn(5, 3, 8)
    weights = layer.in_proj_weight.chunk(3)
    q, k, v = (
        fb.nn.functional.linear(x, w, b, FIXED) for w, b in zip(weights, layer.in_proj_bias.chunk(3), strict=True)
    )
    heads = [t.view(5, 3, 2, 4).permute(1, 2, 0, 3) for t in (q, k, v)]
    p = (fb.nn.functional.matmul(heads[0], heads[1].mT, products) / 2).softmax(-1)
    y = fb.nn.functional.matmul(p, heads[2], products).permute(2, 0, 1, 3).reshape(5, 3, 8)
    expected = fb.nn.functional.linear(y, layer.out_proj.weight, layer.out_proj.bias, FIXED)
    torch.testing.assert_close(layer(x, x, x)[0], expected)


class Translation(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.transformer = nn.Transformer(32, 2, 1, 1, 64, 0.0, batch_first=True)
        self.out = nn.Linear(32, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        e = self.embed(x)
        return self.out(self.transformer(e, e.roll(1, 1), tgt_mask=mask, tgt_is_causal=True))


def test_parts_of_a_transformer_are_layers_of_the_recipe():
    model = Translation()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randint(0, 20, (3, 6))
    layers = {layer.name: layer for layer in fb.explain(model, "ibm2020", x).layers}
    attention = "transformer.encoder.layers.0.self_attn"
    assert {f"{attention}.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")} <= set(layers)
    assert f"{attention}.scores" not in layers
    assert [n for n, layer in layers.items() if layer.rule != "4-bit"] == ["out"]
    macs = 3 * 6 * 32 * 32
    assert layers[f"{attention}.q_proj"].num_macs == dict.fromkeys(("fprop", "dgrad", "wgrad"), macs)
    assert layers[f"{attention}.out_proj"].num_macs == dict.fromkeys(("fprop", "dgrad", "wgrad"), macs)
    assert layers["transformer.decoder.layers.0.linear1"].num_macs["fprop"] == 3 * 6 * 32 * 64
    named = {layer.name: layer for layer in fb.explain(model, "ibm2020-attention", x).layers}
    assert (
        named[f"{attention}.scores"].rule == "attention"
        and named[f"{attention}.scores"].num_macs["fprop"] == 3 * 6 * 6 * 32
    )
    fb.convert(model, "ibm2020-attention")
    assert type(model.transformer.encoder.layers[0].self_attn) is fb.nn.MultiheadAttention
    assert fb.nn.float_state_dict(model).keys() == before.keys()
    fb.restore(model)
    assert type(model.transformer.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


LONG = ("ibm2020", "int4-fwd", "ibm2020-dw8")


@pytest.mark.parametrize(
    "recipe", ["ibm2020-attention", "luq", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]
)
def test_a_transformer_learns_in_4_bits(recipe):
    torch.manual_seed(0)
    model = fb.convert(Translation(), recipe)
    x = torch.randint(0, 20, (6, 8))
    optimizer = torch.optim.Adam(fb.param_groups(model), lr=3e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.5  # half of what guessing gives, ln 20


def test_evaluation_does_not_take_torchs_fast_path_around_the_quantizers():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
    x = torch.randn(3, 6, 32)
    fb.convert(encoder, fb.Recipe("x", (fb.Rule(catalog.TPR, types=(nn.MultiheadAttention,)),)))
    y = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), y)
    fb.restore(encoder)
    with torch.no_grad():
        assert not torch.allclose(encoder(x), y)


def test_an_encoder_with_padding_runs_in_evaluation_and_gets_its_own_ways_back():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
    before = encoder.use_nested_tensor
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fb.convert(encoder, "ibm2020")
    y = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding)[~padding], y[~padding])
    assert fb.restore(encoder).use_nested_tensor == before


def test_only_the_projection_behind_attention_can_be_quantized():
    encoder = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
    fb.convert(encoder, fb.Recipe("x", (fb.Rule(catalog.TPR, where=fb.recipes.name("out_proj")),)))
    encoder(torch.randn(3, 6, 32)).sum().backward()
    assert set(fb.quantized_layers(encoder)) >= {"self_attn.out_proj"}
    assert int(encoder.self_attn.out_proj.quant.g_exponent) > -100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 3, 7),) * 3, r"input of shape \(4, 3, 7\), but needs 8 elements on axis -1"),
        ((torch.zeros(4, 3, 8), torch.zeros(4, 8), torch.zeros(4, 8)), "needs 3 axes each, or 2"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(fb.UserError, match=message):
        fb.nn.MultiheadAttention(8, 2, spec=FIXED)(*arguments)
    with pytest.raises(fb.UserError, match="needs attn_mask"):
        fb.nn.MultiheadAttention(8, 2, spec=FIXED)(*(torch.zeros(4, 3, 8),) * 3, is_causal=True)
