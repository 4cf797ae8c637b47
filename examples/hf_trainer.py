"""A small GPT-2 in transformers' Trainer, in 4 bits, and back from its folder.

python examples/hf_trainer.py ibm2020
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from fourbit.integrations.transformers import FourBitTrainer

recipe = sys.argv[1] if len(sys.argv) > 1 else "ibm2020"
folder = tempfile.mkdtemp()

torch.manual_seed(0)
config = AutoConfig.for_model(
    "gpt2", vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
)
text = torch.arange(4096) * 7 % 61 + 1  # a sequence that can be learned
rows = [{"input_ids": piece, "labels": piece} for piece in text.split(32)]

arguments = TrainingArguments(
    folder,
    max_steps=40,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    logging_steps=10,
    save_steps=20,
    report_to=[],
)
trainer = FourBitTrainer(AutoModelForCausalLM.from_config(config), arguments, train_dataset=rows, recipe=recipe)
trainer.train()

model = AutoModelForCausalLM.from_pretrained(f"{folder}/checkpoint-40")  # converted, as it was trained
batch = torch.stack([row["input_ids"] for row in rows[:8]])
mine, loaded = (m.cpu().eval()(input_ids=batch, labels=batch).loss.item() for m in (trainer.model, model))
print(f"loss of the trained model {mine:.4f}, of the loaded one {loaded:.4f}")
