"""Batches from whole tensors, the same for the same (seed, epoch, batch index).

The order of an epoch is a permutation seeded by a hash of (seed, epoch); the crops and flips of a batch by a hash of
(seed, epoch, batch index). Nothing is carried from batch to batch, so a run that resumes at batch k skips the first k
for free and goes on with the very numbers it would have seen.

A crop is one indexed read from a view: with p pixels of padding, the padded images [B, C, H+2p, W+2p] have
(2p+1)^2 windows of the original size, `unfold` shows them all without a copy, and each image picks one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.data._base import Augment, ImageData, num_batches
from fourbit.data._large_images import LargeImages, large_batches
from fourbit.data._random import generator
from fourbit.errors import UserError


def batches(
    data: ImageData | LargeImages,
    split: str,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    augment: bool = True,
    start: int = 0,
    drop_last: bool | None = None,
    workers: int | None = None,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of one epoch: x float32 [B, C, H, W], (pixel/255 - mean)/std, contiguous, and y int64 [B].

    Args:
        data: the data set.
        split: "train" is shuffled and augmented, "test" comes in order and unchanged.
        batch_size: images in a batch.
        seed: chooses order and augmentation, together with `epoch`.
        epoch: number of the epoch.
        augment: False leaves training images as they are (still shuffled).
        start: index of the first batch to yield; earlier ones cost nothing.
        drop_last: leave out a last batch of less than `batch_size` images. None: for "train" only.
        workers: processes that decode images which are not in memory; None: one less than there are cores, at most 8.
        part: images of each batch to yield, where several processes share it.

    Raises:
        UserError: unknown split, batch size below 1 or above the number of training images, start out of range.
            Raised by this call, not by the first batch.

    >>> from fourbit.data import load
    >>> x, y = next(batches(load("digits"), "train", 32))
    >>> x.shape, x.dtype, y.shape
    (torch.Size([32, 1, 8, 8]), torch.float32, torch.Size([32]))
    """
    count = num_batches(data, split, batch_size, drop_last)
    if not 0 <= start <= count:
        raise UserError(f"cannot start at batch {start}: an epoch of {data.name} has batches 0 to {count - 1}.")
    values = (split, batch_size, int(seed), int(epoch), augment, range(start, count))
    if isinstance(data, LargeImages):
        return large_batches(data, *values, workers, part)
    return ((x[part], y[part]) for x, y in _generate(data, *values))


def _generate(
    data: ImageData, split: str, batch_size: int, seed: int, epoch: int, augment: bool, indices: range
) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data.split(split)
    training = split == "train"
    order = torch.randperm(len(labels), generator=generator("order", seed, epoch)) if training else None
    for k in indices:
        rows = slice(k * batch_size, (k + 1) * batch_size)
        picked = rows if order is None else order[rows]
        x, y = images[picked], labels[picked]
        if training and augment:
            x = _augmented(x, data.augment, generator("augment", seed, epoch, k))
        yield _normalised(x, data.mean, data.std), y


def _augmented(x: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Randomly shifted and mirrored copies of the images x, uint8 [B, C, H, W]; pixels from outside are 0 (black)."""
    num_images, _, height, width = x.shape
    if p := augment.crop_padding:
        top, left = torch.randint(2 * p + 1, (2, num_images), generator=generator)
        windows = F.pad(x, (p, p, p, p)).unfold(2, height, 1).unfold(3, width, 1)
        x = windows[torch.arange(num_images), :, top, left]
    if augment.flip:
        mirrored = torch.rand(num_images, generator=generator) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return x


def _normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x/255 - mean)/std per channel, as float32 in a tensor of its own."""
    offset = torch.tensor(mean).mul(255).view(-1, 1, 1)
    factor = torch.tensor(std).mul(255).reciprocal().view(-1, 1, 1)
    return x.to(torch.float32, memory_format=torch.contiguous_format).sub_(offset).mul_(factor)
