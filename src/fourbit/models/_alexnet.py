"""AlexNet in the form that is trained on one device: Krizhevsky, "One weird trick for parallelizing convolutional neural
networks" (arXiv 1404.5997), without normalization, as the usual libraries have it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.models._base import initialise, register

# (output channels, kernel, stride, padding, whether a 3x3 max pool with stride 2 follows)
CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)


class AlexNet(nn.Module):
    """Five convolutions and three linear layers of 4096 units, with dropout before the first two.

    61,100,840 parameters and 714.2M MACs for 224x224x3 and 1000 classes. Images of other sizes are averaged to the 6x6 pixels
    that the first linear layer reads.
    """

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width, kernel, stride, padding, pooled in CONVOLUTIONS:
            layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
            layers += [nn.MaxPool2d(3, 2)] if pooled else []
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.fc1 = nn.Linear(channels * 36, 4096)
        self.fc2 = nn.Linear(4096, 4096)
        self.fc3 = nn.Linear(4096, num_classes)
        self.dropout = 0.5
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        y = self.pool(self.features(x)).flatten(1)
        y = F.relu(self.fc1(F.dropout(y, self.dropout, self.training)))
        y = F.relu(self.fc2(F.dropout(y, self.dropout, self.training)))
        return self.fc3(y)


@register("alexnet", min_size=63)
def alexnet(num_classes: int, in_channels: int) -> nn.Module:
    """AlexNet for ImageNet, five convolutions and three linear layers: 61,100,840 parameters with 1000 classes."""
    return AlexNet(num_classes, in_channels)
