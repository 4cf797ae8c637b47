"""Four bits in a training loop of one's own: digits, a small network, about ten seconds on a laptop.

python examples/own_loop.py            # ibm2020
python examples/own_loop.py luq
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import fourbit as fb
from fourbit import data, models, recipes

parser = argparse.ArgumentParser(description="Four bits in a training loop of one's own.")
parser.add_argument("recipe", nargs="?", default="ibm2020", choices=recipes.names(), metavar="recipe")
recipe = parser.parse_args().recipe
digits = data.load("digits")
torch.manual_seed(0)
model = models.build(
    "digits_cnn", num_classes=digits.num_classes, in_channels=digits.channels, image_size=digits.image_size
)
print(fb.explain(model, recipe, (1, digits.channels, digits.image_size, digits.image_size)))

fb.convert(model, recipe)
optimizer = torch.optim.SGD(fb.param_groups(model, weight_decay=1e-4), lr=0.05, momentum=0.9)
for epoch in range(6):
    model.train()
    for x, y in data.batches(digits, "train", 64, seed=0, epoch=epoch):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.batches(digits, "test", 360, seed=0, epoch=0))
    print(f"epoch {epoch + 1}: last loss {loss.item():.3f}, test accuracy {hits / len(digits.test_y):.2%}")
