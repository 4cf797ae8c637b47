"""Pieces of words, by byte-pair encoding over bytes (Sennrich et al., arXiv 1508.07909), learned from the training text.

Every text can be written in them, since the 256 bytes are among them. Made with Hugging Face `tokenizers`; what is made is
kept in the cache.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourbit.data._cache import cached
from fourbit.data._text import TextData
from fourbit.data._translation import require_tokenizers
from fourbit.errors import UserError

PREFIX = "bpe"
NUM_BYTES, DEFAULT_TOKENS = 256, 4096
PIECE = 1000
"""Lines that a tokenizer reads together."""


def num_pieces(tokenizer: str) -> int | None:
    """Size of the vocabulary that bpe or bpe:NUMBER asks for; None for another tokenizer.

    >>> num_pieces("bpe"), num_pieces("bpe:1000"), num_pieces("words")
    (4096, 1000, None)
    """
    kind, colon, number = tokenizer.partition(":")
    if kind != PREFIX:
        return None
    if not colon:
        return DEFAULT_TOKENS
    if not number.isdecimal() or int(number) < NUM_BYTES:
        raise UserError(
            f"tokenizer is {tokenizer}, but bpe: needs a number of tokens of at least {NUM_BYTES}: bpe:4096."
        )
    return int(number)


def from_pieces(name: str, train: str, test: str, num_tokens: int) -> TextData:
    """At most `num_tokens` pieces, fewer if the training text has no more that are worth it."""
    tokenizers = require_tokenizers()
    digest = hashlib.sha256(f"{num_tokens} {len(train)}\n".encode())
    digest.update(train.encode())
    digest.update(test.encode())

    def make() -> dict[str, Tensor]:
        tokenizer = _learned(train, num_tokens)
        parts = {split: encoded(tokenizer, text) for split, text in (("train", train), ("test", test))}
        return parts | {"tokenizer": torch.from_numpy(np.frombuffer(tokenizer.to_str().encode(), np.uint8).copy())}

    tensors = cached(f"{name}-{PREFIX}", digest.hexdigest()[:16], make)
    tokenizer = tokenizers.Tokenizer.from_str(tensors["tokenizer"].numpy().tobytes().decode())
    vocabulary = tuple(tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size()))
    parts = tensors["train"], tensors["test"]
    return TextData(name, *parts, vocabulary, lambda numbers: decoded(tokenizer, numbers), len(test.encode()))


def encoded(tokenizer: Any, text: str) -> Tensor:
    """Token numbers of a text, int64 [N]."""
    lines = _lines(text)
    pieces = ["".join(lines[i : i + PIECE]) for i in range(0, len(lines), PIECE)]
    found = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    return torch.from_numpy(np.concatenate([np.array(each.ids, np.int64) for each in found]))


def decoded(tokenizer: Any, numbers: Sequence[int]) -> str:
    """The text of token numbers."""
    return tokenizer.decode(list(numbers), skip_special_tokens=False)


def _learned(text: str, num_tokens: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=num_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_lines(text), trainer)
    return tokenizer


def _lines(text: str) -> list[str]:
    """With their ends, which are line feeds alone."""
    return io.StringIO(text, newline="\n").readlines()
