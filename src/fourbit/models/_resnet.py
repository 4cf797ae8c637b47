"""Residual networks: ResNet-20 as published for CIFAR, ResNet-18, 50 and 101 with a CIFAR stem, 18 and 50 for ImageNet.

Two families from one paper (He et al., "Deep residual learning for image recognition", arXiv 1512.03385). The CIFAR
family of section 4.2 has three narrow stages (16, 32, 64 channels) and parameter-free shortcuts (option A). The ImageNet
family of table 1 has four wide stages and projects where the shape changes (option B); on 32x32 images its 7x7 stem with
stride 2 and its max pool would leave a 1x1 image too early, so the usual CIFAR variant replaces both by one 3x3
convolution with stride 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.models._base import conv_bn, initialise, register


class PadShortcut(nn.Module):
    """Option A: take every `stride`-th pixel and append channels of zeros. No parameters, no MACs."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.num_zero_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, ceil(H/stride), ceil(W/stride)]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.num_zero_channels))


def _shortcut(option: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where the shape stays the same, else option "A" (pad) or "B" (1x1 convolution with BatchNorm)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    return conv_bn(in_channels, out_channels, 1, stride)


class BasicBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)): figure 5 left of the paper."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, option: str):
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 3, stride)
        self.conv2 = conv_bn(width, width, 3)
        self.shortcut = _shortcut(option, in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, width, H/stride, W/stride]."""
        y = F.relu(self.conv1(x))
        return F.relu(self.conv2(y) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (which carries the stride), 1x1 expand by 4, plus shortcut: figure 5 right of the paper."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, option: str):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv_bn(in_channels, width, 1)
        self.conv2 = conv_bn(width, width, 3, stride)
        self.conv3 = conv_bn(width, out_channels, 1)
        self.shortcut = _shortcut(option, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, 4*width, H/stride, W/stride]."""
        y = F.relu(self.conv1(x))
        y = F.relu(self.conv2(y))
        return F.relu(self.conv3(y) + self.shortcut(x))


class ResNet(nn.Module):
    """3x3 stem, stages of residual blocks (each stage but the first halves the image), global average pool, linear.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks in each stage.
        widths: width of each stage; the first is also the width of the stem.
        option: shortcut where the shape changes: "A" pads with zeros, "B" projects.
        num_classes: number of logits.
        in_channels: channels of the image.
        large: images of about 224 pixels: the stem is a 7x7 convolution with stride 2 and a 3x3 max pool with stride 2.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        option: str,
        num_classes: int,
        in_channels: int,
        large: bool = False,
    ):
        super().__init__()
        self.stem = conv_bn(in_channels, widths[0], 7, 2) if large else conv_bn(in_channels, widths[0], 3)
        self.large = large
        channels = widths[0]
        stages = []
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width, stride, option))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        y = F.relu(self.stem(x))
        y = self.stages(F.max_pool2d(y, 3, 2, 1) if self.large else y)
        return self.fc(self.pool(y).flatten(1))


@register("resnet20")
def resnet20(num_classes: int, in_channels: int, *, width: int = 16) -> nn.Module:
    """ResNet-20 for CIFAR, section 4.2 (n = 3), shortcut option A; the stages have `width`, 2 `width` and 4 `width` channels.

    269,722 parameters (the paper: 0.27M) and 40.55M MACs for 32x32x3 and 10 classes; the figure of 40.8M that is often
    quoted counts option B. Published error on CIFAR-10: 8.75% (table 6).
    """
    if width < 1:
        raise UserError(
            f"width of resnet20 is {width}: give a number of channels of at least 1, as in resnet20?width=8."
        )
    return ResNet(BasicBlock, (3, 3, 3), (width, 2 * width, 4 * width), "A", num_classes, in_channels)


@register("resnet29")
def resnet29(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-29: the CIFAR family's stages with three bottleneck blocks each, small enough for a CPU.

    313,114 parameters and 47.1M MACs for 32x32x3 and 10 classes.
    """
    return ResNet(Bottleneck, (3, 3, 3), (16, 32, 64), "B", num_classes, in_channels)


@register("resnet18")
def resnet18(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-18 of table 1 with the CIFAR stem.

    11,173,962 parameters and 555.4M MACs for 32x32x3 and 10 classes.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), "B", num_classes, in_channels)


@register("resnet50")
def resnet50(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-50 of table 1 with the CIFAR stem; the stride sits in the 3x3 convolution, as in torchvision ("v1.5").

    23,520,842 parameters and 1,297.8M MACs for 32x32x3 and 10 classes.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), "B", num_classes, in_channels)


@register("resnet101")
def resnet101(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-101 of table 1 with the CIFAR stem, as `resnet50`.

    42,512,970 parameters and 2,510.0M MACs for 32x32x3 and 10 classes.
    """
    return ResNet(Bottleneck, (3, 4, 23, 3), (64, 128, 256, 512), "B", num_classes, in_channels)


@register("resnet18_imagenet", min_size=32)
def resnet18_imagenet(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-18 of table 1: 11,689,512 parameters and 1,814M MACs for 224x224x3 and 1000 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), "B", num_classes, in_channels, large=True)


@register("resnet50_imagenet", min_size=32)
def resnet50_imagenet(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-50 of table 1, stride in the 3x3 convolution: 25,557,032 parameters and 4,089M MACs for 224x224x3."""
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), "B", num_classes, in_channels, large=True)
