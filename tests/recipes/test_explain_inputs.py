"""What `explain` takes as an input: tensors, tuples, dictionaries, any arguments; and nothing, of models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.cli import main

BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 48}
WHISPER = {**BART, "vocab_size": 48, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}


def built(name: str, auto: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"AutoModel{auto}").from_config(transformers.AutoConfig.for_model(name, **options))


class Mixed(nn.Module):
    """Takes a dictionary, a list and a number by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, images: dict[str, torch.Tensor], others: list[torch.Tensor], factor: float = 1.0) -> torch.Tensor:
        return self.b(self.a(images["x"]) * factor + others[0])


def test_arguments_of_any_kind_are_passed_as_they_are():
    x = torch.randn(3, 8)
    by_place, by_name = ({"x": x}, [x], 2.0), {"images": {"x": x}, "others": [x], "factor": 2.0}
    found = [fb.explain(Mixed(), "mxfp4", batch).num_macs for batch in (by_place, by_name)]
    assert found[0] == found[1] == 3 * 64 * 5  # the first layer needs no dgrad
    with pytest.raises(fb.UserError, match=r"input of shape \{'x': \(3, 7\)\}, \[\(3, 7\)\]"):
        fb.explain(Mixed(), "mxfp4", ({"x": x[:, 1:]}, [x[:, 1:]]))
    with pytest.raises(fb.UserError, match="must be a batch"):
        fb.explain(Mixed(), "mxfp4", ({"x": 1}, [2]))
    assert not fb.explain(Mixed(), "mxfp4").num_macs  # says nothing of its inputs: not run


@pytest.mark.parametrize(
    ("name", "auto", "options"),
    [
        ("whisper", "ForSpeechSeq2Seq", WHISPER),
        ("deberta", "ForMaskedLM", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("vit", "ForImageClassification", VISION),
        (
            "t5",
            "ForSeq2SeqLM",
            {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64, "vocab_size": 48},
        ),
        ("pegasus", "ForSeq2SeqLM", {**BART, "vocab_size": 48}),
        ("siglip", "", {"text_config": TEXT, "vision_config": VISION}),
        ("audio-spectrogram-transformer", "ForAudioClassification", {**TEXT, "max_length": 64, "num_mel_bins": 32}),
        ("videomae", "ForVideoClassification", {**VISION, "num_frames": 4}),
    ],
)
def test_models_of_transformers_are_explained_without_data(name, auto, options):
    model = built(name, auto, **options)
    explanation = fb.explain(model, "ibm2020")
    layers = [layer for layer in explanation.layers if layer.spec is not None]
    assert layers and all(layer.num_macs for layer in layers) and explanation.uncounted == ()
    assert fb.explain(model.to(torch.bfloat16), "ibm2020").num_macs == explanation.num_macs


def test_a_model_that_does_not_run_on_its_dummy_inputs_is_explained_without_counts():
    model = built("gpt2", "ForCausalLM", n_embd=32, n_layer=1, n_head=2, vocab_size=4)  # its dummy tokens go up to 7
    text = str(fb.explain(model, "ibm2020"))
    assert "does not run on its dummy_inputs of shape input_ids=(3, 5)" in text and "give a batch as input" in text
    assert fb.explain(model, "ibm2020", {"input_ids": torch.ones(1, 4, dtype=torch.int64)}).num_macs


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("hf:whisper?" + "&".join(f"{key}={value}" for key, value in WHISPER.items()), "model.encoder.conv1"),
        ("hf:deberta?" + "&".join(f"{key}={value}" for key, value in TEXT.items()), "attention.self.in_proj"),
    ],
)
def test_the_command_explains_networks_that_it_cannot_train(model, layers, capsys):
    pytest.importorskip("transformers")
    assert main(["explain", "--model", model, "--recipe", "ibm2020"]) == 0
    found = capsys.readouterr().out
    assert layers in found and "MACs of a training step" in found
    assert main(["explain", "--model", model, "--recipe", "ibm2020", "--input", "3x32x32"]) == 2
    assert main(["explain", "--model", "hf:nothing-like-it", "--recipe", "ibm2020"]) == 2
