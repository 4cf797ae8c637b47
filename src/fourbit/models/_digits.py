"""A convolutional network for 8x8 digits: small enough to train in seconds on one CPU core.

It exists so that the first run of a recipe takes no time, and it has what every recipe asks for: a first and a last layer
with four 4-bit ones in between, among them 3x3 convolutions and 1x1 convolutions that reduce and that expand.
"""

from __future__ import annotations

from torch import Tensor, nn

from fourbit.models._base import conv_bn, initialise, register


class DigitsCnn(nn.Module):
    """3x3 to 16, 3x3 to 32, a bottleneck (1x1 to 16, 3x3 to 32 with stride 2, 1x1 to 64), average pool, linear.

    BatchNorm and ReLU after each convolution. 12,890 parameters and 0.44M MACs for 8x8 grey images and 10 classes. Not
    from a paper.
    """

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(in_channels, 16, 3),
            nn.ReLU(),
            conv_bn(16, 32, 3),
            nn.ReLU(),
            conv_bn(32, 16, 1),
            nn.ReLU(),
            conv_bn(16, 32, 3, stride=2),
            nn.ReLU(),
            conv_bn(32, 64, 1),
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
    """The small network for the scikit-learn digits."""
    return DigitsCnn(num_classes, in_channels)
