"""MobileNetV2: inverted residuals with depthwise convolutions.

Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks" (arXiv 1801.04381, table 2). On 32x32 images the
stem and the second stage keep stride 1, so that three of the five halvings remain (32, 16, 8, 4).

The output of a block is linear (no ReLU), so the expanding 1x1 convolutions see activations of both signs. The shipped
recipes decide the sign layer by layer, from the first training batch: these convolutions get PACT's symmetric form.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.models._base import conv_bn, initialise, register

# (expansion t, output channels c, number of blocks n, stride s of the first block); s of the second row is 2 in the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expand - ReLU6 - 3x3 depthwise - ReLU6 - 1x1 project, plus a shortcut where the stride is 1.

    The paper adds the shortcut only where the number of channels stays the same. The CIFAR variant in common use, built
    here unless `large`, also projects it by a 1x1 convolution where the number changes, and expands by a 1x1 convolution even
    for t = 1.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int, large: bool = False):
        super().__init__()
        width = in_channels * expansion
        self.expand = conv_bn(in_channels, width, 1) if expansion > 1 or not large else None
        self.depthwise = conv_bn(width, width, 3, stride, groups=width)
        self.project = conv_bn(width, out_channels, 1)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            if in_channels == out_channels:
                self.shortcut = nn.Identity()
            elif not large:
                self.shortcut = conv_bn(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H/stride, W/stride]."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = F.relu6(self.depthwise(y))
        y = self.project(y)
        return y if self.shortcut is None else y + self.shortcut(x)


def _scaled(channels: int, multiplier: float) -> int:
    """To the nearest multiple of 8, the next one where that would take off more than a tenth; 8 at least."""
    wanted = channels * multiplier
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * wanted else nearest + 8


class MobileNetV2(nn.Module):
    """Stem of 32 channels, the stages of `STAGES`, 1x1 convolution to 1280, global average pool, linear.

    2,296,922 parameters and 91.2M MACs for 32x32x3 and 10 classes. With the shortcuts of the paper alone (identity only,
    no expansion for t = 1) it would have 2,236,682. `large`: the network of the paper, for images of about 224 pixels, with
    dropout before the classifier. `multiplier`: of all channels but the last 1280, to multiples of 8 (section 6.1 of the
    paper).
    """

    def __init__(self, num_classes: int, in_channels: int, large: bool = False, multiplier: float = 1.0):
        super().__init__()
        channels = _scaled(32, multiplier)
        self.stem = conv_bn(in_channels, channels, 3, 2 if large else 1)
        blocks = []
        for number, (expansion, width, depth, stride) in enumerate(STAGES):
            if large and number == 1:
                stride = 2
            width = _scaled(width, multiplier)
            for j in range(depth):
                blocks.append(InvertedResidual(channels, width, expansion, stride if j == 0 else 1, large))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(channels, 1280, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = 0.2 if large else 0.0
        self.fc = nn.Linear(1280, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        y = self.blocks(F.relu6(self.stem(x)))
        y = F.relu6(self.head(y))
        y = self.pool(y).flatten(1)
        return self.fc(F.dropout(y, self.dropout, self.training) if self.dropout else y)


@register("mobilenet_v2")
def mobilenet_v2(num_classes: int, in_channels: int, *, width: float | int = 1.0) -> nn.Module:
    """MobileNetV2, CIFAR variant with projected shortcuts; `width` is the width multiplier."""
    if not 0 < width <= 16:
        raise UserError(f"width of mobilenet_v2 is {width}: give a multiplier above 0, at most 16, as in width=0.5.")
    return MobileNetV2(num_classes, in_channels, multiplier=width)


@register("mobilenet_v2_imagenet", min_size=32)
def mobilenet_v2_imagenet(num_classes: int, in_channels: int) -> nn.Module:
    """MobileNetV2 of the paper: 3,504,872 parameters and 301M MACs for 224x224x3 and 1000 classes."""
    return MobileNetV2(num_classes, in_channels, large=True)
