"""The operands that `fourbit.hardware` measures the energy of switching with: dot products of one layer of a real run.

    python benchmarks/operand_trace.py runs/resnet20-ibm2020 --layer stages.1.1.conv1.0 --data-dir data/cifar10

The run must be one of CIFAR-10 with the recipe ibm2020 and a checkpoint. Its layer meets one batch of the test images; of its
input, its weight and the gradient of its output, some dot products of each GEMM are stored as FP16 1-6-9, with the layer's
scales (GradScale is in the gradients), in `src/fourbit/hardware/data/trace.json`.
"""

from __future__ import annotations

import argparse
import base64
import json
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

from fourbit.hardware import FLOATS
from fourbit.train import load

DOTS, LENGTH = 8, 288
"""Dot products of each GEMM, and their length."""


def _encode(numbers: torch.Tensor) -> str:
    fp16 = FLOATS["fp16_169"]
    codes = [fp16.encode(Fraction(float(x))) for x in numbers.flatten()[:LENGTH]]
    return base64.b64encode(b"".join(code.to_bytes(2, "little") for code in codes)).decode()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--layer", default="stages.1.1.conv1.0")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("src/fourbit/hardware/data/trace.json"))
    options = parser.parse_args()
    trained = load(options.run, data_dir=options.data_dir, fuse=False)
    model = trained.model.train()
    layer = model.get_submodule(options.layer)
    kept: dict[str, torch.Tensor] = {}

    def forward(module, inputs, output):
        kept["x"] = inputs[0].detach()
        output.register_hook(lambda g: kept.__setitem__("g", g.detach()))

    layer.register_forward_hook(forward)
    images, labels = next(iter(trained.task.batches("test")))
    F.cross_entropy(model(images), labels).backward()
    x, g, w = kept["x"], kept["g"], layer.weight.detach()
    scale = 2.0 ** int(layer.quant.g_exponent.max())
    g = g * scale  # as it comes to the products, and in FP16 as with a loss scale
    padding, size = layer.padding, layer.kernel_size
    patches = F.unfold(x, size, padding=padding)  # [N, in * 9, pixels]
    gradients = F.unfold(g, size, padding=padding)
    back = w.flip(2, 3).transpose(0, 1).flatten(1)  # [in, out * 9]
    generator = torch.Generator().manual_seed(0)

    def pick(n: int) -> list[int]:
        return torch.randint(n, (DOTS,), generator=generator).tolist()

    images_, pixels, rows = pick(len(x)), pick(patches.shape[2]), pick(len(w))
    fprop = [(patches[i, :, p], w[r].flatten()) for i, p, r in zip(images_, pixels, rows, strict=True)]
    columns = pick(w.shape[1])
    dgrad = [(back[c], gradients[i, :, p]) for c, i, p in zip(columns, images_, pixels, strict=True)]
    wgrad = [(x[i:, c].flatten(), g[i:, r].flatten()) for i, c, r in zip(images_, columns, rows, strict=True)]
    quant, weights = layer.quant, layer.spec.w_fprop
    c1, c2 = weights.scaling.coefficients(weights.format)
    alpha = c1 * w.square().mean().sqrt() - c2 * w.abs().mean()
    scales = {
        "x": 15 / float(quant.x_alpha.detach()),
        "w": 7 / float(alpha),
        "g": 1.0,
    }
    products = {
        name: [kinds, [[_encode(a), _encode(b)] for a, b in pairs]]
        for name, kinds, pairs in (("fprop", "xw", fprop), ("dgrad", "wg", dgrad), ("wgrad", "xg", wgrad))
    }
    config = trained.config
    run = f"{config.model}, {config.recipe}, {config.data}, {config.epochs} epochs, seed {config.seed}"
    source = f"{run}, layer {options.layer}"
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({"source": source, "scales": scales, "products": products}, indent=1) + "\n")
    print(options.out, scales)


if __name__ == "__main__":
    main()
