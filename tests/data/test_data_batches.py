from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from fourbit.data import Augment, ImageData, batches, num_batches
from fourbit.errors import UserError

PADDING = 3


@pytest.fixture(scope="module")
def data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 256, (70, 2, 9, 11), generator=generator, dtype=torch.uint8)
    return ImageData(
        name="toy",
        train_x=x[:50],
        train_y=torch.arange(50) % 5,
        test_x=x[50:],
        test_y=torch.arange(20) % 5,
        classes=tuple("abcde"),
        mean=(0.5, 0.25),
        std=(0.25, 0.5),
        augment=Augment(crop_padding=PADDING, flip=True),
    )


def numbered(data: ImageData) -> ImageData:
    """As many classes as training images, so that a label tells which image it is."""
    return replace(data, train_y=torch.arange(50), test_y=torch.arange(20), classes=tuple(map(str, range(50))))


def all_batches(*args, **kwargs):
    return list(batches(*args, **kwargs))


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(xa, xb) and torch.equal(ya, yb) for (xa, ya), (xb, yb) in zip(a, b, strict=True)
    )


def to_pixels(x: torch.Tensor, data: ImageData) -> torch.Tensor:
    """Undo the normalisation, exactly."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    return ((x * std + mean) * 255).round().to(torch.uint8)


def variants(image: np.ndarray, padding: int, flip: bool) -> dict[bytes, tuple]:
    """Slow reference: every (top, left, mirrored) result of one image [C, H, W], by its bytes."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            found[crop.tobytes()] = (top, left, False)
            if flip:
                found[crop[:, :, ::-1].tobytes()] = (top, left, True)
    return found


def test_batch_k_is_the_same_when_earlier_batches_are_skipped(data):
    whole = all_batches(data, "train", 8, seed=1, epoch=2)
    for start in range(len(whole) + 1):
        assert equal(all_batches(data, "train", 8, seed=1, epoch=2, start=start), whole[start:])


