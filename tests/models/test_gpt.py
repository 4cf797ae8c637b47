"""The decoder-only Transformer: size, positions, no look ahead, tied weights, options in its name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fourbit as fb
from fourbit import models
from fourbit.errors import UserError
from fourbit.models import Gpt
from fourbit.models._gpt import rotary_turns, turned

SMALL = "gpt?width=64&depth=2&heads=2&context=16"


def small(seed: int = 0, name: str = SMALL) -> Gpt:
    torch.manual_seed(seed)
    found = models.build(name, num_classes=50)
    assert isinstance(found, Gpt)
    return found.eval()


def test_the_default_network_has_three_million_parameters_besides_the_embedding():
    with torch.device("meta"):
        model = models.build("gpt", num_classes=1000)
    d, hidden = 256, 704  # 8/3 of 256 is 682.7
    assert sum(p.numel() for p in model.parameters()) - 1000 * d == 4 * (4 * d * d + 3 * d * hidden + 2 * d) + d
    assert sum(p.numel() for p in model.parameters()) - 1000 * d == 3_213_568


def test_logits_have_the_shape_of_language_models():
    logits, state = small()(torch.randint(50, (9, 3)))
    assert logits.shape == (9, 3, 50) and state == ()


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020", "mxfp4-amd"])
def test_no_token_sees_later_ones_or_other_rows(recipe):
    """In 4 bits, too, where scales are learned or of blocks of features; nvfp4's tensor scale is of all tokens."""
    model = fb.convert(small(), recipe)
    tokens = torch.randint(50, (9, 3))
    model.train()(tokens)  # the first batch decides the clip values
    model.eval()
    later, row = tokens.clone(), tokens.clone()
    later[5:] = later[5:].flip(0) + 1 - later[5:] // 49
    row[:, 2] = (row[:, 2] + 1) % 50
    with torch.no_grad():
        logits, changed, other = (model(t)[0] for t in (tokens, later, row))
    assert torch.allclose(logits[:5], changed[:5], atol=1e-5)
    assert torch.allclose(logits[:, :2], other[:, :2], atol=1e-5)
    assert not torch.allclose(logits[5:], changed[5:], atol=0.1)


def test_positions_turn_pairs_as_complex_numbers():
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    rates = torch.tensor([10_000 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    angles = torch.arange(7, dtype=torch.float64).unsqueeze(1) * rates
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    found = turned(x, rotary_turns(7, 8))
    torch.testing.assert_close(found, torch.cat((expected.real, expected.imag), -1), atol=1e-6, rtol=0)


def test_attention_depends_on_distances_alone():
    q, k = torch.randn(2, 8), torch.randn(2, 8)
    turns = rotary_turns(20, 8)
    at = [turned(t[0].expand(20, 8), turns) for t in (q, k)]
    scores = at[0] @ at[1].T
    torch.testing.assert_close(scores[3, 1], scores[17, 15])
    assert not torch.allclose(scores[3, 1], scores[3, 2])


def test_the_network_equals_the_equations_written_out():
    """One row, token by token, against a second implementation without fused products, views or torch's attention."""
    model = small(name="gpt?width=64&depth=1&heads=2&context=16")
    tokens = torch.randint(50, (5, 1))
    block, x = model.blocks[0], model.embedding.weight[tokens[:, 0]]

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    q, k, v = (norm(x, block.attention_norm.weight) @ w.T for w in block.qkv.weight.split(64))
    heads = []
    for h in (slice(0, 32), slice(32, 64)):
        angles = torch.arange(5).unsqueeze(1) * 10_000.0 ** (-torch.arange(16) / 16)
        turn = torch.polar(torch.ones_like(angles), angles)
        a, b = (torch.complex(t[:, h][:, :16], t[:, h][:, 16:]) * turn for t in (q, k))
        scores = torch.stack(
            [torch.stack([(a[i] * b[j].conj()).real.sum() / 32**0.5 for j in range(5)]) for i in range(5)]
        )
        scores[torch.arange(5).unsqueeze(1) < torch.arange(5)] = -torch.inf
        heads.append(scores.softmax(-1) @ v[:, h])
    x = x + torch.cat(heads, -1) @ block.proj.weight.T
    gate, up = (norm(x, block.hidden_norm.weight) @ w.T for w in block.gate_up.weight.chunk(2))
    x = x + (gate * gate.sigmoid() * up) @ block.down.weight.T
    expected = norm(x, model.norm.weight) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens)[0][:, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["ibm2020", "nvfp4", "quartet"])
def test_tied_weights_stay_one_tensor_when_the_network_is_converted(recipe):
    model = fb.convert(small(), recipe)
    assert model.classifier.weight is model.embedding.weight
    tokens = torch.randint(50, (9, 3))
    loss = F.cross_entropy(model.train()(tokens)[0].flatten(0, 1), tokens.roll(-1, 0).flatten())
    loss.backward()
    assert model.embedding.weight.grad is not None
    assert sum(p is model.embedding.weight for p in model.parameters()) == 1
    fb.restore(model)
    assert model.classifier.weight is model.embedding.weight
    untied = small(name=f"{SMALL}&tied=false")
    assert untied.classifier.weight is not untied.embedding.weight


def test_bf16_autocast_runs():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = small()(torch.randint(50, (9, 3)))
    assert logits.isfinite().all()


def test_its_name_says_how_much_it_reads():
    assert models.context_of("gpt") == 256 and models.context_of(SMALL) == 16
    assert models.context_of("lstm_200") is None and models.is_recurrent("lstm_200")
    assert not models.is_recurrent(SMALL) and not models.is_recurrent("resnet20")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt?width=100&heads=3", "width of gpt is 100, but 3 heads .* need a multiple of 6: give one, such as 102"),
        ("gpt?depth=0", "depth of gpt is 0, but must be more than 0"),
        ("gpt?heads=0", "heads of gpt is 0, but must be more than 0"),
        ("gpt?widht=64", "unknown option of gpt 'widht': did you mean 'width'"),
        ("gpt?width=wide", "width of gpt is wide, but must be a whole number"),
        ("gpt?tied=1", "tied of gpt is 1, but must be true or false"),
        ("resnet18?depth=3", r"resnet18 has no options: leave out \?depth=3"),
    ],
)
def test_options_that_make_no_network_are_refused_in_one_sentence(name, message):
    with pytest.raises(UserError, match=message) as caught:
        models.build(name, num_classes=10)
    assert "\n" not in str(caught.value)


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="a row has 17 tokens, but this gpt reads 16: cut it"):
        small()(torch.zeros(17, 1, dtype=torch.int64))


def test_llama_of_transformers_is_a_language_model_of_any_size():
    pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = "hidden_size=64&num_hidden_layers=2&num_attention_heads=2&num_key_value_heads=1&intermediate_size=128"
    model = fb.convert(models.build(f"hf:llama?{sizes}&max_position_embeddings=32", num_classes=50), "nvfp4")
    tokens = torch.randint(50, (9, 3))
    logits, state = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert logits.shape == (9, 3, 50) and state == ()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
