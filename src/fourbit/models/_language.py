"""Word-level language models: embedding, LSTM layers, linear classifier over the vocabulary.

Zaremba et al., "Recurrent neural network regularization" (arXiv 1409.2329, section 4.1): two layers of 200 (small, no
dropout) or 650 units (medium, dropout 0.5 on everything that is not recurrent), on the Penn Treebank with 10,000 words.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.models._base import register

State = tuple[Tensor, Tensor]


class LstmLanguageModel(nn.Module):
    """Logits of the next token at every position.

    Args:
        num_tokens: size of the vocabulary.
        width: of embedding and hidden state.
        num_layers: of the LSTM.
        dropout: of embeddings and of the outputs of every layer, in training.
        init_range: weights are uniform in +-init_range, the classifier's bias is 0.
    """

    def __init__(self, num_tokens: int, width: int, num_layers: int = 2, dropout: float = 0.0, init_range: float = 0.1):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.lstm = nn.LSTM(width, width, num_layers, dropout=dropout)
        self.classifier = nn.Linear(width, num_tokens)
        self.dropout = dropout
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Tokens [T, B] and the state before them -> logits [T, B, num_tokens] and the state behind."""
        x = F.dropout(self.embedding(tokens), self.dropout, self.training)
        y, last = self.lstm(x, state)
        return self.classifier(F.dropout(y, self.dropout, self.training)), last


@register("lstm_200", "text")
def lstm_200(num_tokens: int, in_channels: int) -> nn.Module:
    """Two LSTM layers of 200 units, Zaremba's small model: 4,653,200 parameters with 10,000 tokens."""
    return LstmLanguageModel(num_tokens, 200, init_range=0.1)


@register("lstm_650", "text")
def lstm_650(num_tokens: int, in_channels: int) -> nn.Module:
    """Two LSTM layers of 650 units with dropout 0.5, Zaremba's medium model: 19,780,400 parameters with 10,000 tokens."""
    return LstmLanguageModel(num_tokens, 650, dropout=0.5, init_range=0.05)
