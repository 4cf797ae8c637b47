"""Text as one long row of token numbers, and the pieces of it that a language model is trained on.

`windows` are for networks that carry a state. A split of N tokens is cut into B rows of N // B; step k of an epoch reads tokens
k T to (k + 1) T of every row, and the tokens after them are the targets. Consecutive windows continue each other, so a
recurrent network carries its state from one to the next. Nothing is shuffled: a row keeps its order.

`sequences` are for networks that read each row anew: the training text cut into pieces of T tokens, without padding, from a
place that changes from epoch to epoch, and shuffled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourbit.data._base import SPLITS
from fourbit.data._random import generator
from fourbit.data._text_files import lines_of, read_text
from fourbit.errors import UserError, unknown

END = "<eos>"
UNKNOWN = "<unk>"


@dataclass(frozen=True, eq=False)
class TextData:
    """A corpus in memory.

    Args:
        name: its name in the catalogue.
        train, test: int64 [N], token numbers from 0.
        vocabulary: the token of each number.
        decode: makes token numbers a text again; None: the tokens one after the other.
        test_bytes: of the test text in UTF-8, if its tokens are that text and nothing is lost; else None.

    Raises:
        UserError: tensors of another form, or a number without a token.
    """

    name: str
    train: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    decode: Callable[[Sequence[int]], str] | None = None
    test_bytes: int | None = None

    def __post_init__(self):
        for split in SPLITS:
            tokens = self.split(split)
            if tokens.dtype != torch.int64 or tokens.ndim != 1 or not len(tokens):
                raise UserError(f"{split} of {self.name} must be int64 [N], not {tokens.dtype} {list(tokens.shape)}.")
            if int(tokens.min()) < 0 or int(tokens.max()) >= len(self.vocabulary):
                raise UserError(f"{split} of {self.name} has a token number outside 0 to {len(self.vocabulary) - 1}.")

    def split(self, name: str) -> Tensor:
        """The tokens of "train" or "test"; UserError for another name."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return self.train if name == "train" else self.test

    def text(self, numbers: Sequence[int]) -> str:
        """The text of token numbers."""
        return self.decode(numbers) if self.decode else "".join(self.vocabulary[n] for n in numbers)


