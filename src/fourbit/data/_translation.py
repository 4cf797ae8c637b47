"""Pairs of sentences in two languages, cut into pieces of words by one vocabulary for both, and batches of similar length.

The vocabulary is made by byte-pair encoding (Sennrich et al., arXiv 1508.07909) over the bytes of the training sentences
of both languages, with Hugging Face `tokenizers`; a file tokenizer.json in the data folder takes its place. Tokens 0, 1
and 2 are padding, begin and end.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fourbit.data._base import SPLITS, num_batches
from fourbit.data._columns import text_column
from fourbit.data._random import generator
from fourbit.errors import UserError, unknown

PAD, BEGIN, END = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
TOKENIZER_FILE = "tokenizer.json"
PIECE = 8192
"""Sentences that are encoded together."""
POOL = 50
"""Batches among whose sentences similar lengths are looked for."""


@dataclass(frozen=True, eq=False)
class Sentences:
    """Token numbers of many sentences in one row, int32 [N], and where each begins, int64 [number of sentences + 1]."""

    tokens: Tensor
    starts: Tensor

    @staticmethod
    def of(sentences: Iterable[Sequence[int]]) -> Sentences:
        """From one list per sentence; of those before the one at hand only the numbers are kept."""
        tokens, starts = array("i"), array("q", [0])
        for sentence in sentences:
            tokens.extend(sentence)
            starts.append(len(tokens))
        return Sentences(_tensor(tokens, torch.int32), _tensor(starts, torch.int64))

    def only(self, kept: Tensor) -> Sentences:
        """Those for which `kept`, bool [number of sentences], is set."""
        starts = torch.cat((self.starts[:1], self.lengths[kept].cumsum(0)))
        return Sentences(self.tokens[kept.repeat_interleave(self.lengths)], starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        begin, end = int(self.starts[index]), int(self.starts[index + 1])
        return self.tokens[begin:end].long()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each."""
        return self.starts.diff()


@dataclass(frozen=True, eq=False)
class TranslationData:
    """Pairs in memory; every sentence ends with <eos>.

    Args:
        name: its name in the catalogue.
        train, test: source and target.
        references: the target sentences of the test split as they were written, for BLEU.
        tokenizer: of both languages, a `tokenizers.Tokenizer`.
        languages: names of source and target, where they were found in the data.

    Raises:
        UserError: a split without pairs, or sides of different numbers.
    """

    name: str
    train: tuple[Sentences, Sentences]
    test: tuple[Sentences, Sentences]
    references: tuple[str, ...]
    tokenizer: Any
    languages: tuple[str, str] | None = None
    examples: ClassVar[str] = "pairs"

    def __post_init__(self):
        for split in SPLITS:
            source, target = self.split(split)
            if not len(source) or len(source) != len(target):
                raise UserError(
                    f"{split} of {self.name} has {len(source)} source and {len(target)} target sentences: need pairs."
                )

    @property
    def num_tokens(self) -> int:
        """The largest token number and one: the vocabulary of a tokenizer of one's own may leave numbers out."""
        return 1 + max(self.tokenizer.get_vocab().values())

    def split(self, name: str) -> tuple[Sentences, Sentences]:
        """Source and target of "train" or "test"; UserError for another name."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return self.train if name == "train" else self.test

    def text(self, tokens: Sequence[int]) -> str:
        """The sentence of token numbers, up to the first end mark."""
        found = list(tokens)
        return self.tokenizer.decode(found[: found.index(END)] if END in found else found).strip()

    def check_length(self, longest: int, model: str) -> None:
        """UserError naming the first sentence that is longer than `model` can take."""
        for split in SPLITS:
            for side, sentences in zip(("source", "target"), self.split(split), strict=True):
                over = (sentences.lengths > longest).nonzero()
                if len(over):
                    row = int(over[0])
                    raise UserError(
                        f"{side} sentence {row} in {split} of {self.name} has {int(sentences.lengths[row])} tokens, but "
                        f"{model} takes {longest}: remove the pair, or choose a network for longer sentences."
                    )


def pairs(
    data: TranslationData, split: str, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Source int64 [S, B], numbers of the pairs [B], and target [T, B] (behind its begin mark); padded with 0.

    Training pairs are shuffled by (seed, epoch); within every 50 batches they are then sorted by length and cut, and the
    batches shuffled, so that little is padding. An incomplete last batch is left out. Test pairs are sorted by length, and
    their batches mixed in a fixed order, so that the first few are not the shortest.
    """
    source, target = data.split(split)
    count = num_batches(data, split, batch_size)
    length = target.lengths * 65536 + source.lengths
    if split == "test":
        found = length.argsort(stable=True).split(batch_size)
        batches = [found[k] for k in torch.randperm(count, generator=generator("test order")).tolist()]
    else:
        random = generator("order", seed, epoch)
        order = torch.randperm(len(source), generator=random)[: count * batch_size]
        pools = (p[length[p].argsort(stable=True)] for p in order.split(POOL * batch_size))
        found = torch.cat([p for pool in pools for p in pool.split(batch_size)]).view(count, batch_size)
        batches = found[torch.randperm(count, generator=random)]
    pad = torch.nn.utils.rnn.pad_sequence
    for k in range(start, count):
        picked = batches[k]
        sides = (pad([s[i] for i in picked.tolist()], padding_value=PAD) for s in (source, target))
        first, second = sides
        yield first, picked, second


