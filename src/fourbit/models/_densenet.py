"""DenseNet-121 for small images: every layer reads all the layers before it in its block.

Huang et al., "Densely connected convolutional networks" (arXiv 1608.06993, table 1, the variant with bottlenecks and
compression that the paper calls DenseNet-BC). Activation comes before convolution: the input of each one is BatchNorm and
ReLU of a concatenation. On 32x32 images the 7x7 stem with stride 2 and its max pool would leave too little, so a 3x3
convolution with stride 1 takes their place, as is usual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.models._base import initialise, register


class DenseLayer(nn.Module):
    """x, and growth new channels: conv3x3(relu(bn(conv1x1(relu(bn(x)))))), with 4 * growth channels between the two."""

    def __init__(self, in_channels: int, growth: int):
        super().__init__()
        width = 4 * growth
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, growth + in_channels, H, W]."""
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return torch.cat((y, x), dim=1)


class Transition(nn.Module):
    """Between two blocks: half as many channels by a 1x1 convolution, half the height and width by averaging."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C/2, H/2, W/2]."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """3x3 stem of 2 * growth channels, dense blocks with transitions between them, global average pool, linear.

    Args:
        depths: dense layers in each block.
        growth: channels that a dense layer adds.
        num_classes: number of logits.
        in_channels: channels of the image.
    """

    def __init__(self, depths: tuple[int, ...], growth: int, num_classes: int, in_channels: int):
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for i, depth in enumerate(depths):
            if i > 0:
                blocks.append(Transition(channels))
                channels //= 2
            blocks.append(nn.Sequential(*(DenseLayer(channels + j * growth, growth) for j in range(depth))))
            channels += depth * growth
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        y = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.fc(self.pool(y).flatten(1))


@register("densenet121")
def densenet121(num_classes: int, in_channels: int) -> nn.Module:
    """DenseNet-121 of table 1 (growth 32) with the CIFAR stem.

    6,956,298 parameters and 888.4M MACs for 32x32x3 and 10 classes.
    """
    return DenseNet((6, 12, 24, 16), 32, num_classes, in_channels)