def test_batch_k_is_the_same_when_other_random_numbers_are_drawn_in_between(data):
    whole = all_batches(data, "train", 8, seed=1)
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    assert equal(all_batches(data, "train", 8, seed=1), whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_epochs_drawn_in_turns_do_not_disturb_each_other(data):
    whole = [all_batches(data, "train", 10, epoch=epoch) for epoch in range(2)]
    turns = list(zip(batches(data, "train", 10, epoch=0), batches(data, "train", 10, epoch=1), strict=True))
    assert equal([a for a, _ in turns], whole[0])
    assert equal([b for _, b in turns], whole[1])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_another_seed_or_epoch_gives_another_order_and_other_crops(data, change):
    data = numbered(data)
    (x, y), (other_x, other_y) = (all_batches(data, "train", 50, **c)[0] for c in ({}, change))
    assert not torch.equal(y, other_y)
    assert not torch.equal(x[y.argsort()], other_x[other_y.argsort()])


def test_an_epoch_holds_every_training_image_once(data):
    labels = torch.cat([y for _, y in batches(numbered(data), "train", 7, drop_last=False)])
    assert sorted(labels.tolist()) == list(range(50))


def test_every_augmented_image_is_a_shift_and_flip_of_its_own_image(data):
    data = numbered(data)
    references = [variants(image.numpy(), PADDING, flip=True) for image in data.train_x]
    drawn = []
    for epoch in range(12):
        for x, y in batches(data, "train", 50, seed=4, epoch=epoch):
            for image, label in zip(to_pixels(x, data), y.tolist(), strict=True):
                drawn.append(references[label][image.numpy().tobytes()])  # KeyError: not a shift of that image
    tops, lefts, mirrored = zip(*drawn, strict=True)
    assert set(tops) == set(lefts) == set(range(2 * PADDING + 1))
    assert 0.45 < sum(mirrored) / len(mirrored) < 0.55
    for offset in range(2 * PADDING + 1):  # 600 draws of 7 values: 86 each, deviation 8.6
        assert 50 < tops.count(offset) < 125
        assert 50 < lefts.count(offset) < 125


@pytest.mark.parametrize("augment", [Augment(crop_padding=2), Augment(flip=True), Augment()])
def test_crop_and_flip_can_be_had_apart(data, augment):
    data = replace(numbered(data), augment=augment)
    ((x, y),) = batches(data, "train", 50)
    for image, label in zip(to_pixels(x, data), y.tolist(), strict=True):
        assert image.numpy().tobytes() in variants(data.train_x[label].numpy(), augment.crop_padding, augment.flip)


def test_without_augmentation_training_images_are_only_shuffled(data):
    data = numbered(data)
    ((x, y),) = batches(data, "train", 50, augment=False)
    assert torch.equal(to_pixels(x, data), data.train_x[y])
    assert y.tolist() != sorted(y.tolist())


def test_the_test_split_comes_in_order_and_unchanged(data):
    got = all_batches(data, "test", 8, seed=5, epoch=3)
    assert [len(y) for _, y in got] == [8, 8, 4]
    assert torch.equal(torch.cat([to_pixels(x, data) for x, _ in got]), data.test_x)
    assert torch.equal(torch.cat([y for _, y in got]), data.test_y)


def test_images_are_normalised_per_channel_and_contiguous(data):
    for split in ("train", "test"):
        for x, y in batches(data, split, 8, augment=False):
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64
            assert x.is_contiguous()
    x, _ = next(batches(data, "test", 20))
    pixels = data.test_x.double() / 255
    for c in range(2):
        torch.testing.assert_close(x[:, c].double(), (pixels[:, c] - data.mean[c]) / data.std[c], atol=1e-6, rtol=0)


def test_augmented_batches_are_contiguous_and_own_their_memory(data):
    before = data.train_x.clone()
    for x, _ in batches(data, "train", 8):
        assert x.is_contiguous()
        x.zero_()
    assert torch.equal(data.train_x, before)


def test_the_last_partial_batch_is_dropped_in_training_only(data):
    assert num_batches(data, "train", 8) == len(all_batches(data, "train", 8)) == 6
    assert num_batches(data, "train", 8, drop_last=False) == len(all_batches(data, "train", 8, drop_last=False)) == 7
    assert num_batches(data, "test", 8) == len(all_batches(data, "test", 8)) == 3
    assert num_batches(data, "test", 8, drop_last=True) == len(all_batches(data, "test", 8, drop_last=True)) == 2
    assert num_batches(data, "test", 1000) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", 0), "batch size is 0"),
        (("test", -1), "batch size is -1"),
        (("train", 51), "larger than toy's 50 training images"),
        (("tran", 8), "unknown split 'tran': did you mean 'train'"),
        (("train", 8, 0, 0, True, 7), "batches 0 to 5"),
        (("train", 8, 0, 0, True, -1), "cannot start at batch -1"),
    ],
)
def test_bad_arguments_are_refused_by_the_call_itself(data, arguments, message):
    with pytest.raises(UserError, match=message):
        batches(data, *arguments)


def test_the_first_batches_of_a_seed_are_pinned():
    """A change here breaks the resuming of runs: say so in the changelog."""
    x = torch.full((64, 1, 8, 8), 50, dtype=torch.uint8)
    x[..., 0] = 100  # a bright column tells where the left edge went
    y = torch.arange(64)
    data = ImageData("pin", x, y, x, y, tuple(map(str, range(64))), (0.0,), (1.0,), Augment(2, True))
    (first, labels), (second, _) = islice(batches(data, "train", 6, seed=0, epoch=0), 2)
    assert labels.tolist() == [54, 42, 50, 52, 21, 56]
    assert [int((image == 0).sum()) for image in torch.cat([first, second])] == [
        8, 22, 8, 28, 15, 8, 16, 22, 16, 22, 15, 15,
    ]  # fmt: skip
    assert to_pixels(first, data)[:, 0, 3, 0].tolist() == [0, 0, 100, 0, 50, 50]
