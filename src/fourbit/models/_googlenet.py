"""GoogLeNet with BatchNorm for small images: nine Inception modules, each four branches side by side.

Szegedy et al., "Going deeper with convolutions" (arXiv 1409.4842, table 1). The CIFAR variant in common use has one 3x3
convolution in place of the stem, BatchNorm after every convolution, two 3x3 in place of each 5x5 (Szegedy et al.,
"Rethinking the Inception architecture", arXiv 1512.00567, section 3.1), and no auxiliary classifiers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourbit.models._base import initialise, register

# Rows 3a to 5b of table 1: 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | pool proj. A new tuple halves the image before it.
STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
    """Convolution - BatchNorm - ReLU. The convolution keeps its bias: the published count of this variant includes it."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


class Inception(nn.Module):
    """Four branches, concatenated: 1x1; 1x1 - 3x3; 1x1 - 3x3 - 3x3; 3x3 max pool - 1x1."""

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int, int, int]):
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.branch1 = nn.Sequential(*_conv(in_channels, one, 1))
        self.branch3 = nn.Sequential(*_conv(in_channels, reduce3, 1), *_conv(reduce3, three, 3))
        self.branch5 = nn.Sequential(*_conv(in_channels, reduce5, 1), *_conv(reduce5, five, 3), *_conv(five, five, 3))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_conv(in_channels, pool, 1))
        self.out_channels = one + three + five + pool

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        return torch.cat((self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)), dim=1)


class GoogLeNet(nn.Module):
    """3x3 stem of 192 channels, the modules of `STAGES`, global average pool, linear.

    6,166,250 parameters and 1,521.8M MACs for 32x32x3 and 10 classes.
    """

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.stem = nn.Sequential(*_conv(in_channels, 192, 3))
        channels = 192
        stages: list[nn.Module] = []
        for i, stage in enumerate(STAGES):
            modules: list[nn.Module] = [nn.MaxPool2d(3, 2, 1)] if i > 0 else []
            for widths in stage:
                module = Inception(channels, widths)
                modules.append(module)
                channels = module.out_channels
            stages.append(nn.Sequential(*modules))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        return self.fc(self.pool(self.stages(self.stem(x))).flatten(1))


@register("googlenet")
def googlenet(num_classes: int, in_channels: int) -> nn.Module:
    """GoogLeNet with BatchNorm, CIFAR variant."""
    return GoogLeNet(num_classes, in_channels)
