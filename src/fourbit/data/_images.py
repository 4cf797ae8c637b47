"""From parquet files or the hub to uint8 tensors: find the files, open them with `datasets`, decode, keep a cache.

The images of a split end up in one tensor [N, C, H, W], so all must have the size that the data set is known for.
Decoding runs in one thread: an image of this size takes 35 microseconds, less than handing it to another thread costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fourbit.data._base import SPLITS, Augment, ImageData, check_labels
from fourbit.data._cache import cached
from fourbit.data._columns import file_column, number_column
from fourbit.data._pixels import channel_statistics, converted, opened
from fourbit.data._progress import progress_bar
from fourbit.data._sources import find_parquet, fingerprint, open_folder, open_hub
from fourbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.progress import Progress

CHUNK = 1000  # rows decoded between two updates of the progress bar


@dataclass(frozen=True)
class ImageSource:
    """Where a data set lives on the hub, what its images must look like, and how its training images are varied."""

    name: str
    hub_id: str
    channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int


def load_images(source: ImageSource, data_dir: Path | None, image_size: int | None) -> ImageData:
    """The data set, of its own size or smaller.

    Args:
        source: what to expect.
        data_dir: folder with parquet files; None for the hub.
        image_size: a divisor of the source's: each pixel becomes the mean of a square of pixels, rounded (half up), and the
            padding of the random crop shrinks as well. Mean and deviation are those of the smaller images. None: as they are.

    Raises:
        UserError: another size, or see `fourbit.data.load`.
    """
    size, factor = image_size or source.image_size, 1
    if image_size is not None:
        factor = source.image_size // max(1, image_size)
        if factor * image_size != source.image_size:
            sizes = [n for n in range(1, source.image_size + 1) if source.image_size % n == 0]
            raise UserError(
                f"images of {source.name} have {source.image_size}x{source.image_size} pixels and cannot be averaged to "
                f"{image_size}x{image_size}: give --image-size {', '.join(map(str, sizes[:-1]))} or {sizes[-1]}."
            )
    if factor == 1:
        tensors, mean, std = read_images(source, data_dir), source.mean, source.std
    else:
        tensors = cached(
            f"{source.name}-{size}", _key(source, data_dir), lambda: _smaller(read_images(source, data_dir), factor)
        )
        mean, std = (tuple(tensors.pop(name).tolist()) for name in ("mean", "std"))
    augment = Augment(crop_padding=source.crop_padding // factor, flip=True)
    return ImageData(name=source.name, **tensors, classes=source.classes, mean=mean, std=std, augment=augment)


def _smaller(tensors: dict[str, Tensor], factor: int) -> dict[str, Tensor]:
    """The tensors with each `factor` x `factor` pixels averaged, and mean and deviation of the training images."""
    found = dict(tensors)
    for split in SPLITS:
        found[f"{split}_x"] = torch.cat([_averaged(part, factor) for part in tensors[f"{split}_x"].split(CHUNK)])
    return found | channel_statistics(found["train_x"])


def _averaged(x: Tensor, factor: int) -> Tensor:
    """uint8 [N, C, H, W] -> [N, C, H/factor, W/factor], floor(mean + 1/2)."""
    squares = x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    area = factor * factor
    return ((2 * squares.sum((3, 5)) + area) // (2 * area)).to(torch.uint8)


def read_images(source: ImageSource, data_dir: Path | None) -> dict[str, Tensor]:
    """The tensors train_x, train_y, test_x and test_y of `ImageData`, from the cache if the files are unchanged.

    Args:
        source: what to expect.
        data_dir: folder with parquet files; None for the hub. A set from the hub is cached under its hub name, since
            published data sets do not change, and needs no network the second time.

    Raises:
        UserError: see `fourbit.data.load`.
    """

    def opened_tables() -> dict[str, Dataset]:
        return open_hub(source.hub_id) if data_dir is None else open_folder(find_parquet(data_dir))

    return cached(source.name, _key(source, data_dir), lambda: _decode_all(source, opened_tables()))


def _key(source: ImageSource, data_dir: Path | None) -> str:
    if data_dir is None:
        return fingerprint(source.hub_id)
    return fingerprint(source.name, find_parquet(data_dir), data_dir)


def _decode_all(source: ImageSource, splits: dict[str, Dataset]) -> dict[str, Tensor]:
    tensors = {}
    with progress_bar() as progress:
        for split in SPLITS:
            tensors[f"{split}_x"], tensors[f"{split}_y"] = _decode(source, split, splits[split], progress)
    return tensors


def _decode(source: ImageSource, split: str, rows: Dataset, progress: Progress) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, C, H, W] and labels int64 [N] of one split."""
    where = f"{split} of {source.name}"
    images, labels = file_column(rows, where, "img", "image"), number_column(rows, where, "label")
    check_labels(labels, len(source.classes), where, own="images")
    task = progress.add_task(f"Decoding {where}", total=len(images))
    size = source.image_size
    pixels = np.empty((len(images), size, size, source.channels), np.uint8)
    for begin in range(0, len(images), CHUNK):
        for i, png in enumerate(images.slice(begin, CHUNK).to_pylist(), begin):
            pixels[i] = _decode_one(png, source, f"image {i} in {where}")
        progress.update(task, completed=begin + CHUNK)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def _decode_one(data: bytes, source: ImageSource, where: str) -> np.ndarray:
    """uint8 [H, W, C] of one encoded image."""
    image = opened(data, where)
    if image.size != (source.image_size, source.image_size):
        width, height = image.size
        raise UserError(
            f"{where} is {width}x{height} pixels, but {source.name} has {source.image_size}x{source.image_size}: "
            f"is the folder really {source.name}? (For images of your own: --data images.)"
        )
    pixels = np.asarray(converted(image, "RGB" if source.channels == 3 else "L", where))
    return pixels.reshape(*pixels.shape[:2], source.channels)
