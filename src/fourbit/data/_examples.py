"""One's own files with a label each, images or sound: from folders named like the classes, a list, or tables.

    DIR/train/CLASS/..., DIR/test/CLASS/...     the test folder may be called val, valid or validation, too
    DIR/CLASS/...                               a tenth of each class is for the test (see `_splits`)
    DIR/metadata.csv, also .tsv                 columns with the file, relative to the list, and its label; also as train.csv
                                                and test.csv, in the folders train and test, or with a column split
    DIR/*.parquet                               columns with the content of the file, and its label

Classes are what is found as labels of the training examples, sorted; names that a table declares keep their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourbit.data._base import SPLITS, check_labels
from fourbit.data._delimited import read_delimited
from fourbit.data._label_columns import Cells, table_columns
from fourbit.data._sources import fingerprint, open_folder
from fourbit.data._splits import WORDS, by_split, held_out, is_visible, visible_files
from fourbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

LISTS = ("metadata", "manifest", *WORDS)
"""Names of lists of files, without the suffix."""
FILE_COLUMNS = ("file_name", "file", "filename", "path", "file_path", "filepath", "image", "audio", "wav")
LABEL_COLUMNS = ("label", "class", "category", "transcript", "transcription", "text", "sentence", "word")
Labels = Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class Kind:
    """What the files are.

    Args:
        files: the word for them.
        suffixes: of their names.
        columns: names of the columns of tables that hold them, where the type does not tell.
    """

    files: str
    suffixes: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Examples:
    """Files and their labels.

    Args:
        files: by split, paths or contents.
        labels: by split, int64 [N].
        classes: name of each class.
        key: hash that changes with the files and the labels.
    """

    files: Mapping[str, Sequence[Path | bytes]]
    labels: Mapping[str, Tensor]
    classes: tuple[str, ...]
    key: str

    def where(self, split: str, index: int) -> str:
        """The words for an example in errors."""
        files = self.files[split]
        source = files[index]
        if isinstance(files, Picked):
            split, index = "train", files.rows[index]
        return str(source) if isinstance(source, Path) else f"row {index} of {split}"


class Picked(Sequence[Path | bytes]):
    """Some of a sequence."""

    def __init__(self, files: Sequence[Path | bytes], rows: Tensor):
        self.files, self.rows = files, rows.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Path | bytes:  # type: ignore[override]
        return self.files[self.rows[index]]


def find_examples(folder: Path, kind: Kind, columns: Sequence[str]) -> Examples:
    """The examples below a folder, in one of the layouts.

    Args:
        columns: of the file and of the label, in tables and lists; (): found by name or type.

    Raises:
        UserError: there are none, it is not clear which column is meant, there is but one class, or one in the test alone.
    """
    if lists := _lists(folder):
        return _from_lists(folder, lists, kind, columns)
    if tables := visible_files(folder, (".parquet",)):
        files = by_split(folder, tables)
        return from_tables(open_folder(files), kind, columns, fingerprint("", files, folder))
    if columns:
        raise UserError(f"{folder} has neither parquet files nor a list such as metadata.csv: leave out --columns.")
    return _from_folders(folder, kind)


def from_tables(tables: Mapping[str, Dataset], kind: Kind, columns: Sequence[str], key: str) -> Examples:
    """From `datasets` tables, one per split. Raises UserError as `find_examples`."""
    file, label, names = table_columns(tables["train"], kind.columns, columns)
    for split, table in tables.items():
        for column in (file, label):
            if column not in table.column_names:
                raise UserError(
                    f"the {split} split has no column {column}, as the training split has, only "
                    f"{', '.join(table.column_names)}: are both of one data set?"
                )
        if getattr(table.features[label], "names", None) != (None if names is None else list(names)):
            raise UserError(f"train and {split} declare different classes in column {label}: are both of one data set?")
    files = {split: Cells(table, file, f"{split}") for split, table in tables.items()}
    labels: dict[str, Labels] = {split: cells.labels(label) for split, cells in files.items()}
    return _made(files, labels, kind, f"{key} {file} {label}", names)


def _from_folders(folder: Path, kind: Kind) -> Examples:
    folder = _unwrapped(folder)
    splits = {word: sub for sub in _subfolders(folder) if (word := sub.name.lower()) in WORDS}
    train = next((splits[word] for word in WORDS if word in splits and WORDS[word] == "train"), None)
    if train is None and splits:
        raise UserError(f"{folder} has a folder {next(iter(splits.values())).name} and none called train: add one.")
    found = {"train": _by_class(folder if train is None else train, kind)}
    if not found["train"]:
        below = folder if train is None else train
        flat = len(visible_files(below, kind.suffixes))
        raise UserError(
            f"{below} has {flat or 'no'} {kind.files}{' in no folders of classes' if flat else ''}: need a folder for each "
            f"class, CLASS/NAME{kind.suffixes[0]}, parquet files, or a list metadata.csv (files: {', '.join(kind.suffixes)})."
        )
    for name in ("test", "validation"):  # files of a test that are in no folder of a class have no labels
        for word, sub in splits.items():
            if WORDS[word] == name and "test" not in found and (rows := _by_class(sub, kind)):
                found["test"] = rows
    files = {split: [path for path, _ in rows] for split, rows in found.items()}
    key = fingerprint(kind.files, files, folder)
    return _made(files, {split: [label for _, label in rows] for split, rows in found.items()}, kind, key)


def _unwrapped(folder: Path) -> Path:
    """The only folder in it, where that has folders again: archives often wrap what they hold."""
    inside = _subfolders(folder)
    if len(inside) == 1 and inside[0].name.lower() not in WORDS and _subfolders(inside[0]):
        return _unwrapped(inside[0])
    return folder


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_visible(Path(path.name)))


def _by_class(folder: Path, kind: Kind) -> list[tuple[Path, str]]:
    return [(path, sub.name) for sub in _subfolders(folder) for path in visible_files(sub, kind.suffixes)]


def _lists(folder: Path) -> list[Path]:
    found = [path for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}.[ct]sv")]
    return sorted(path for path in found if path.stem.lower() in LISTS and is_visible(path.relative_to(folder)))


def _from_lists(folder: Path, lists: list[Path], kind: Kind, columns: Sequence[str]) -> Examples:
    files: dict[str, list[Path]] = {}
    labels: dict[str, list[str]] = {}
    if columns and len(columns) != 2:
        raise UserError(f"--columns has {','.join(columns)}, but needs two: those of file and label.")
    for split, paths in by_split(folder, lists).items():
        for path in paths:
            rows, head = read_delimited(path)
            file = _column(path, head, FILE_COLUMNS, columns[0] if columns else None, "file")
            label = _column(path, head, LABEL_COLUMNS, columns[1] if columns else None, "label", file)
            own = head.index("split") if "split" in head else None
            for number, row in rows:
                named = split if own is None else WORDS.get(row[own].strip().lower())
                if named is None:
                    raise UserError(f"line {number} of {path} has the split {row[own or 0]!r}: write train or test.")
                place = path.parent / row[file].strip()
                if not place.is_file():
                    raise UserError(
                        f"line {number} of {path} names {place}, which is not there: add it, or remove the line."
                    )
                if not row[label].strip():
                    raise UserError(f"line {number} of {path} has no {head[label]}: fill it in, or remove the line.")
                files.setdefault(named, []).append(place)
                labels.setdefault(named, []).append(" ".join(row[label].split()))
    instead_files, instead_labels = files.pop("validation", []), labels.pop("validation", [])
    if instead_files and "test" not in files:
        files["test"], labels["test"] = instead_files, instead_labels
    if "train" not in files:
        raise UserError(f"{lists[0]} has no {kind.files} to train with: add some.")
    key = fingerprint(kind.files, files, folder)
    return _made(files, labels, kind, key)


def _column(
    path: Path, head: list[str], known: Sequence[str], chosen: str | None, what: str, but: int | None = None
) -> int:
    """The place of a column: the chosen one, else the first with a known name, in upper or lower case."""
    if chosen is not None and chosen not in head:
        raise UserError(f"{path} has no column {chosen}, only {', '.join(head)}: name others with --columns.")
    names = [name.lower() for name in head] if chosen is None else head
    for name in known if chosen is None else (chosen,):
        if name in names and names.index(name) != but:
            return names.index(name)
    raise UserError(
        f"{path} has the columns {', '.join(head)}, and which one is the {what} is unclear: name those of file and label with "
        "--columns FILE,LABEL."
    )


def _made(
    files: Mapping[str, Sequence[Path | bytes]],
    labels: Mapping[str, Labels],
    kind: Kind,
    key: str,
    names: Sequence[str] | None = None,
) -> Examples:
    """With numbers for labels, and a test split."""
    classes, numbers = _numbered(labels, names)
    if len(classes) < 2:
        raise UserError(
            f"all {kind.files} are of one class, {', '.join(classes)}: a network that tells classes apart needs two at least."
        )
    if "test" not in files:
        chosen = held_out(numbers["train"])
        if not chosen.any():
            raise UserError(f"each class has but one of the {kind.files}, and no test split: add some to test with.")
        rows = {"train": (~chosen).nonzero().flatten(), "test": chosen.nonzero().flatten()}
        files = {split: Picked(files["train"], rows[split]) for split in SPLITS}
        numbers = {split: numbers["train"][rows[split]] for split in SPLITS}
    labelled = b"".join(numbers[split].numpy().tobytes() for split in SPLITS)
    made = Examples(files, numbers, classes, fingerprint(f"{key} {hashlib.sha256(labelled).hexdigest()}"))
    seen = numbers["train"].bincount(minlength=len(classes)) > 0
    unseen = (~seen[numbers["test"]]).nonzero()
    if len(unseen):
        row = int(unseen[0])
        raise UserError(
            f"{made.where('test', row)} is of class {classes[int(numbers['test'][row])]}, which none of the {kind.files} to "
            "train with has: are both splits of one data set?"
        )
    return made


def _numbered(labels: Mapping[str, Labels], names: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    if names is not None:
        numbers = {split: torch.tensor(found, dtype=torch.int64) for split, found in labels.items()}
        for split, found in numbers.items():
            check_labels(found, len(names), split)
        return tuple(names), numbers
    values: list = sorted({label for found in labels.values() for label in found})
    order = {value: number for number, value in enumerate(values)}
    numbers = {split: torch.tensor([order[label] for label in found]) for split, found in labels.items()}
    return tuple(map(str, values)), numbers
