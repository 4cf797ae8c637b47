"""Opening parquet data with Hugging Face `datasets`: from a local folder or from the hub.

A folder may hold the files at any depth, as a copy of a hub repository does (plain_text/train-00000-of-00002.parquet or
plain_text/train/0000.parquet). The split is the word "train" or "test" in the file name, else in a folder name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fourbit.data._base import SPLITS
from fourbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

INSTALL = "pip install 'fourbit[train]'"
HUB_TIMEOUT_S = 10


def find_parquet(
    folder: Path, instead: Mapping[str, str] | None = None, first: Mapping[str, str] | None = None
) -> dict[str, list[Path]]:
    """The parquet files of each split below `folder`, sorted by path.

    Args:
        instead: {split: the word in file names that stands for it where no file has its own}.
        first: {split: the word in file names that stands for it where there are such files, before its own}.

    Raises:
        UserError: no parquet file, none for a split, or those of a split in several folders (several data sets).
    """
    files = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    if not files:
        raise UserError(f"no parquet file in {folder} or its subfolders: give the folder that holds the data set.")
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in files:
        split = split_of(path.relative_to(folder))
        if split is not None:
            found[split].append(path)
    for split, word in {**(instead or {}), **(first or {})}.items():
        others = [path for path in files if split_of(path.relative_to(folder), (word,))]
        found[split] = others or found[split] if split in (first or {}) else found[split] or others
    for split, paths in found.items():
        if not paths:
            example = files[0].relative_to(folder)
            raise UserError(
                f"no {split} split in {folder}: name its files like {split}-00000-of-00001.parquet "
                f"(found {len(files)} files such as {example})."
            )
        parents = sorted({str(path.parent) for path in paths})
        if len(parents) > 1:
            raise UserError(
                f"{split} files lie in several folders below {folder}: give the folder of one data set, "
                f"such as {parents[0]}."
            )
    return found


def split_of(path: Path, splits: Sequence[str] = SPLITS) -> str | None:
    """The split that a path relative to the data folder belongs to: the file name decides before the folders.

    >>> split_of(Path("plain_text/train-00000-of-00002.parquet")), split_of(Path("test/0000.parquet"))
    ('train', 'test')
    """
    for part in (path.stem, *reversed(path.parent.parts)):
        words = re.split(r"[^a-z]+", part.lower())
        for split in splits:
            if split in words:
                return split
    return None


def fingerprint(name: str, files: Mapping[str, list[Path]] | None = None, folder: Path | None = None) -> str:
    """Hash of `name` and of the path in `folder`, size and modification time of every file: 16 hex digits."""
    lines = [name]
    for split, paths in (files or {}).items():
        for path in paths:
            status = path.stat()
            lines.append(f"{split} {path.relative_to(folder or '')} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def open_folder(files: Mapping[str, list[Path]]) -> dict[str, Dataset]:
    """The splits in `files` as `datasets` tables.

    Raises:
        UserError: a file that is not readable parquet, or files of a split with different columns.
    """
    try:
        import datasets
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"this data set needs the package datasets: {INSTALL}.") from error
    for path in (path for paths in files.values() for path in paths):
        try:
            rows = pq.read_metadata(
                path
            ).num_rows  # only the footer: names the damaged file, which `datasets` would not
        except Exception as error:
            raise UserError(f"cannot read {path} as parquet: replace the file ({_first_line(error)}).") from error
        if not rows:
            raise UserError(f"{path} has no rows: replace the file, or remove it if there are others.")
    try:
        with _quiet():
            # Not load_dataset("parquet"), which asks the hub for a page even when all files are local.
            return {
                split: cast(datasets.Dataset, datasets.Dataset.from_parquet([str(path) for path in paths]))
                for split, paths in files.items()
            }
    except Exception as error:
        folder = next(iter(files.values()))[0].parent
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"cannot read the parquet files in {folder}: replace them ({reason}).") from error


def open_hub(hub_id: str, subset: str | None = None) -> dict[str, Dataset]:
    """The splits of the hub's data set `hub_id` as `datasets` tables, downloaded if they are not in its cache.

    Raises:
        UserError: the hub cannot be reached, or the data set lacks a split.
    """
    splits = fetch(hub_id, subset)
    if "validation" in splits and ("test" not in splits or is_unlabelled(splits["test"])):
        splits["test"] = splits["validation"]
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise UserError(f"{hub_id} on the hub has no {missing[0]} split: give a folder that has one with --data-dir.")
    return {split: splits[split] for split in SPLITS}


def fetch(
    name: str, subset: str | None = None, revision: str | None = None, chosen: Mapping[str, str] | None = None
) -> dict[str, Dataset]:
    """The splits of a data set of the hub, or of a folder that `datasets` takes.

    Args:
        name: OWNER/NAME, or the path of the folder.
        chosen: the expression of `datasets` that stands for a split; the others are then not fetched.

    Raises:
        UserError: the hub cannot be reached, or what is asked for is not there.
    """
    try:
        import datasets
        from datasets import config
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(f"this data set needs the package datasets: {INSTALL}.") from error
    local = Path(name).expanduser().is_dir()
    options: dict[str, Any] = {
        key: value for key, value in (("name", subset), ("revision", revision)) if value is not None
    }
    try:
        if not local and not config.HF_HUB_OFFLINE:
            # Fails at once where load_dataset would retry for half a minute.
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        place = str(Path(name).expanduser()) if local else name
        with _quiet():
            if chosen:
                return {s: cast(Any, datasets.load_dataset(place, split=e, **options)) for s, e in chosen.items()}
            return dict(cast(Any, datasets.load_dataset(place, **options)))
    except Exception as error:  # network, proxy, HTTP and cache errors of four packages
        if local:
            raise UserError(
                f"datasets cannot read the folder {name} ({_first_line(error)}): give one that it takes, or --data-dir."
            ) from error
        raise UserError(
            f"cannot get {name} from the Hugging Face hub ({_first_line(error)}): check the network and the name, "
            f"or download its parquet files and give their folder with --data-dir."
        ) from error


def is_unlabelled(table: Dataset) -> bool:
    """Whether a test split keeps its labels secret, as ImageNet's does: they are all -1."""
    if "label" not in table.column_names or not len(table):
        return False
    return table.select_columns(["label"])[0]["label"] == -1  # of a whole row, the file would be decoded


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines from `datasets` (its errors are raised as well), and no progress bars where there is no terminal."""
    import datasets
    from rich.console import Console

    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not Console(stderr=True).is_terminal:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
