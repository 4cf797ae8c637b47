"""LoRA of PEFT on a converted model, and a converted model with LoRA."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fourbit as fb  # noqa: E402

IDS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("llama", vocab_size=64, num_key_value_heads=4, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def adapted(model):
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_lora_trains_in_both_orders_and_merges(first):
    model = adapted(fb.convert(llama(), "ibm2020")) if first == "convert" else fb.convert(adapted(llama()), "ibm2020")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    adapters = [p for n, p in model.named_parameters() if "lora" in n]
    if first == "convert":  # what is frozen stays frozen, its clip values with it
        assert all("lora" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05 and all(p.abs().sum() > 0 for p in adapters)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("q_proj.base_layer.weight")}
    ((name, weight),) = frozen.items()
    layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
    delta = layer.get_delta_weight("default").detach()
    merged = model.merge_and_unload()
    found = next(m for n, m in merged.named_modules() if n.endswith("q_proj"))
    assert isinstance(found, fb.nn.Linear)
    torch.testing.assert_close(found.weight.detach(), weight + delta)
    assert merged(input_ids=IDS).logits.isfinite().all()
