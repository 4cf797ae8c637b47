"""Acoustic models: bidirectional LSTM layers over frames of features, and a linear classifier.

The paper trains four bidirectional LSTM layers on telephone speech, as IBM's systems for Switchboard do (Saon et al.,
arXiv 1703.02136); the width here is one for small vocabularies.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fourbit.models._base import register


class AcousticModel(nn.Module):
    """One class per utterance, from the mean of the last layer's outputs over its frames.

    Args:
        num_features: of a frame.
        num_classes: number of logits.
        width: units per direction.
        num_layers: of the LSTM.
        dropout: between layers.
    """

    def __init__(self, num_features: int, num_classes: int, width: int, num_layers: int = 4, dropout: float = 0.0):
        super().__init__()
        self.lstm = nn.LSTM(num_features, width, num_layers, dropout=dropout, bidirectional=True)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Frames [T, B, num_features], of which lengths [B] are there (None: all) -> logits [B, num_classes]."""
        if lengths is None:
            return self.classifier(self.lstm(frames)[0].mean(0))
        packed = pack_padded_sequence(frames, lengths.cpu(), enforce_sorted=False)
        y, _ = pad_packed_sequence(self.lstm(packed)[0])
        mean = y.sum(0) / lengths.to(y.device).unsqueeze(1)  # padding is zero
        return self.classifier(mean)


@register("bilstm_speech", "speech")
def bilstm_speech(num_classes: int, in_channels: int) -> nn.Module:
    """Four bidirectional LSTM layers of 128 units per direction: 1,362,442 parameters with 40 features and 10 classes."""
    return AcousticModel(in_channels, num_classes, 128, dropout=0.2)
