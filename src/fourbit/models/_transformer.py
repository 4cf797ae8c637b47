"""The encoder-decoder Transformer for translation. Vaswani et al., "Attention is all you need", arXiv 1706.03762.

Layers of torch's own, normalized behind each sub-layer; sinusoidal positions; one embedding for both languages, whose weights
are those of the classifier as well (their sections 3.1 to 3.5).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.models._base import register
from fourbit.models._tokens import BEGIN, END, PAD


class Transformer(nn.Module):
    """Translates sentences of one vocabulary.

    Args:
        num_tokens: size of the vocabulary.
        width, heads, hidden: of a layer: numbers per position, attention heads, and units of the feed-forward network.
        num_layers: of the encoder, and of the decoder.
        dropout: of embeddings and sub-layers.
        max_length: tokens of the longest sentence.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int,
        heads: int,
        hidden: int,
        num_layers: int,
        dropout: float = 0.1,
        max_length: int = 512,
    ):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width, padding_idx=PAD)
        sizes = width, heads, hidden, dropout
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(*sizes) for _ in range(num_layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(*sizes) for _ in range(num_layers))
        self.classifier = nn.Linear(width, num_tokens, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, 0.0, width**-0.5)
        self.classifier.weight = self.embedding.weight
        self.dropout, self.max_length = dropout, max_length
        self.positions: Tensor
        self.register_buffer("positions", _sinusoids(max_length, width), persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Source [S, B] and target [T, B] with its begin mark -> logits of the token behind each [T, B, num_tokens].

        Padding is 0. Raises UserError for sentences longer than max_length.
        """
        return self.classifier(self.decode(target, self.encode(source), source))

    def encode(self, source: Tensor) -> Tensor:
        """[S, B] -> [S, B, width]."""
        x, hidden = self._embed(source), (source == PAD).t()
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=hidden)
        return x

    def decode(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """[T, B], and the encoder's output and input -> what the classifier reads, [T, B, width]."""
        y, hidden = self._embed(target), (source == PAD).t()
        later = torch.ones(len(target), len(target), dtype=torch.bool, device=y.device).triu(1)
        for layer in self.decoder:
            y = layer(y, memory, tgt_mask=later, memory_key_padding_mask=hidden, tgt_is_causal=True)
        return y

    def _embed(self, tokens: Tensor) -> Tensor:
        if len(tokens) > self.max_length:
            raise UserError(
                f"a sentence has {len(tokens)} tokens, but this Transformer takes {self.max_length}: cut it, or build one "
                "with a larger max_length."
            )
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return F.dropout(x + self.positions[: len(tokens)].unsqueeze(1).to(x.dtype), self.dropout, self.training)

    @torch.no_grad()
    def translate(
        self, source: Tensor, beam_size: int = 1, length_penalty: float = 0.6, longest: int | None = None
    ) -> Tensor:
        """The best translation of each sentence by beam search, int64 [T, B], padded with 0; without the begin mark.

        Args:
            source: [S, B].
            beam_size: hypotheses per sentence; 1 is greedy.
            length_penalty: alpha; hypotheses are compared by log p / ((5 + length) / 6)^alpha (Wu et al., arXiv 1609.08144).
            longest: tokens that a translation may have; None: 10 more than twice those of the longest source.
        """
        batch, beams, device = source.shape[1], beam_size, source.device
        memory, source = self.encode(source).repeat_interleave(beams, 1), source.repeat_interleave(beams, 1)
        tokens = torch.full((1, batch * beams), BEGIN, device=device)
        scores = torch.full((batch, beams), -math.inf, device=device)
        scores[:, 0] = 0.0  # the hypotheses of a sentence are the same at first
        ended = torch.zeros(batch * beams, dtype=torch.bool, device=device)
        num_tokens = self.classifier.out_features
        steps = torch.full((batch * beams, num_tokens), -math.inf, device=device)
        for _ in range(min(2 * len(source) + 10 if longest is None else longest, self.max_length - 1)):
            going = ~ended
            y = self.decode(tokens[:, going], memory[:, going], source[:, going])
            logits = self.classifier(y[-1]).float()
            logits[:, [PAD, BEGIN]] = -math.inf
            steps.fill_(-math.inf)
            steps[ended, PAD] = 0.0
            steps[going] = logits.log_softmax(-1)
            total = (scores.unsqueeze(-1) + steps.view(batch, beams, -1)).flatten(1)
            scores, best = total.topk(beams)
            parents = (best // num_tokens + beams * torch.arange(batch, device=device).unsqueeze(1)).flatten()
            new = (best % num_tokens).flatten()
            tokens = torch.cat((tokens[:, parents], new.unsqueeze(0)))
            ended = ended[parents] | (new == END)
            if bool(ended.all()):
                break
        tokens = tokens[1:]
        lengths = (tokens != PAD).sum(0).view(batch, beams)
        chosen = (scores / ((5.0 + lengths) / 6.0) ** length_penalty).argmax(1)
        return tokens[:, chosen + beams * torch.arange(batch, device=device)]


def _sinusoids(length: int, width: int) -> Tensor:
    """sin and cos of position / 10000^(2 i / width), in turn."""
    angles = torch.arange(length).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width]


@register("transformer_base", "translation")
def transformer_base(num_tokens: int, in_channels: int) -> nn.Module:
    """Vaswani's base model, six layers of 512 numbers: 63,082,496 parameters with 37,000 tokens."""
    return Transformer(num_tokens, 512, 8, 2048, 6)


@register("transformer_small", "translation")
def transformer_small(num_tokens: int, in_channels: int) -> nn.Module:
    """Four layers of 128 numbers, for small data sets, as in Wu et al. (arXiv 2105.14462), with dropout 0.1."""
    return Transformer(num_tokens, 128, 4, 256, 4)
