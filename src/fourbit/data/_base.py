"""What a data set is: `ImageData`, and what all kinds share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fourbit.errors import UserError, unknown

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Augment:
    """Random changes to training images; the default changes nothing.

    Args:
        crop_padding: pad this many black pixels on each side, then cut out the original size at a random place.
        flip: mirror left and right with probability 1/2.
    """

    crop_padding: int = 0
    flip: bool = False


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set in memory.

    Args:
        name: its name in the catalogue.
        train_x: uint8 [N, C, H, W], 0 black to 255 white.
        train_y: int64 [N], class numbers from 0.
        test_x: as train_x, with as many channels and the same size.
        test_y: as train_y.
        classes: name of each class; their number is the number of classes.
        mean: per channel, of pixel/255 over the training images.
        std: per channel, likewise.
        augment: how training images are varied.

    Raises:
        UserError: tensors that do not fit together, or a label without a class.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = Augment()
    examples: ClassVar[str] = "images"

    def __post_init__(self):
        for split in SPLITS:
            x, y = self.split(split)
            if x.dtype != torch.uint8 or x.ndim != 4 or y.dtype != torch.int64 or y.shape != x.shape[:1]:
                raise UserError(
                    f"{split} tensors of {self.name} must be uint8 [N, C, H, W] and int64 [N], "
                    f"not {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}."
                )
            check_labels(y, self.num_classes, f"{split} of {self.name}")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise UserError(
                f"{self.name}: training images are {list(self.train_x.shape[1:])} but test images "
                f"{list(self.test_x.shape[1:])}; they must have the same [C, H, W]."
            )
        if not len(self.mean) == len(self.std) == self.channels:
            raise UserError(f"{self.name} has {self.channels} channels: give as many values of mean and std.")

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Images and labels of "train" or "test"; UserError for another name."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return (self.train_x, self.train_y) if name == "train" else (self.test_x, self.test_y)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train_x.shape[1]

    @property
    def image_size(self) -> int:
        """Height of an image in pixels; the images of the catalogue are square."""
        return self.train_x.shape[2]


class HasSplits(Protocol):
    """What all data sets of examples have: images, utterances, pairs of sentences; `examples` is the word for them."""

    examples: ClassVar[str]

    @property
    def name(self) -> str:
        """In the catalogue."""
        ...

    def split(self, split: str, /) -> Any:
        """Inputs and targets of "train" or "test"."""
        ...


def num_batches(
    data: HasSplits,
    split: str,
    batch_size: int,
    drop_last: bool | None = None,
) -> int:
    """Number of batches in an epoch of images, utterances or pairs of sentences.

    Args:
        drop_last: leave out a last batch of less than `batch_size` examples. None: for "train" only.

    Raises:
        UserError: a batch size below 1, or more than there are examples to train on.
    """
    count = len(data.split(split)[1])
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give a number of at least 1.")
    if split == "train" and batch_size > count:
        raise UserError(
            f"batch size {batch_size} is larger than {data.name}'s {count} training {data.examples}: give a smaller one."
        )
    if drop_last is None:
        drop_last = split == "train"
    return count // batch_size if drop_last else -(-count // batch_size)


def check_labels(labels: Tensor, num_classes: int, where: str, own: str | None = None) -> None:
    """UserError naming the first label that is not in 0..num_classes-1, and `own`, the data set for other classes."""
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise UserError(
            f"label {int(labels[row])} in row {row} of {where} is out of range: labels must be 0 to {num_classes - 1}"
            f"{f' (for data of your own, with any classes: --data {own})' if own else ''}."
        )
