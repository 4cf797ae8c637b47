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

from fourbit.data._base import SPLITS, check_labels
from fourbit.data._cache import cached
from fourbit.data._columns import file_column, number_column
from fourbit.data._pixels import converted, opened
from fourbit.data._progress import progress_bar
from fourbit.data._sources import find_parquet, fingerprint, open_folder, open_hub
from fourbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.progress import Progress

CHUNK = 1000  # rows decoded between two updates of the progress bar


@dataclass(frozen=True)
class ImageSource:
    """Where a data set lives on the hub, and what its images must look like."""

    name: str
    hub_id: str
    channels: int
    image_size: int
    num_classes: int


def read_images(source: ImageSource, data_dir: Path | None) -> dict[str, Tensor]:
    """The tensors train_x, train_y, test_x and test_y of `ImageData`, from the cache if the files are unchanged.

    Args:
        source: what to expect.
        data_dir: folder with parquet files; None for the hub. A set from the hub is cached under its hub name, since
            published data sets do not change, and needs no network the second time.

    Raises:
        UserError: see `fourbit.data.load`.
    """
    if data_dir is None:
        return cached(source.name, fingerprint(source.hub_id), lambda: _decode_all(source, open_hub(source.hub_id)))
    files = find_parquet(data_dir)
    return cached(
        source.name,
        fingerprint(source.name, files, data_dir),
        lambda: _decode_all(source, open_folder(files)),
    )


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
    check_labels(labels, source.num_classes, where, own="images")
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
