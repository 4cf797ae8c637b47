"""Images of one's own as a data set: size, channels, mean and deviation come from the files.

Images of up to 64x64 pixels lie in memory, as CIFAR-10 does, and are shifted by up to an eighth of their size in training;
larger ones are decoded when they are needed and cut out at random, as ImageNet's (see `_large_images`). Neither are mirrored
unless one asks for it: a mirrored letter is another one, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourbit.data._base import SPLITS, Augment, ImageData
from fourbit.data._cache import cached
from fourbit.data._examples import Examples, Kind
from fourbit.data._large_images import LargeImages, _Decoded
from fourbit.data._pixels import SUFFIXES, Mode, channel_statistics, converted, is_grey, opened
from fourbit.data._progress import progress_bar
from fourbit.errors import UserError

IMAGES = Kind("images", SUFFIXES, ("image", "img"))
LARGEST_IN_MEMORY = 64
"""Pixels of the side of an image."""
LOOKED_AT = 20_000
"""So many images of a split are looked at for size and channels, evenly spread, where it has more."""
MEASURED = 1000
"""So many training images that are not in memory give mean and deviation, evenly spread."""


def make_images(name: str, examples: Examples, image_size: int | None, mirror: bool) -> ImageData | LargeImages:
    """The data set of the examples.

    Args:
        image_size: to which images are scaled, without regard to their aspect where they lie in memory. None: the size that all
            of them have.

    Raises:
        UserError: images of several sizes, or that are not square, without `image_size`; or one that cannot be decoded.
    """
    width, height, channels = cached("look", examples.key, lambda: {"look": _look(examples)})["look"].tolist()
    if image_size is None and not width:
        raise UserError(f"the {name} have several sizes: choose the one that they are scaled to with --image-size.")
    if image_size is None and width != height:
        raise UserError(
            f"the {name} have {width}x{height} pixels, but networks read square ones: choose a size with --image-size."
        )
    size = image_size or width
    if size > LARGEST_IN_MEMORY:
        return _on_disk(name, examples, size, channels, mirror)
    scaled = image_size is not None
    key = f"{examples.key}-{size}x{channels}{'' if scaled else '-as-they-are'}"
    tensors = cached("images", key, lambda: _decoded(examples, size, channels, scaled))
    return ImageData(
        name=name,
        train_x=tensors["train"],
        train_y=examples.labels["train"],
        test_x=tensors["test"],
        test_y=examples.labels["test"],
        classes=examples.classes,
        mean=tuple(tensors["mean"].tolist()),
        std=tuple(tensors["std"].tolist()),
        augment=Augment(crop_padding=size // 8, flip=mirror),
    )


def _on_disk(name: str, examples: Examples, size: int, channels: int, mirror: bool) -> LargeImages:
    files, labels = examples.files, examples.labels
    split = (files["train"], labels["train"], files["test"], labels["test"])
    plain = LargeImages(name, *split, examples.classes, size, (0.0,) * channels, (1.0,) * channels, channels, mirror)

    def measured() -> dict[str, Tensor]:
        decoded = _Decoded(plain, "train", 0, 0, False)
        rows = _spread(len(labels["train"]), MEASURED)
        return channel_statistics(torch.stack([decoded[row] for row in rows]))

    found = cached("statistics", f"{examples.key}-{size}x{channels}", measured)
    mean, std = (tuple(found[key].tolist()) for key in ("mean", "std"))
    return LargeImages(name, *split, examples.classes, size, mean, std, channels, mirror)


def _look(examples: Examples) -> Tensor:
    """Width and height of the images, 0 where they differ, and their channels, int64 [3]."""
    sizes, grey = set(), True
    for split in SPLITS:
        for row in _spread(len(examples.labels[split]), LOOKED_AT):
            image = opened(examples.files[split][row], examples.where(split, row))
            sizes.add(image.size)
            grey &= is_grey(image) or split == "test"
            image.close()
    width, height = sizes.pop() if len(sizes) == 1 else (0, 0)
    return torch.tensor([width, height, 1 if grey else 3])


def _spread(count: int, limit: int) -> Sequence[int]:
    return range(count) if count <= limit else [i * count // limit for i in range(limit)]


def _decoded(examples: Examples, size: int, channels: int, scaled: bool) -> dict[str, Tensor]:
    """Pixels of both splits, uint8 [N, C, size, size], and mean and deviation of the training images."""
    from PIL import Image

    mode: Mode = "L" if channels == 1 else "RGB"
    tensors = {}
    with progress_bar() as progress:
        for split in SPLITS:
            files = examples.files[split]
            pixels = np.empty((len(files), size, size, channels), np.uint8)
            for row in progress.track(range(len(files)), description=f"Decoding {split}"):
                where = examples.where(split, row)
                image: Any = converted(opened(files[row], where), mode, where)
                if image.size != (size, size):
                    if not scaled:
                        raise UserError(
                            f"{where} has {image.width}x{image.height} pixels, but others {size}x{size}: choose the size that "
                            "all are scaled to with --image-size."
                        )
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                pixels[row] = np.asarray(image).reshape(size, size, channels)
            tensors[split] = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return tensors | channel_statistics(tensors["train"])
