"""Pairs of sentences of one's own, in two languages whose names are found in the data.

    train.en and train.de, also train.en.txt        line by line; the languages are the suffixes, in the order of the alphabet
    *.tsv, *.csv                                    the first line names the columns, which are the languages, in their order
    *.parquet                                       two columns of text, in their order, or one called translation that has both

`columns` names two of several, or the other direction. Without test files a tenth of the pairs, at most 3,000, are for the
test.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourbit.data._cache import cached
from fourbit.data._delimited import read_delimited
from fourbit.data._sources import open_folder
from fourbit.data._splits import by_split, held_out, visible_files
from fourbit.data._text_files import lines_of, read_text
from fourbit.data._translation import (
    TOKENIZER_FILE,
    TranslationData,
    encode_pairs,
    from_tensors,
    load_tokenizer,
    read_rows,
    require_tokenizers,
)
from fourbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Pairs = dict[str, list[tuple[str, str]]]
Languages = tuple[str, str]

NUM_TOKENS, LONGEST = 8000, 250
MOST_HELD_OUT = 3000
LANGUAGE = re.compile(r"[a-z]{2,3}([_-][a-z0-9]+)*", re.IGNORECASE)
NO_LANGUAGES = ("csv", "tsv", "gz", "zip", "tar", "bz2", "xz", "md", "log", "py", "sh", "bpe", "pdf", "xml", "sgm")


def own_translation(name: str, folder: Path, columns: Sequence[str], tokenizer: str | None) -> TranslationData:
    """The data set in a folder.

    Args:
        columns: source and target, or ().
        tokenizer: the path of a file of the package tokenizers; None: tokenizer.json in the folder, else one is made.

    Raises:
        UserError: there are no pairs, or it is not clear which ones; a tokenizer that does not fit.
    """
    require_tokenizers()
    if columns and len(columns) != 2:
        raise UserError(f"--columns has {','.join(columns)}, but needs two: source and target.")
    file = folder / TOKENIZER_FILE if tokenizer is None else Path(tokenizer).expanduser()
    if tokenizer is not None and not file.is_file():
        raise UserError(f"there is no tokenizer {file}: give the path of a file tokenizer.json, or leave it out.")
    own = file if file.is_file() else None
    if found := visible_files(folder, (".parquet",)):
        languages, rows = pairs_of_tables(open_folder(by_split(folder, found)), columns)
    elif found := visible_files(folder, (".tsv", ".csv")):
        languages, rows = _from_lists(folder, found, columns)
    else:
        languages, rows = _from_parallel_files(folder, columns)
    return make_translation(name, languages, rows, own)


def make_translation(name: str, languages: Languages, rows: Pairs, tokenizer: Path | None) -> TranslationData:
    """The data set of these pairs; the cache knows them by their text."""
    if tokenizer is not None:
        load_tokenizer(tokenizer)
    rows = rows if "test" in rows else _split(rows["train"])
    digest = hashlib.sha256(f"{NUM_TOKENS} {LONGEST} ".encode() + (tokenizer.read_bytes() if tokenizer else b""))
    for split, found in rows.items():
        for row in found:
            digest.update(repr((split, row)).encode())
    tensors = cached(name, digest.hexdigest()[:16], lambda: encode_pairs(rows, NUM_TOKENS, LONGEST, tokenizer))
    return from_tensors(name, tensors, languages)


def pairs_of_tables(tables: Mapping[str, Dataset], columns: Sequence[str]) -> tuple[Languages, Pairs]:
    """From `datasets` tables, one per split."""
    head = tables["train"]
    strings = [name for name in head.column_names if str(getattr(head.features[name], "dtype", "")).endswith("string")]
    if "translation" in head.column_names:
        strings = _inside(head.features["translation"]) or strings
    languages = _two(strings, columns, ", ".join(head.column_names))
    return languages, read_rows(tables, languages, "the data")


def _inside(feature: Any) -> list[str]:
    return list(getattr(feature, "languages", None) or (feature if isinstance(feature, dict) else ()))


def _two(found: Sequence[str], columns: Sequence[str], there: str) -> Languages:
    for name in columns:
        if name not in found:
            raise UserError(
                f"there is no language {name}, only {', '.join(found) or there}: name others with --columns."
            )
    if columns:
        return columns[0], columns[1]
    if len(found) != 2:
        raise UserError(
            f"which two of {there} are source and target is unclear: name them with --columns SOURCE,TARGET."
        )
    return found[0], found[1]


def _from_lists(folder: Path, paths: list[Path], columns: Sequence[str]) -> tuple[Languages, Pairs]:
    languages, rows = None, {}
    for split, files in by_split(folder, paths).items():
        rows[split] = []
        for path in files:
            found, head = read_delimited(path)
            languages = languages or _two(head, columns, f"the columns {', '.join(head)}")
            if not set(languages) <= set(head):
                raise UserError(
                    f"{path} has the columns {', '.join(head)}, and not {', '.join(languages)}: mend its first line."
                )
            source, target = (head.index(language) for language in languages)
            rows[split] += [(row[source], row[target]) for _, row in found]
    assert languages is not None
    return languages, rows


def _from_parallel_files(folder: Path, columns: Sequence[str]) -> tuple[Languages, Pairs]:
    groups: dict[Path, dict[str, Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        bare = path.with_suffix("") if path.suffix.lower() == ".txt" else path
        language = bare.suffix[1:]
        if LANGUAGE.fullmatch(language) and language.lower() not in NO_LANGUAGES and not path.name.startswith("."):
            groups.setdefault(bare.with_suffix(""), {})[language] = path
    groups = {stem: group for stem, group in groups.items() if len(group) > 1}
    if not groups:
        raise UserError(
            f"{folder} has no pairs of sentences: need files such as train.en and train.de, a .tsv file that names the "
            "languages in its first line, or parquet files."
        )
    there = sorted(set[str]().union(*groups.values()))
    languages = _two(there, columns, f"the languages {', '.join(there)}")
    rows: Pairs = {}
    stems = {group[languages[0]]: group for group in groups.values() if set(languages) <= set(group)}
    if not stems:
        raise UserError(
            f"{folder} has no two files of one name in {' and '.join(languages)}: name others with --columns."
        )
    for split, paths in by_split(folder, stems).items():
        rows[split] = []
        for path in paths:
            one, other = (stems[path][language] for language in languages)
            first, second = (lines_of(read_text(file)) for file in (one, other))
            if len(first) != len(second):
                raise UserError(
                    f"{one} has {len(first)} lines, but {other} {len(second)}: they must be translations line by line."
                )
            rows[split] += zip(first, second, strict=True)
    return languages, rows


def _split(rows: list[tuple[str, str]]) -> Pairs:
    chosen = held_out(torch.zeros(len(rows), dtype=torch.int64))
    chosen[chosen.nonzero().flatten()[MOST_HELD_OUT:]] = False
    picked = chosen.tolist()
    return {
        "train": [row for row, test in zip(rows, picked, strict=True) if not test],
        "test": [row for row, test in zip(rows, picked, strict=True) if test],
    }
