"""Any data set of the Hugging Face hub, or that the package `datasets` reads from a folder, by name:

    hf:ylecun/mnist
    hf:uoft-cs/cifar100?test=test[:20%]         parts of splits, as `datasets` writes them
    hf:wmt/wmt14?config=de-en&revision=main
    hf:./folder                                 a folder that `datasets.load_dataset` takes

What it holds follows from its columns, in this order: images, sound, a column of translations, text (a column `text`, or only
one of strings), or two columns of strings: pairs of sentences. Then it is read as one's own data of that kind (see `own`).
Its test split is what is called test, unless its labels are secret, or validation; else a part of the training split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl

from fourbit.data._base import ImageData
from fourbit.data._examples import from_tables
from fourbit.data._label_columns import is_file
from fourbit.data._large_images import LargeImages
from fourbit.data._own_images import IMAGES, make_images
from fourbit.data._own_speech import SOUNDS, make_own_speech
from fourbit.data._own_text import make_text, text_of_tables
from fourbit.data._own_translation import make_translation, pairs_of_tables
from fourbit.data._sources import fetch, fingerprint, is_unlabelled
from fourbit.data._speech import SpeechData
from fourbit.data._text import TextData
from fourbit.data._translation import TranslationData
from fourbit.errors import UserError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["images", "speech", "translation", "text"]
OPTIONS = ("config", "revision", "train", "test")
TAKES: dict[Kind, tuple[str, ...]] = {
    "images": ("image_size", "mirror"),
    "speech": (),
    "text": ("tokenizer",),
    "translation": ("tokenizer",),
}
"""Options, beside columns, by kind."""


def load_hub(
    rest: str, image_size: int | None, mirror: bool, columns: Sequence[str], tokenizer: str | None
) -> ImageData | LargeImages | TextData | SpeechData | TranslationData:
    """The data set that the name behind hf: means.

    Raises:
        UserError: it cannot be had, it holds nothing to be trained on, or an option is not for what it holds.
    """
    name, _, query = rest.partition("?")
    values = dict(parse_qsl(query, keep_blank_values=True))
    for key in values:
        if key not in OPTIONS:
            raise unknown(f"option of hf:{name}", key, OPTIONS)
    if not name:
        raise UserError("hf: needs the name of a data set, as in hf:ylecun/mnist, or a folder, as in hf:./folder.")
    tables = _splits(name, values)
    kind = _kind(tables["train"], columns, rest)
    given = {"image_size": image_size is not None, "mirror": mirror, "tokenizer": tokenizer is not None}
    for option, set_ in given.items():
        if set_ and option not in TAKES[kind]:
            raise UserError(f"hf:{rest} holds {kind}, which has no option {option}: leave it out.")
    if kind == "text":
        return make_text(kind, text_of_tables(tables, columns), tokenizer)
    if kind == "translation":
        languages, rows = pairs_of_tables(tables, columns)
        return make_translation(kind, languages, rows, None if tokenizer is None else Path(tokenizer).expanduser())
    key = fingerprint(" ".join(str(table._fingerprint) for table in tables.values()))
    if kind == "speech":
        return make_own_speech(kind, from_tables(tables, SOUNDS, columns, key))
    return make_images(kind, from_tables(tables, IMAGES, columns, key), image_size, mirror)


def _splits(name: str, values: dict[str, str]) -> dict[str, Dataset]:
    chosen = {split: values[split] for split in ("train", "test") if split in values}
    found = fetch(name, values.get("config"), values.get("revision"), chosen)
    if "train" not in found:
        raise UserError(
            f"hf:{name} has the splits {', '.join(found)}, and none called train: choose one, as in hf:{name}?train="
            f"{next(iter(found), 'train')}."
        )
    others = [s for s in ("test", "validation") if s in found and not is_unlabelled(found[s])]
    return {"train": found["train"], **({"test": found[others[0]]} if others else {})}


def _kind(table: Dataset, columns: Sequence[str], rest: str) -> Kind:
    names = list(columns) or table.column_names
    for name in columns:
        if name not in table.column_names and "translation" not in table.column_names:
            raise UserError(
                f"hf:{rest} has no column {name}, only {', '.join(table.column_names)}: name others with --columns."
            )
    features = {name: table.features[name] for name in names if name in table.features}
    tests: list[tuple[Kind, Callable[[Any], bool]]] = [
        ("images", lambda feature: type(feature).__name__ == "Image"),
        ("speech", lambda feature: type(feature).__name__ == "Audio"),
        ("images", is_file),
    ]
    for kind, test in tests:
        if any(map(test, features.values())):
            return kind
    if "translation" in table.features:
        return "translation"
    strings = [name for name, feature in features.items() if str(getattr(feature, "dtype", "")).endswith("string")]
    if "text" in strings or len(strings) == 1:
        return "text"
    if len(strings) == 2:
        return "translation"
    raise UserError(
        f"hf:{rest} has the columns {', '.join(table.column_names)}, and which to train on is unclear: name those of image and "
        "label, of sound and label, of the text, or of both languages with --columns."
    )
