"""A convolutional network for 8x8 digits: small enough to train in seconds on one CPU core.

It exists so that the first run of a recipe takes no time. It has five weight layers, so a recipe that keeps the first
and the last layer in higher precision still leaves three 4-bit ones in between.
"""

from __future__ import annotations

from torch import Tensor, nn

from fourbit.models._base import conv_bn, initialise, register


class DigitsCnn(nn.Module):
    """conv16 - conv32 - conv32/2 - conv64, each 3x3 with BatchNorm and ReLU, global average pool, linear.

    33,338 parameters and 0.75M MACs for 8x8 grey images and 10 classes. Not from a paper; full precision reaches about
    99% on the scikit-learn digits.
    """

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(in_channels, 16, 3),
            nn.ReLU(),
            conv_bn(16, 32, 3),
            nn.ReLU(),
            conv_bn(32, 32, 3, stride=2),
            nn.ReLU(),
            conv_bn(32, 64, 3),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        return self.fc(self.pool(self.features(x)).flatten(1))


@register("digits_cnn")
def digits_cnn(num_classes: int, in_channels: int) -> nn.Module:
    """The five-layer network for the scikit-learn digits."""
    return DigitsCnn(num_classes, in_channels)