def read_rows(tables: Mapping[str, Any], languages: tuple[str, str], where: str) -> dict[str, list[tuple[str, str]]]:
    """The pairs of each split, from columns named like the languages or one column `translation` that has both.

    Raises:
        UserError: neither is there, or a sentence is missing.
    """
    found = {}
    for split, table in tables.items():
        sides = [text_column(table, f"{split} of {where}", side, f"translation.{side}") for side in languages]
        found[split] = list(zip(*sides, strict=True))
    return found


def encode_pairs(
    rows: Mapping[str, Sequence[tuple[str, str]]], num_tokens: int, longest: int, file: Path | None
) -> dict[str, Tensor]:
    """The tensors that `from_tensors` reads: tokens and starts of each side, test references and tokenizer as bytes.

    Training pairs with an empty side, or with more than `longest` tokens on one, are left out.

    Args:
        num_tokens: size of the vocabulary to be made.
        file: a tokenizer to be used instead.
    """
    tokenizer = _new_tokenizer(rows["train"], num_tokens) if file is None else load_tokenizer(file)
    tensors: dict[str, Tensor] = {}
    for split, found in rows.items():
        sides = [Sentences.of(_encoded(tokenizer, file, found, side)) for side in (0, 1)]
        if split == "train":
            fits = [(s.lengths > 1) & (s.lengths <= longest) for s in sides]
            kept = fits[0] & fits[1]
            if lost := len(kept) - int(kept.sum()):
                warnings.warn(
                    f"{lost:,} of {len(kept):,} training pairs are left out: a side is empty, or has more than {longest} "
                    "tokens."
                )
            sides = [s.only(kept) for s in sides]
        for name, sentences in zip(("source", "target"), sides, strict=True):
            tensors |= {f"{split}.{name}.tokens": sentences.tokens, f"{split}.{name}.starts": sentences.starts}
    references = "\n".join(" ".join(target.split()) for _, target in rows["test"])
    return tensors | {"references": _bytes(references), "tokenizer": _bytes(tokenizer.to_str())}


def _encoded(tokenizer: Any, file: Path | None, rows: Sequence[tuple[str, str]], side: int) -> Iterator[list[int]]:
    """Token numbers of one side, sentence by sentence; a few thousand of them are in memory at a time."""
    for start in range(0, len(rows), PIECE):
        sentences = [row[side] for row in rows[start : start + PIECE]]
        try:
            encodings = tokenizer.encode_batch(sentences, add_special_tokens=False)
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(
                f"the tokenizer in {file} cannot encode the sentences ({error}): give it an unknown token, or remove the "
                "file, and one will be made from the training sentences."
            ) from error
        for encoding in encodings:
            yield [*encoding.ids, END]


def _tensor(numbers: array[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(numbers, dtype=dtype).clone() if len(numbers) else torch.empty(0, dtype=dtype)


def from_tensors(name: str, tensors: Mapping[str, Tensor], languages: tuple[str, str] | None = None) -> TranslationData:
    """The data set of `encode_pairs`."""
    from tokenizers import Tokenizer

    def side(split: str, name: str) -> Sentences:
        return Sentences(tensors[f"{split}.{name}.tokens"], tensors[f"{split}.{name}.starts"])

    train, test = ((side(split, "source"), side(split, "target")) for split in SPLITS)
    references = tuple(_string(tensors["references"]).split("\n"))
    return TranslationData(name, train, test, references, Tokenizer.from_str(_string(tensors["tokenizer"])), languages)


def load_tokenizer(path: Path) -> Any:
    """A tokenizer file with our special tokens.

    Raises:
        UserError: not such a file, or a tokenizer that does not match.
    """
    tokenizers = require_tokenizers()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(
            f"{path} is not a tokenizer of the package tokenizers ({error}): replace or remove it."
        ) from error
    found = tuple(tokenizer.id_to_token(number) for number in range(len(SPECIAL)))
    if found != SPECIAL:
        raise UserError(
            f"the tokenizer in {path} does not match: its tokens 0, 1, 2 are {', '.join(map(str, found))}, but must be "
            f"{', '.join(SPECIAL)}. Remove the file, and one will be made from the training sentences."
        )
    tokenizer.no_padding()  # batches are padded later, and long sentences are left out, not cut
    tokenizer.no_truncation()
    return tokenizer


def require_tokenizers() -> Any:
    """The package."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("pieces of words need the package tokenizers: pip install 'fourbit[train]'.") from error
    return tokenizers


def _new_tokenizer(rows: Sequence[tuple[str, str]], num_tokens: int) -> Any:
    tokenizers = require_tokenizers()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((side for row in rows for side in row), trainer)
    return tokenizer


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def _string(t: Tensor) -> str:
    return bytes(t.tolist()).decode()
