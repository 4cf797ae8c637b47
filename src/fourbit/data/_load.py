"""`load`: the data set that a name means, of the catalogue or of the hub."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.data._registered import DATASETS, Loader
from fourbit.errors import UserError

if TYPE_CHECKING:
    from fourbit.data._base import ImageData
    from fourbit.data._large_images import LargeImages
    from fourbit.data._speech import SpeechData
    from fourbit.data._text import TextData
    from fourbit.data._translation import TranslationData


def load(
    name: str, data_dir: str | Path | None = None, **options: Any
) -> ImageData | LargeImages | TextData | SpeechData | TranslationData:
    """The data set `name`, decoded, in memory.

    Args:
        name: one of `names()`, or hf:OWNER/NAME for any of the Hugging Face hub (see `_hub`).
        data_dir: folder with its files (in subfolders if need be): parquet with the split in the file name
            (train-00000-of-00002.parquet), or the text files that the data set is known by; of "text" also a file. None: from
            the Hugging Face hub.
        options: of data of one's own, see the functions in `own`: image_size, mirror, columns, tokenizer.

    Raises:
        UserError: unknown name, an option that the data set does not have, missing or unsuitable files, no connection to the
            hub.

    >>> data = load("digits")
    >>> data.train_x.shape, data.num_classes
    (torch.Size([1437, 1, 8, 8]), 10)
    """
    loader = hub_loader(name) if is_hub(name) else DATASETS[name]
    known = list(inspect.signature(loader).parameters)[1:]
    for option in options:
        if option not in known:
            takes = f"only {', '.join(known)}" if known else "and takes no options"
            raise UserError(f"{name} has no option {option}, {takes}: leave it out, or choose other data.")
    if data_dir is None:
        return loader(None, **options)
    folder = Path(data_dir).expanduser()
    if folder.is_file() and name != "text":
        raise UserError(f"the data folder {folder} is a file: give the folder that it lies in.")
    if not folder.exists():
        raise UserError(f"there is no data folder {folder}: give an existing one, or none to use the hub.")
    return loader(folder, **options)


HUB = "hf:"


def is_hub(name: str) -> bool:
    """Whether a name means a data set of the hub."""
    return name.startswith(HUB)


def hub_loader(name: str) -> Loader:
    """The loader of such a name."""
    from fourbit.data._hub import load_hub

    def load_named(
        data_dir: Path | None,
        image_size: int | None = None,
        mirror: bool = False,
        columns: Sequence[str] = (),
        tokenizer: str | None = None,
    ) -> ImageData | LargeImages | TextData | SpeechData | TranslationData:
        """Any data set of the Hugging Face hub, or a folder that the package datasets takes (hf:./folder), of images, sound,
        text or pairs of sentences: hf:OWNER/NAME?config=...&train=SPLIT&test=SPLIT&revision=..."""
        if data_dir is not None:
            raise UserError(f"{name} comes from the hub, or from the folder in its name: leave out --data-dir.")
        return load_hub(name.removeprefix(HUB), image_size, mirror, columns, tokenizer)

    return load_named
