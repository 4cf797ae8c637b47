"""Every recipe on a small Llama of transformers: it converts, is explained, and the loss falls over three steps."""

from __future__ import annotations

import pytest
import torch

import fourbit as fb
from fourbit import UserError

transformers = pytest.importorskip("transformers", reason="pip install transformers")

IMAGES_ONLY = [name for name in fb.recipes.names() if "1x1fp8" in name or "3x3fp8" in name]
"""Their rules name convolutions; on other networks they are refused."""


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in fb.recipes.names() if name not in IMAGES_ONLY])
def test_every_recipe_explains_a_llama_and_its_loss_falls(name):
    model = llama()
    ids = torch.randint(0, 128, (4, 32))
    explanation = fb.explain(model, name, {"input_ids": ids})
    recipe = fb.recipes.get(name)
    quantized = [layer for layer in explanation.layers if layer.spec is not None]
    assert quantized or all(rule.spec is None for rule in recipe.rules)
    assert all(layer.num_macs for layer in quantized) and name in str(explanation)
    fb.convert(model, name)
    optimizer = torch.optim.Adam(fb.param_groups(model), lr=3e-3)
    scheduler, scaler = fb.scheduler(model, name, 1000), fb.loss_scaler(model)
    if scheduler:
        scheduler.attach(optimizer)
    losses = []
    for step in range(4):
        if scheduler:
            scheduler.at(step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler is None or scaler.unscale_(optimizer):
            optimizer.step()
        if scaler:
            scaler.update()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2] > losses[3], losses


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES_ONLY)
def test_recipes_for_convolutions_are_refused_in_a_sentence(name):
    with pytest.raises(UserError, match="matches no layer of this model"):
        fb.convert(llama(), name)
