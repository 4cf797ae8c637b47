"""The networks of the benchmarks, each with its data: the product's own, a perceptron, a small GPT, and two LSTM layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit import models
from fourbit.models._resnet import BasicBlock, ResNet


@dataclass(frozen=True)
class Network:
    """A network and what it is trained on.

    Args:
        batch: the usual batch size.
        data: random inputs and targets for a batch size.
        images: whether the inputs are images, so that channels_last means something.
    """

    name: str
    title: str
    batch: int
    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    images: bool = True


def _images(size: int = 32) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,)))


def resnet20(width: int = 16) -> Network:
    """ResNet-20 for CIFAR with `width` channels in its first stage (16 as published)."""
    return Network(
        "resnet20",
        "ResNet-20" if width == 16 else f"ResNet-20, width {width}",
        128,
        lambda: ResNet(BasicBlock, (3, 3, 3), (width, 2 * width, 4 * width), "A", 10, 3),
        _images(),
    )


def mlp(width: int = 4096) -> Network:
    """Linear 1024 - width - width - width - 1024 with ReLU."""

    def build() -> nn.Module:
        sizes = [1024, width, width, width, 1024]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    title = f"MLP 1024-{width}x3-1024"
    return Network("mlp", title, 256, build, lambda n: (torch.randn(n, 1024), torch.randint(0, 1024, (n,))), False)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); causal attention in torch's fused kernel, unquantized for everybody."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Characters in, characters out: embedding, positions, blocks, LayerNorm, a linear head."""

    def __init__(self, width: int, depth: int, length: int, vocabulary: int = 256):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def gpt(width: int = 512, depth: int = 4, length: int = 128) -> Network:
    """A decoder of `depth` blocks; 16 sequences of 128 characters make 2,048 tokens."""

    def data(batch: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 256, (batch, length + 1))
        return tokens[:, :-1], tokens[:, 1:]

    return Network(
        "gpt",
        f"GPT, {depth} layers, d {width}, {length} tokens",
        16,
        lambda: Gpt(width, depth, length),
        data,
        False,
    )


class Characters(nn.Module):
    """Embedding, two LSTM layers, a linear head: [time, batch] to logits."""

    def __init__(self, width: int, vocabulary: int = 256):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def lstm(width: int = 650, length: int = 35) -> Network:
    """Two LSTM layers in the size of the medium model of the Penn Treebank."""

    def data(batch: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 256, (length + 1, batch))
        return tokens[:-1], tokens[1:]

    return Network("lstm", f"LSTM 2x{width}, {length} steps", 20, lambda: Characters(width), data, False)


def _model(name: str, title: str, batch: int, image_size: int = 32) -> Callable[[], Network]:
    build = lambda: models.build(name, num_classes=10, image_size=image_size)  # noqa: E731
    return lambda: Network(name, title, batch, build, _images(image_size))


NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet20": resnet20,
    "resnet18": _model("resnet18", "ResNet-18, CIFAR stem", 64),
    "mobilenet_v2": _model("mobilenet_v2", "MobileNetV2, CIFAR", 64),
    "mlp": mlp,
    "gpt": gpt,
    "lstm": lstm,
    "digits_cnn": _model("digits_cnn", "small CNN on 8x8 images", 64, 8),
}
"""By name; resnet20, mlp, gpt and lstm take a width."""


def get(name: str, width: int | None = None) -> Network:
    """The network of that name."""
    return NETWORKS[name]() if width is None else NETWORKS[name](width)