def num_windows(data: TextData, split: str, batch_size: int, length: int) -> int:
    """Number of windows that `windows` yields from the start; the last one may be shorter.

    Raises:
        UserError: fewer tokens than rows and targets need.
    """
    per_row = len(data.split(split)) // batch_size if batch_size >= 1 else 0
    if per_row < 2:
        raise UserError(
            f"batch size is {batch_size}, but {split} of {data.name} has {len(data.split(split))} tokens: each row needs two."
        )
    return -(-(per_row - 1) // length)


def windows(
    data: TextData, split: str, batch_size: int, length: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 [T, B] each, T = `length` (the last window: what is left).

    Args:
        start: index of the first window to yield.

    >>> text = TextData("abc", torch.arange(8), torch.arange(8), tuple("abcdefgh"))
    >>> [x.tolist() for x, _ in windows(text, "train", batch_size=2, length=2)]
    [[[0, 4], [1, 5]], [[2, 6]]]
    """
    count = num_windows(data, split, batch_size, length)
    tokens = data.split(split)
    rows = tokens[: len(tokens) // batch_size * batch_size].view(batch_size, -1).t().contiguous()
    for k in range(start, count):
        begin, end = k * length, min((k + 1) * length, len(rows) - 1)
        yield rows[begin:end], rows[begin + 1 : end + 1]


def num_sequences(data: TextData, batch_size: int, length: int) -> int:
    """Number of batches of an epoch of `sequences`.

    Raises:
        UserError: the training text is too short for one.
    """
    count, tokens = max(0, len(data.train) // length - 1), len(data.train)  # one less, for the place where they begin
    if not 1 <= batch_size <= count:
        raise UserError(
            f"a batch has {batch_size} sequences of {length} tokens, but the training text of {data.name} has {tokens} tokens, "
            f"enough for {count}: give a smaller batch size or sequence length."
        )
    return count // batch_size


def sequences(
    data: TextData, batch_size: int, length: int, seed: int = 0, epoch: int = 0, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of an epoch of the training text, int64 [T, B] each, T = `length`; the targets are the next tokens.

    Args:
        seed, epoch: choose where the first begins, 0 to T - 1, and the order.
        start: index of the first batch to yield; earlier ones cost nothing.
    """
    count = num_sequences(data, batch_size, length)
    random = generator("order", seed, epoch)
    first = int(torch.randint(length, (), generator=random))
    starts = first + length * torch.randperm(len(data.train) // length - 1, generator=random)
    steps = torch.arange(length).unsqueeze(1)
    for k in range(start, count):
        places = starts[k * batch_size : (k + 1) * batch_size] + steps
        yield data.train[places], data.train[places + 1]


def from_words(name: str, lines: Mapping[str, Iterable[str]]) -> TextData:
    """Words between blanks, one end mark per line. The vocabulary is that of the training lines, most frequent first (ties by
    the alphabet); other words are unknown.

    >>> from_words("x", {"train": ["a b a"], "test": ["b c <unk>"]}).vocabulary
    ('a', '<eos>', '<unk>', 'b')
    """
    words = {split: [word for line in found for word in (*line.split(), END)] for split, found in lines.items()}
    counts = Counter(words["train"])
    counts[UNKNOWN] += 1  # there in any case
    vocabulary = tuple(sorted(counts, key=lambda word: (-counts[word], word)))
    numbers = {word: number for number, word in enumerate(vocabulary)}
    other = numbers[UNKNOWN]
    tokens = {split: torch.tensor([numbers.get(word, other) for word in found]) for split, found in words.items()}
    return TextData(name, tokens["train"], tokens["test"], vocabulary, lambda numbers: _sentences(vocabulary, numbers))


def from_characters(name: str, train: str, test: str, unknown: bool = False) -> TextData:
    """Characters, in the order of their codes. The vocabulary is that of both parts or, with `unknown`, that of the training
    part and, at its end, one token for all other characters."""
    first, second = _codes(train), _codes(test)
    known = np.unique(first if unknown else np.concatenate((first, second)))
    vocabulary = (*map(chr, known.tolist()), *((UNKNOWN,) if unknown else ()))
    one, other = (np.searchsorted(known, part) for part in (first, second))
    if unknown:
        other[~np.isin(second, known)] = len(known)
    lost = unknown and bool((other == len(known)).any())
    size = None if lost else len(test.encode())
    return TextData(name, torch.from_numpy(one), torch.from_numpy(other), vocabulary, test_bytes=size)


def from_bytes(name: str, train: str, test: str) -> TextData:
    """Bytes of the text in UTF-8; the vocabulary is all 256."""
    one, other = (torch.from_numpy(np.frombuffer(part.encode(), np.uint8).astype(np.int64)) for part in (train, test))
    vocabulary = tuple(f"<0x{byte:02X}>" for byte in range(256))
    return TextData(name, one, other, vocabulary, lambda numbers: bytes(numbers).decode(errors="replace"), len(other))


def _sentences(vocabulary: Sequence[str], numbers: Iterable[int]) -> str:
    return (
        " ".join("\n" if vocabulary[n] == END else vocabulary[n] for n in numbers)
        .replace(" \n", "\n")
        .replace("\n ", "\n")
    )


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def read_lines(folder: Path, names: Mapping[str, str]) -> dict[str, list[str]]:
    """The lines of one text file per split, looked for in `folder` and below.

    Raises:
        UserError: a file that is missing, or as `read_text`.
    """
    found = {}
    for split, name in names.items():
        paths = sorted(path for path in folder.rglob(name) if path.is_file())
        if not paths:
            raise UserError(
                f"there is no {name} in {folder}: give the folder that holds {' and '.join(names.values())}."
            )
        found[split] = lines_of(read_text(paths[0]))
        if not any(found[split]):
            raise UserError(f"{paths[0]} is empty: replace the file.")
    return found
