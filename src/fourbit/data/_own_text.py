"""Text of one's own as a data set: which files are for what, and which tokens it is cut into.

Files are joined in the order of their names; each ends with a line end. Without test files, the test text is what follows the
first line end behind nine tenths (of one file after the other, joined).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fourbit.data._columns import text_column
from fourbit.data._pieces import decoded, encoded, from_pieces, num_pieces
from fourbit.data._sources import open_folder
from fourbit.data._splits import by_split, visible_files
from fourbit.data._text import TextData, from_bytes, from_characters, from_words
from fourbit.data._text_files import lines_of, read_text
from fourbit.data._translation import require_tokenizers
from fourbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

UNITS = ("characters", "bytes", "words", "bpe")


def find_text(folder: Path, columns: Sequence[str]) -> dict[str, str]:
    """The training text and, unless the files have none, the test text: of the .txt files in and below a folder, else of
    parquet files; or one file of text.

    Raises:
        UserError: there are none, or one that is not UTF-8 text.
    """
    if folder.is_file():
        return {"train": _ended(read_text(folder))}
    if files := visible_files(folder, (".txt",)):
        if columns:
            raise UserError(f"{folder} has text files, which have no columns: leave out --columns.")
        return {s: "".join(map(_ended, map(read_text, paths))) for s, paths in by_split(folder, files).items()}
    if tables := visible_files(folder, (".parquet",)):
        return text_of_tables(open_folder(by_split(folder, tables)), columns)
    raise UserError(f"{folder} has neither .txt nor parquet files: give the folder of your text.")


def text_of_tables(tables: Mapping[str, Dataset], columns: Sequence[str]) -> dict[str, str]:
    """The rows of the column `text`, of the only column of text, or of the chosen one, each ending with a line end."""
    head = tables["train"]
    strings = [name for name in head.column_names if str(getattr(head.features[name], "dtype", "")).endswith("string")]
    if len(columns) > 1:
        raise UserError(f"--columns has {','.join(columns)}, but text needs one: that of the text.")
    if not columns and "text" not in strings and len(strings) != 1:
        raise UserError(
            f"which of the columns {', '.join(head.column_names)} holds the text is unclear: name it with --columns."
        )
    name = columns[0] if columns else "text" if "text" in strings else strings[0]
    return {s: "".join(map(_ended, map(_plain, text_column(t, s, name)))) for s, t in tables.items()}


def make_text(name: str, texts: Mapping[str, str], tokenizer: str | None) -> TextData:
    """The data set of these texts.

    Args:
        texts: of the training and, maybe, the test split.
        tokenizer: "characters" (None), "bytes", "words", "bpe" or "bpe:4096" (pieces of words, see `_pieces`), or the path of a
            file of the package tokenizers. Characters and words that the training text does not have are unknown.

    Raises:
        UserError: a split is empty, or a tokenizer that cannot be used.
    """
    train, test = (texts["train"], texts["test"]) if "test" in texts else _cut(texts["train"])
    for split, text in (("train", train), ("test", test)):
        if not text.strip():
            raise UserError(f"the {split} part of the {name} is empty: give more of it.")
    unit = tokenizer or UNITS[0]
    if unit == "bytes":
        return from_bytes(name, train, test)
    if unit == "words":
        return from_words(name, {"train": lines_of(train), "test": lines_of(test)})
    if unit == "characters":
        return from_characters(name, train, test, unknown=True)
    if size := num_pieces(unit):
        return from_pieces(name, train, test, size)
    return _from_file(name, train, test, Path(unit).expanduser())


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _ended(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def _cut(text: str) -> tuple[str, str]:
    """Behind nine tenths, at the next line end if one follows that leaves something."""
    place = len(text) * 9 // 10
    end = text.find("\n", place, len(text) - 1) + 1
    return text[: end or place], text[end or place :]


def _from_file(name: str, train: str, test: str, path: Path) -> TextData:
    tokenizers = require_tokenizers()
    if not path.is_file():
        raise UserError(f"there is no tokenizer {path}: give {', '.join(UNITS)}, or the path of a file tokenizer.json.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path} is not a tokenizer of the package tokenizers ({error}): give another.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    numbers = tokenizer.get_vocab()
    vocabulary = [""] * (1 + max(numbers.values(), default=0))
    for token, number in numbers.items():
        vocabulary[number] = token
    parts = []
    for text in (train, test):
        try:
            parts.append(encoded(tokenizer, text))
        except Exception as error:
            raise UserError(
                f"the tokenizer {path} cannot encode the text ({error}): give it an unknown token, or give another."
            ) from error
    for split, tokens in zip(("train", "test"), parts, strict=True):
        if not len(tokens):
            raise UserError(f"the tokenizer {path} makes no token of the {split} text: give another.")
    size = len(test.encode()) if decoded(tokenizer, parts[1].tolist()) == test else None
    return TextData(name, parts[0], parts[1], tuple(vocabulary), lambda numbers: decoded(tokenizer, numbers), size)
