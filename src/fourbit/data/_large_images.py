"""Photographs of any size that do not fit into memory: decoded when a batch needs them, by worker processes.

Training images are cut out at a random place, of 8 to 100 % of the area and an aspect from 3/4 to 4/3, scaled to the size
that the network reads, and mirrored at random; test images are scaled so that the shorter side is 8/7 of it, and the middle is
cut out (Szegedy et al., arXiv 1409.4842, and He et al., arXiv 1512.03385). What is drawn for an image depends on (seed, epoch,
index of the image), not on workers or batches.

Two layouts are read: folders train/CLASS/*.JPEG and val/CLASS/*.JPEG, as ImageNet is unpacked, and parquet files with the
columns image and label, as the hub has them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fourbit.data._base import SPLITS, check_labels
from fourbit.data._columns import file_column, number_column
from fourbit.data._pixels import SUFFIXES, converted, opened
from fourbit.data._random import generator
from fourbit.data._sources import find_parquet, open_folder
from fourbit.errors import UserError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, per channel, of pixel/255."""
FOLDERS = {"train": ("train",), "test": ("val", "validation", "test")}


@dataclass(frozen=True, eq=False)
class LargeImages:
    """A labelled set of photographs on disk.

    Args:
        name: its name in the catalogue.
        train, test: what `_open` takes: a path, or a table and a row of it.
        train_y, test_y: int64 [N], class numbers from 0.
        classes: name of each class.
        image_size: height and width of what the network reads.
        mean, std: per channel, of pixel/255 over training images.
        channels: 1 for grey, 3 for colour.
        mirror: whether training images are mirrored at random.
    """

    name: str
    train: Sequence[Any]
    train_y: Tensor
    test: Sequence[Any]
    test_y: Tensor
    classes: tuple[str, ...]
    image_size: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels: int = 3
    mirror: bool = True
    examples: ClassVar[str] = "images"

    def __post_init__(self):
        for split in SPLITS:
            images, labels = self.split(split)
            if not len(images):
                raise UserError(f"{split} of {self.name} has no images: give the folder of the data set.")
            check_labels(labels, self.num_classes, f"{split} of {self.name}")

    def split(self, name: str) -> tuple[Sequence[Any], Tensor]:
        """Images and labels of "train" or "test"; UserError for another name."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return (self.train, self.train_y) if name == "train" else (self.test, self.test_y)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


class Rows:
    """The images of a `datasets` table, by row."""

    def __init__(self, table: Any, column: str):
        self.table, self.column = table, column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> bytes:
        return self.table[row][self.column]["bytes"]


def open_large_images(name: str, folder: Path) -> LargeImages:
    """From either layout.

    Raises:
        UserError: neither, or classes that differ between the splits.
    """
    if any(
        (folder / word).is_dir() and any(p.is_dir() for p in (folder / word).iterdir()) for word in FOLDERS["train"]
    ):
        return _from_folders(name, folder)
    if not any(folder.rglob("*.parquet")):
        raise UserError(
            f"{folder} holds neither folders train/CLASS and val/CLASS nor parquet files: give the folder of {name} in one "
            "of the two layouts."
        )
    return from_tables(name, open_folder(find_parquet(folder, first={"test": "validation"})))


def _from_folders(name: str, folder: Path) -> LargeImages:
    found: dict[str, list[tuple[Path, str]]] = {}
    for split, words in FOLDERS.items():
        below = next((folder / word for word in words if (folder / word).is_dir()), None)
        if below is None:
            raise UserError(
                f"{folder} has no folder {' or '.join(words)}: need train/CLASS/*.JPEG and val/CLASS/*.JPEG."
            )
        found[split] = [
            (path, sub.name)
            for sub in sorted(p for p in below.iterdir() if p.is_dir())
            for path in sorted(sub.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not found[split]:
            raise UserError(f"{below} has no folders of images: need one folder per class, such as {below}/n01440764.")
    classes = tuple(dict.fromkeys(label for _, label in found["train"]))
    numbers = {label: number for number, label in enumerate(classes)}
    for path, label in found["test"]:
        if label not in numbers:
            raise UserError(
                f"{path} is of class {label}, which no training image has: are the folders of one data set?"
            )
    labels = {split: torch.tensor([numbers[label] for _, label in rows]) for split, rows in found.items()}
    images = {split: [path for path, _ in rows] for split, rows in found.items()}
    return LargeImages(name, images["train"], labels["train"], images["test"], labels["test"], classes)


def from_tables(name: str, tables: dict[str, Any]) -> LargeImages:
    """From `datasets` tables with the columns image and label.

    Raises:
        UserError: other columns, or rows without an image or a label.
    """
    from datasets import Image

    images, labels, names = {}, {}, {}
    for split, table in tables.items():
        where = f"{split} of {name}"
        file_column(table, where, "image")
        images[split] = Rows(table.cast_column("image", Image(decode=False)), "image")
        labels[split] = number_column(table, where, "label")
        names[split] = tuple(getattr(table.features["label"], "names", None) or ())
    if names["train"] != names["test"]:
        raise UserError(f"train and test of {name} have different classes: are the files of one data set?")
    largest = max([0, *(int(y.max()) for y in labels.values() if len(y))])
    classes = names["train"] or tuple(map(str, range(largest + 1)))
    return LargeImages(name, images["train"], labels["train"], images["test"], labels["test"], classes)


def _leave_signals_to_the_parent(closing: Any, parent: int, worker: int) -> None:
    """Ctrl-C and SIGTERM often go to all processes of a job; the one that trains finishes its step with these workers. Only
    when it has closed the stream, or is gone, SIGTERM ends a worker, one that hangs too."""

    def end(number: int, frame: Any) -> None:
        if closing.value or os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


def large_batches(
    data: LargeImages,
    split: str,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: bool,
    indices: range,
    workers: int | None = None,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `batches`, for the batches with these indices.

    Args:
        workers: processes that decode; None: one less than there are cores, at most 8.
        part: of each batch; the rest is not decoded.
    """
    labels = data.split(split)[1]
    training = split == "train"
    order = (
        torch.randperm(len(labels), generator=generator("order", seed, epoch))
        if training
        else torch.arange(len(labels))
    )
    picked = [order[k * batch_size : (k + 1) * batch_size][part].tolist() for k in indices]
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 0
    closing = multiprocessing.RawValue("b", 0)
    decoded = torch.utils.data.DataLoader(
        _Decoded(data, split, seed, epoch, training and augment),  # type: ignore[arg-type]
        batch_sampler=[rows for rows in picked if rows],
        num_workers=workers,
        worker_init_fn=partial(_leave_signals_to_the_parent, closing, os.getpid()),
        generator=torch.Generator(),  # else it draws from torch's global one, and dropout with it
    )
    offset = torch.tensor(data.mean).mul(255).view(-1, 1, 1)
    factor = torch.tensor(data.std).mul(255).reciprocal().view(-1, 1, 1)
    try:
        images = iter(decoded)
        for rows in picked:
            x = next(images) if rows else torch.empty(0, data.channels, data.image_size, data.image_size)
            yield x.to(torch.float32).sub_(offset).mul_(factor), labels[rows]
    except UserError as error:  # from a worker it comes with the worker's stack
        raise UserError(
            str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        ) from None
    finally:
        closing.value = 1


