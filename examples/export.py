"""Out of training: digits in 4 bits, exported to ONNX, and the same digits through onnxruntime; about ten seconds on a laptop.

python examples/export.py served
"""

from __future__ import annotations

import argparse

import onnxruntime
import torch
import torch.nn.functional as F

import fourbit as fb
from fourbit import data, models

parser = argparse.ArgumentParser(description="Digits in 4 bits, exported to ONNX.")
parser.add_argument("folder", help="of the export, new or empty")
folder = parser.parse_args().folder
digits = data.load("digits")
shape = (digits.channels, digits.image_size, digits.image_size)
torch.manual_seed(0)
model = models.build("digits_cnn", num_classes=digits.num_classes, in_channels=shape[0], image_size=shape[1])
fb.convert(model, "int4-fwd")
optimizer = torch.optim.SGD(fb.param_groups(model, weight_decay=1e-4), lr=0.05, momentum=0.9)
for epoch in range(4):
    for x, y in data.batches(digits, "train", 64, seed=0, epoch=epoch):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

served = fb.export(model, folder, to="onnx", input_shape=shape, recipe="int4-fwd")
session = onnxruntime.InferenceSession(served / "model.onnx")
model.eval()
hits, far = torch.zeros(2, dtype=torch.int64), 0.0
for x, y in data.batches(digits, "test", 120, seed=0, epoch=0):
    with torch.no_grad():
        mine = model(x)
    theirs = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    hits += torch.stack([(mine.argmax(1) == y).sum(), (theirs.argmax(1) == y).sum()])
    far = max(far, float((mine - theirs).abs().max() / mine.abs().max()))
ours, exported = (f"{int(n) / len(digits.test_y):.2%}" for n in hits)
print(f"test accuracy of the model {ours}, of the export {exported}; logits differ by {far:.1e} of the largest")
