"""Which examples of one's own data are for training and which for the test: by names, else by a fixed rule.

A file belongs to the split that a word of its name says, else a word of one of its folders: train or training; test or
testing; where no file says test: validation, valid, val, dev or eval. Files without such a word are for training if none says
train. Data without a test split give a tenth of them to it, always the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fourbit.data._random import generator
from fourbit.data._sources import split_of
from fourbit.errors import UserError

WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
HELD_OUT = 10
"""One in so many examples is for the test, where the data do not say which."""


def by_split(folder: Path, paths: Iterable[Path]) -> dict[str, list[Path]]:
    """The training files and, unless there are none, the test files, in the order of `paths`.

    Raises:
        UserError: there are test files alone.
    """
    found: dict[str, list[Path]] = {"train": [], "test": [], "validation": [], "": []}
    for path in paths:
        word = split_of(path.relative_to(folder), tuple(WORDS))
        found[WORDS[word] if word else ""].append(path)
    train, test = found["train"] or found[""], found["test"] or found["validation"]
    if not train:
        raise UserError(
            f"{folder} has files to test with, such as {test[0].relative_to(folder)}, and none to train with: add some, with "
            "train in their names."
        )
    return {"train": train, "test": test} if test else {"train": train}


def held_out(labels: Tensor) -> Tensor:
    """Which of these examples are for the test, bool [N]: of each class a tenth, at least one unless it has but one.

    >>> held_out(torch.tensor([0, 0, 0, 1])).sum()
    tensor(1)
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        count = max(len(rows) // HELD_OUT, int(len(rows) > 1))
        order = torch.randperm(len(rows), generator=generator("held out", label))
        chosen[rows[order[:count]]] = True
    return chosen


def visible_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files below a folder with one of these suffixes, sorted; without hidden ones and what archives of macOS add."""
    wanted = tuple(suffixes)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in wanted and is_visible(path.relative_to(folder)) and path.is_file()
    )


def is_visible(path: Path) -> bool:
    """Whether no part of a path is hidden."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