class _Decoded(torch.utils.data.Dataset[Tensor]):
    """Image number i as the network reads it, uint8 [C, H, W]."""

    def __init__(self, data: LargeImages, split: str, seed: int, epoch: int, augment: bool):
        self.name, self.images, self.size = f"{split} of {data.name}", data.split(split)[0], data.image_size
        self.channels, self.mirror = data.channels, data.mirror
        self.seed, self.epoch, self.augment = seed, epoch, augment

    def __getitem__(self, index: int) -> Tensor:
        image = self._open(index)
        if self.augment:
            image = _random_part(image, self.size, generator("augment", self.seed, self.epoch, index), self.mirror)
        else:
            image = _middle(image, self.size)
        return torch.from_numpy(np.array(image)).view(self.size, self.size, self.channels).permute(2, 0, 1)

    def _open(self, index: int) -> Image:
        source = self.images[index]
        where = str(source) if isinstance(source, Path) else f"image {index} in {self.name}"
        return converted(opened(source, where), "RGB" if self.channels == 3 else "L", where)


def _random_part(image: Image, size: int, random: torch.Generator, mirror: bool = True) -> Image:
    """A random part, scaled to `size`, perhaps mirrored; after ten parts that do not fit, the largest middle one."""
    width, height = image.size
    for _ in range(10):
        draw = torch.rand(4, generator=random).tolist()
        area = width * height * (0.08 + 0.92 * draw[0])
        aspect = math.exp(math.log(3 / 4) + draw[1] * math.log(16 / 9))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw[2] * (width - w + 1)), int(draw[3] * (height - h + 1))
            break
    else:
        w = h = min(width, height)
        left, top = (width - w) // 2, (height - h) // 2
    from PIL import Image as images

    part = image.resize((size, size), images.Resampling.BILINEAR, (left, top, left + w, top + h))
    mirrored = mirror and float(torch.rand((), generator=random)) < 0.5
    return part.transpose(images.Transpose.FLIP_LEFT_RIGHT) if mirrored else part


def _middle(image: Image, size: int) -> Image:
    """The middle of the image, whose shorter side is scaled to 8/7 of `size` before."""
    from PIL import Image as images

    shorter = min(image.size) * 7 / 8
    left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
    return image.resize((size, size), images.Resampling.BILINEAR, (left, top, left + shorter, top + shorter))
