import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fourbit import data as fourbit_data
from fourbit.data import Augment, ImageData, batches, load
from fourbit.errors import UserError


def statistics(x: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixel/255 per channel, from its histogram (a float64 copy of CIFAR-10 takes 1.2 GB)."""
    level = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(x.shape[1]):
        share = x[:, channel].flatten().bincount(minlength=256).double() / x[:, channel].numel()
        mean = (share * level).sum()
        means.append(mean.item())
        deviations.append((share * (level - mean) ** 2).sum().sqrt().item())
    return means, deviations


def assert_constants_are_the_statistics_of_the_training_images(data: ImageData) -> None:
    mean, std = statistics(data.train_x)
    assert list(data.mean) == pytest.approx(mean, abs=6e-5)
    assert list(data.std) == pytest.approx(std, abs=6e-5)


def test_digits_are_split_the_same_way_every_time():
    data, again = load("digits"), load("digits")
    assert data.train_x.shape == (1437, 1, 8, 8)
    assert data.test_x.shape == (360, 1, 8, 8)
    assert torch.equal(data.test_x, again.test_x)
    assert data.test_y[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]  # scikit-learn's split, seed 0


def test_digits_split_keeps_the_share_of_each_class_and_no_image_twice():
    data = load("digits")
    for y, size in ((data.train_y, 1437), (data.test_y, 360)):
        share = y.bincount() / size
        total = (data.train_y.bincount() + data.test_y.bincount()) / 1797
        assert (share - total).abs().max() < 0.002
    rows = torch.cat([data.train_x, data.test_x]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797


def test_digits_use_the_whole_range_of_a_byte():
    data = load("digits")
    levels = torch.cat([data.train_x, data.test_x]).unique().tolist()
    assert levels == [round(level * 255 / 16) for level in range(17)]
    assert data.augment == Augment()
    assert_constants_are_the_statistics_of_the_training_images(data)


def test_digits_refuse_a_folder(tmp_path):
    with pytest.raises(UserError, match="leave out the data folder"):
        load("digits", tmp_path)


def test_an_unknown_data_set_gives_the_nearest_names():
    with pytest.raises(UserError, match="unknown data set 'cifar': did you mean 'cifar10'"):
        load("cifar")


def test_importing_the_package_imports_neither_datasets_nor_sklearn():
    code = "import sys, fourbit.data; print({'datasets', 'sklearn', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_registered_function_is_listed_and_loaded(monkeypatch):
    monkeypatch.setattr(fourbit_data._registered.DATASETS, "_items", dict(fourbit_data._registered.DATASETS._items))
    digits = load("digits")

    @fourbit_data.register("more_digits")
    def more_digits(data_dir):
        return replace(digits, name="more_digits")

    assert fourbit_data.names()[-1] == "more_digits"
    assert load("more_digits").name == "more_digits"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": torch.zeros(1437, 1, 8, 8)}, "train tensors of digits must be uint8"),
        ({"test_y": torch.zeros(359, dtype=torch.int64)}, "test tensors of digits must be"),
        ({"test_x": torch.zeros(360, 1, 8, 9, dtype=torch.uint8)}, "must have the same"),
        ({"classes": ("a", "b")}, "out of range: labels must be 0 to 1"),
        ({"mean": (0.1, 0.2)}, "digits has 1 channels"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(load("digits"), **change)


@pytest.mark.parametrize(
    ("name", "num_train", "shape"), [("cifar10", 50_000, (3, 32, 32)), ("fashion_mnist", 60_000, (1, 28, 28))]
)
@pytest.mark.slow
def test_real_data_is_complete_and_its_constants_are_its_statistics(shared_data, name, num_train, shape):
    folder = shared_data / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in {shared_data}")
    data = load(name, folder)
    assert data.train_x.shape == (num_train, *shape)
    assert data.test_x.shape == (10_000, *shape)
    assert data.train_y.bincount().tolist() == [num_train // 10] * 10
    assert data.test_y.bincount().tolist() == [1000] * 10
    assert_constants_are_the_statistics_of_the_training_images(data)
    x, y = next(batches(data, "train", 128))
    assert x.shape == (128, *shape)
    assert y.shape == (128,)
