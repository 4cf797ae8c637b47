"""Networks of transformers by name; of timm and torchvision where they can be imported."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import fourbit as fb
from fourbit import models
from fourbit.errors import UserError
from fourbit.models import _hf
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


MASKED = [
    "hf:distilbert?n_layers=1&dim=32&n_heads=2&hidden_dim=64",
    f"hf:albert?{SMALL}&intermediate_size=64&embedding_size=16",
]
TRANSFORMER = "d_model=32&encoder_layers=1&decoder_layers=1&encoder_attention_heads=2&decoder_attention_heads=2"
T5 = "hf:t5?num_layers=1&d_model=32&num_heads=2&d_kv=16&d_ff=64"
TRANSLATORS = [T5, *(f"hf:{name}?{TRANSFORMER}" for name in ("bart", "marian", "m2m_100"))]


@pytest.mark.parametrize("name", [GPT2, BERT, *OTHERS, *MASKED, f"hf:bart?is_encoder_decoder=false&{TRANSFORMER}"])
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


@pytest.mark.parametrize("name", TRANSLATORS)
def test_translators_have_our_interface_and_see_neither_later_tokens_nor_padding(name):
    assert models.kind_of(name) == "translation"
    torch.manual_seed(0)
    model = models.build(name, num_classes=50).eval()
    source, target = torch.randint(3, 50, (7, 4)), torch.randint(3, 50, (5, 4))
    source[5:, 2] = 0
    with torch.no_grad():
        logits = model(source, target)
        changed = model(source, torch.cat((target[:3], target[3:].flip(0))))
        alone = model(source[:5, 2:3], target[:, 2:3])
    assert logits.shape == (5, 4, 50)
    assert torch.allclose(logits[:3], changed[:3], atol=1e-5) and not torch.allclose(logits, changed, atol=1e-3)
    assert torch.allclose(logits[:, 2:3], alone, atol=1e-5)
    for beam_size in (1, 3):
        found = model.translate(source, beam_size)
        assert found.shape[1] == 4 and len(found) <= 24 and found[0].min() > 1
    assert len(model.translate(source, longest=2)) <= 2


def test_t5_learns_to_copy_in_four_bits():
    torch.manual_seed(0)
    model = models.build(T5 + "&dropout_rate=0", num_classes=8)
    fb.convert(model, "ibm2020")
    optimizer = torch.optim.Adam(fb.param_groups(model, 0.0), lr=1e-2)
    words = torch.randint(3, 8, (1, 64))
    source = torch.cat((words, torch.full_like(words, 2)))
    losses = []
    for _ in range(60):
        logits = model(source, torch.cat((torch.ones_like(words), words)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), source.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    found = model.eval().translate(source)
    assert found.shape == source.shape and (found == source).float().mean() > 0.8


@pytest.mark.parametrize("name", [BERT, *OTHERS, MASKED[0]])
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
    with pytest.raises(UserError, match="sees the tokens that it is to predict"):
        _hf._require_causal(lambda tokens: tokens.flip(0).unsqueeze(-1).expand(-1, -1, 9), looked_at, "x", 9)


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
        (
            "hf:wav2vec2",
            "hf:wav2vec2 .* is no language model .*: choose a type that is, or for speech our bilstm_speech",
        ),
        (f"hf:convbert?{SMALL}&intermediate_size=64", "sees the tokens that it is to predict: choose another model"),
        (f"hf:deberta?{SMALL}&intermediate_size=64", "cannot read text as rows of tokens"),
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


class Sized(torch.nn.Module):
    """Reads images of one size, as a vision transformer does."""

    def __init__(self, num_classes: int, size: int):
        super().__init__()
        self.size, self.classifier = size, torch.nn.LazyLinear(num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-1] == self.size, f"Input height ({images.shape[-1]}) doesn't match model ({self.size})."
        return self.classifier(images.flatten(1))


def fake_timm(name: str, num_classes: int, in_chans: int, **options):
    if name == "vit":
        return Sized(num_classes, options.pop("img_size", 224))
    if options:
        raise TypeError(f"Net.__init__() got an unexpected keyword argument '{next(iter(options))}'")
    if name == "resnet":
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))
    if name == "fixed":
        return Sized(num_classes, 224)
    raise RuntimeError(f"Unknown model ({name})")


class Heads(torch.nn.Module):
    """Logits and auxiliary ones in training, as GoogLeNet gives; or a map of classes, as networks for segmentation give."""

    def __init__(self, num_classes: int, aux_logits: bool = True, segments: bool = False):
        super().__init__()
        self.classifier, self.aux_logits, self.segments = torch.nn.LazyLinear(num_classes), aux_logits, segments

    def forward(self, images: torch.Tensor):
        y = self.classifier(images.flatten(1))
        if self.segments:
            return {"out": y}
        return (y, y) if self.training and self.aux_logits else y


def fake_torchvision(name: str, weights: None, num_classes: int, **options):
    def fcn(num_classes: int, weights_backbone: str | None = "pretrained"):
        assert weights_backbone is None, "this would download weights"
        return Heads(num_classes, segments=True)

    def vit(num_classes: int, image_size: int = 224):
        return Sized(num_classes, image_size)

    def googlenet(num_classes: int, aux_logits: bool = True):
        return Heads(num_classes, aux_logits)

    return {"fcn": fcn, "vit": vit, "googlenet": googlenet}[name](num_classes, **options)


@pytest.fixture
def _fake_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=fake_timm))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=SimpleNamespace(get_model=fake_torchvision)))


@pytest.mark.usefixtures("_fake_libraries")
@pytest.mark.parametrize("name", ["timm:vit", "timm:resnet", "torchvision:vit", "torchvision:googlenet"])
def test_networks_take_the_size_of_the_data_and_give_logits_alone_in_training(name):
    model = models.build(name, num_classes=7, image_size=32)
    assert model.training
    assert model(torch.zeros(5, 3, 32, 32)).shape == (5, 7)


@pytest.mark.usefixtures("_fake_libraries")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "timm:fixed",
            r"^timm:fixed cannot read images of 3x32x32 \(Input height \(32\) doesn't match model \(224\)\): choose another",
        ),
        (
            "torchvision:fcn",
            r"^torchvision:fcn gives dict for 2 images, but logits \[2, 7\] are needed: choose a network",
        ),
        ("timm:nothing", r"timm cannot build nothing .*: choose another of timm.list_models\(\)"),
    ],
)
def test_networks_that_cannot_take_the_images_are_named(name, message):
    with pytest.raises(UserError, match=message):
        models.build(name, num_classes=7, image_size=32)


def test_the_linear_layer_of_falcon_is_converted_and_computes_the_same():
    config = transformers.FalconConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, tokens = transformers.FalconForCausalLM(config).eval(), torch.arange(12).view(2, 6)
    before, cls = model(tokens).logits, type(model.transformer.h[0].mlp.dense_h_to_4h)
    assert torch.equal(fb.convert(model, "fp32")(tokens).logits, before)
    fb.convert(
        fb.restore(model), fb.Recipe("w8", (fb.Rule(fb.LayerSpec(w_fprop=fb.QuantSpec("int8_sym", fb.Amax()))),))
    )
    assert "transformer.h.0.mlp.dense_h_to_4h" in fb.quantized_layers(model)
    assert 0 < (model(tokens).logits - before).norm() / before.norm() < 0.05
    assert type(fb.restore(model).transformer.h[0].mlp.dense_h_to_4h) is cls


def test_experts_that_are_no_layers_are_named_by_explain():
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model, tokens = transformers.MixtralForCausalLM(config), torch.arange(12).view(2, 6)
    explanation = fb.explain(model, "ibm2020", {"input_ids": tokens})
    whole = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name)
    assert sum(m.numel for m in explanation.matrices) == whole
    experts = [part for part in (*explanation.layers, *explanation.calls) if "experts" in part.name]
    macs = 12 * config.num_experts_per_tok * 3 * 16 * 32
    assert sum(part.num_macs["fprop"] for part in experts) == macs
    attention = [call for call in explanation.calls if call.operation == "scaled_dot_product_attention"]
    assert [call.num_macs["fprop"] for call in attention] == [2 * 2 * 2 * 6 * 6 * 8]
