"""A small network in Lightning's Trainer, in 4 bits.

python examples/lightning_module.py ibm2020
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit.integrations.lightning import FourBit


class Spiral(pl.LightningModule):
    """Two arms, told apart by three layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(fb.param_groups(self, weight_decay=1e-4), lr=3e-3)


pl.seed_everything(0)
turn = torch.rand(1024) * 6
arm = torch.randint(0, 2, (1024,))
x = torch.stack((turn * torch.cos(turn + 3.1416 * arm), turn * torch.sin(turn + 3.1416 * arm)), 1) / 3
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, arm), batch_size=64, shuffle=True)

recipe = sys.argv[1] if len(sys.argv) > 1 else "ibm2020"
trainer = pl.Trainer(
    max_epochs=30, callbacks=[FourBit(recipe)], logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Spiral(), data, data)
print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
