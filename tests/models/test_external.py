"""Networks of transformers by name; of timm and torchvision where they can be imported."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import fourbit as fb
from fourbit import models
from fourbit.errors import UserError
from fourbit.models import _external
from fourbit.train import TrainConfig
from fourbit.train._validate import validated

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

GPT2 = "hf:gpt2?n_layer=2&n_embd=32&n_head=2"
BERT = "hf:bert?num_hidden_layers=1&hidden_size=32&num_attention_heads=2&intermediate_size=64"
VIT = "hf:vit?num_hidden_layers=1&hidden_size=32&num_attention_heads=2&intermediate_size=64&patch_size=4"


SMALL = "num_hidden_layers=1&hidden_size=32&num_attention_heads=2"
OTHERS = [
    f"hf:roberta?{SMALL}",
    f"hf:opt?{SMALL}&word_embed_proj_dim=32",
    "hf:xlm?n_layers=1&emb_dim=32&n_heads=2",
    "hf:xlnet?n_layer=1&d_model=32&n_head=2",
]


@pytest.mark.parametrize("name", [GPT2, BERT, *OTHERS])
def test_language_models_have_our_interface_and_see_no_later_token(name):
    assert models.kind_of(name) == "text"
    model = models.build(name, num_classes=50).eval()
    tokens = torch.randint(50, (9, 3))
    with torch.no_grad():
        logits, state = model(tokens, None)
        changed, _ = model(torch.cat((tokens[:5], tokens[5:].flip(0))), state)
    assert logits.shape == (9, 3, 50) and state == ()
    assert torch.allclose(logits[:5], changed[:5], atol=1e-5)
    assert not torch.allclose(logits[5:], changed[5:], atol=1e-3)


@pytest.mark.parametrize("name", [BERT, *OTHERS])
def test_every_token_and_position_is_an_ordinary_one(name):
    """Number 1 or 2 is padding for these models, but a word in our vocabularies."""
    model = models.build(name, num_classes=7)
    tokens = torch.arange(7).repeat(2).unsqueeze(1)
    model(tokens)[0].square().sum().backward()
    embedding = model.model.get_input_embeddings()
    assert (embedding.weight.norm(dim=1) > 0).all() and (embedding.weight.grad.norm(dim=1) > 0).all()
    for key, parameter in model.named_parameters():
        if "position" in key and parameter.dim() == 2:
            used = parameter.grad.norm(dim=1) > 0
            assert used.sum() == 14


def test_a_model_that_sees_what_it_is_to_predict():
    looked_at = torch.nn.Sequential()
    looked_at.config = transformers.GPT2Config()
    looked_at.forward = lambda input_ids, use_cache: SimpleNamespace(logits=input_ids.float().flip(1).unsqueeze(-1))
    with pytest.raises(UserError, match="sees the tokens that it is to predict"):
        _external._require_causal(_external.HfLanguageModel(looked_at), "x", 9)


def test_images_smaller_than_a_patch():
    with pytest.raises(UserError, match=r"patches of 16x16 pixels, but these have 8x8: set a smaller patch"):
        models.build("hf:vit", num_classes=7, in_channels=1, image_size=8)


def test_image_classifiers_take_the_size_of_the_data():
    assert models.kind_of(VIT) == "image"
    model = models.build(VIT, num_classes=7, in_channels=1, image_size=16)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 7)


def test_the_transposed_linear_layer_of_gpt2_is_converted():
    """Its products against those of a Linear layer with the same weight and recipe."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    theirs = torch.nn.Sequential(Conv1D(24, 16), Conv1D(12, 24), Conv1D(4, 12))
    ours = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 12), torch.nn.Linear(12, 4))
    for a, b in zip(theirs, ours, strict=True):
        b.weight.data, b.bias.data = a.weight.data.t().contiguous(), a.bias.data + 0.1
        a.bias.data += 0.1
    fb.convert(theirs, "ibm2020")
    fb.convert(ours, "ibm2020")
    x = torch.randn(40, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = theirs(x), ours(y)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-5)
    for left, right in zip(theirs, ours, strict=True):
        assert torch.allclose(left.weight.grad.t(), right.weight.grad, rtol=1e-5, atol=1e-7)
    macs = [(layer.num_macs or {})["fprop"] for layer in fb.explain(theirs, "ibm2020", (40, 16)).layers]
    assert macs == [40 * 16 * 24, 40 * 24 * 12, 40 * 12 * 4]
    assert type(fb.restore(theirs)[1]) is Conv1D


def test_gpt2_learns_in_four_bits():
    torch.manual_seed(0)
    model = models.build(GPT2 + "&resid_pdrop=0&embd_pdrop=0&attn_pdrop=0", num_classes=8)
    fb.convert(model, "ibm2020")
    optimizer = torch.optim.Adam(fb.param_groups(model, 0.0), lr=3e-3)
    tokens = (torch.arange(17).unsqueeze(1) + torch.arange(8)) % 8
    losses = []
    for _ in range(30):
        logits, _ = model(tokens[:-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_folder_with_a_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}))
    assert models.build(f"hf:{tmp_path}", num_classes=9)(torch.zeros(3, 1, dtype=torch.int64))[0].shape == (3, 1, 9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", "hf: needs the name of a model"),
        ("hf:t5", "hf:t5 .* is neither a causal language model nor an image classifier"),
        ("hf:gpt2?n_heads=2", "unknown value in the configuration of gpt2 'n_heads'"),
        ("hf:gpt2?n_head=5", "cannot be built .* divisible"),
        ("hf:gpt2?n_positions=4&n_layer=1", "a row of 9 tokens is longer than the 4 positions of gpt2"),
        ("nobody:gpt2", "unknown model 'nobody:gpt2'"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UserError, match=message):
        models.build(name, num_classes=50)(torch.zeros(9, 1, dtype=torch.int64))


def test_a_run_folder_can_have_the_name():
    config = validated(TrainConfig(model=GPT2, data="tinyshakespeare"))
    assert str(config.out) == "runs/hf_gpt2_n_layer_2_n_embd_32_n_head_2-tinyshakespeare-ibm2020-seed0"


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18"), ("torchvision", "resnet18")])
def test_other_libraries(library, name):
    try:
        __import__(library)
    except Exception:
        with pytest.raises(UserError, match=f"{library}: names need the package {library}, which cannot be imported"):
            models.build(f"{library}:{name}", num_classes=7)
        return
    model = models.build(f"{library}:{name}", num_classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(UserError, match=f"{library} cannot build nothing"):
        models.build(f"{library}:nothing", num_classes=7)
