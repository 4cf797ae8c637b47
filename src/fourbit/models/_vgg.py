"""VGG-16 with BatchNorm for small images: thirteen 3x3 convolutions in five stages, one linear layer.

The convolutions are configuration D of Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
recognition" (arXiv 1409.1556, table 1). The CIFAR variant in common use adds BatchNorm after each and replaces the three
fully connected layers, made for 7x7x512 features, by a single classifier.
"""

from __future__ import annotations

from torch import Tensor, nn

from fourbit.models._base import initialise, register

# Configuration D: channels of the convolutions in each stage; a 2x2 max pool ends a stage.
CONFIG_D = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Vgg(nn.Module):
    """Stages of conv3x3 - BatchNorm - ReLU, each ended by a 2x2 max pool, then one linear layer.

    With `CONFIG_D` it is VGG-16: 14,728,266 parameters and 313.2M MACs for 32x32x3 and 10 classes. The convolutions keep
    the paper's biases although BatchNorm makes them redundant: the published count of the CIFAR variant includes them.
    Pools round up, which changes nothing for 32x32 and lets images of any size through (28x28: 14, 7, 4, 2, 1).
    """

    def __init__(self, config: tuple[tuple[int, ...], ...], num_classes: int, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in config:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        return self.fc(self.pool(self.features(x)).flatten(1))


@register("vgg16")
def vgg16(num_classes: int, in_channels: int) -> nn.Module:
    """VGG-16 with BatchNorm and one linear layer."""
    return Vgg(CONFIG_D, num_classes, in_channels)
