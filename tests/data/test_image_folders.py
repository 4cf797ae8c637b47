import os
import shutil
import socket

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import fourbit.data._images as images_module
from fourbit.data import load
from fourbit.errors import UserError


def pixels(images: np.ndarray) -> torch.Tensor:
    """[N, H, W, C] -> [N, C, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def assert_holds(data, folder) -> None:
    assert torch.equal(data.train_x, pixels(folder.train_x))
    assert torch.equal(data.test_x, pixels(folder.test_x))
    assert data.train_y.tolist() == folder.train_y.tolist()
    assert data.test_y.tolist() == folder.test_y.tolist()


def cache_files(tmp_path) -> list:
    return sorted((tmp_path / "cache").iterdir())


@pytest.fixture
def _no_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("decoded although the cache should have served")

    monkeypatch.setattr(images_module, "_decode_all", fail)


def test_a_nested_folder_of_png_parquet_gives_every_pixel_and_label_in_order(folder):
    assert_holds(load("cifar10", folder.path), folder)
    assert_holds(load("cifar10", str(folder.path / "plain_text")), folder)


def test_the_split_may_be_the_name_of_a_subfolder(folder):
    for split in ("train", "test"):
        target = folder.path / "by_split" / split
        target.mkdir(parents=True)
        for i, path in enumerate(sorted((folder.path / "plain_text").glob(f"{split}-*"))):
            path.rename(target / f"{i:04d}.parquet")
    assert_holds(load("cifar10", folder.path), folder)


def test_the_image_column_may_be_called_image(folder):
    folder.write("test-00000-of-00001", folder.test_x, folder.test_y, image_column="image")
    assert_holds(load("cifar10", folder.path), folder)


def test_grey_images_of_a_colour_set_are_read_as_colour(folder):
    grey = folder.test_x[:, :, :, 0]
    folder.write("test-00000-of-00001", grey, folder.test_y)
    data = load("cifar10", folder.path)
    assert torch.equal(data.test_x, torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))


def test_fashion_mnist_is_read_as_one_channel(folder):
    x = folder.train_x[:, :28, :28, 0]
    for stem in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        folder.write(stem, x, folder.train_y, image_column="image")
    data = load("fashion_mnist", folder.path)
    assert torch.equal(data.test_x, torch.from_numpy(x)[:, None])
    assert (data.channels, data.image_size, data.num_classes) == (1, 28, 10)


def test_images_may_be_plain_bytes_or_of_the_types_of_the_hub(folder):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder.file("test-00000-of-00001")
    table = pq.read_table(path)
    plain = pa.table({"img": [row["bytes"] for row in table["img"].to_pylist()], "label": table["label"]})
    pq.write_table(plain, path)
    assert_holds(load("cifar10", folder.path), folder)
    names = datasets.ClassLabel(names=list("abcdefghij"))
    hub = datasets.Dataset(table).cast(datasets.Features({"img": datasets.Image(), "label": names}))
    hub.to_parquet(path)
    assert_holds(load("cifar10", folder.path), folder)


def test_the_second_start_reads_the_cache_and_decodes_nothing(folder, request):
    load("cifar10", folder.path)
    request.getfixturevalue("_no_decoding")
    assert_holds(load("cifar10", folder.path), folder)


def test_a_moved_folder_is_still_served_by_the_cache(folder, tmp_path, request):
    load("cifar10", folder.path)
    request.getfixturevalue("_no_decoding")
    assert_holds(load("cifar10", folder.path.rename(tmp_path / "moved")), folder)


def test_a_changed_file_is_decoded_again(folder):
    load("cifar10", folder.path)
    before = folder.file("test-00000-of-00001").stat()
    folder.test_x = folder.test_x[::-1].copy()
    folder.write("test-00000-of-00001", folder.test_x, folder.test_y)
    os.utime(folder.file("test-00000-of-00001"), ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert_holds(load("cifar10", folder.path), folder)


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "text"])
def test_a_damaged_cache_file_is_made_anew_without_a_word(folder, tmp_path, damage, recwarn):
    load("cifar10", folder.path)
    (path,) = cache_files(tmp_path)
    good = path.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    path.unlink()
    path.write_bytes({"empty": b"", "short": good[:-100], "flipped": flipped, "text": b"hello" * 1000}[damage])
    assert_holds(load("cifar10", folder.path), folder)
    assert path.read_bytes() == good
    assert cache_files(tmp_path) == [path]
    assert not [w for w in recwarn if "fourbit" in str(w.filename)]


def test_a_cache_that_cannot_be_written_is_only_a_warning(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="set FOURBIT_CACHE"):
        data = load("cifar10", folder.path)
    assert_holds(data, folder)


def test_an_interrupted_write_leaves_no_file(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", folder.path)
    assert cache_files(tmp_path) == []


def test_nothing_is_printed_where_there_is_no_terminal(folder, capfd):
    load("cifar10", folder.path)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_local_folder_is_read_without_the_network(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args[0]) or [])
    load("cifar10", folder.path)
    assert asked == []


# Each case spoils the folder; the message must say what is wrong.


def _remove_folder(folder):
    shutil.rmtree(folder.path)


def _remove_files(folder):
    for path in folder.path.rglob("*.parquet"):
        path.unlink()


def _remove_test(folder):
    folder.file("test-00000-of-00001").unlink()


def _second_data_set(folder):
    shutil.copytree(folder.path / "plain_text", folder.path / "other")


def _no_image_column(folder):
    folder.write("test-00000-of-00001", folder.test_x, folder.test_y, image_column="picture")


def _no_label_column(folder):
    folder.write("test-00000-of-00001", folder.test_x, folder.test_y, label_column="fine_label")


def _columns_differ_within_a_split(folder):
    folder.write("train-00001-of-00002", folder.train_x[20:], folder.train_y[20:], label_column="fine_label")


def _label_too_large(folder):
    folder.write("test-00000-of-00001", folder.test_x, np.arange(12))


def _label_negative(folder):
    folder.write("test-00000-of-00001", folder.test_x, folder.test_y - 1)


def _label_missing(folder):
    folder.write("test-00000-of-00001", folder.test_x, [1, None] * 6)


def _label_text(folder):
    folder.write("test-00000-of-00001", folder.test_x, ["cat"] * 12)


def _one_image_smaller(folder):
    folder.write("test-00000-of-00001", [*folder.test_x[:5], folder.test_x[5, :16], *folder.test_x[6:]], folder.test_y)


def _numbers_for_images(folder):
    folder.write("test-00000-of-00001", [1.5] * 12, folder.test_y)


def _labels_with_fractions(folder):
    folder.write("test-00000-of-00001", folder.test_x, [1.5] * 12)


def _paths_for_images(folder):
    folder.write("test-00000-of-00001", ["a.png"] * 12, folder.test_y)


def _one_image_missing(folder):
    folder.write("test-00000-of-00001", [*folder.test_x[:5], None, *folder.test_x[6:]], folder.test_y)


def _image_not_an_image(folder):
    folder.write("test-00000-of-00001", [b"hello"] * 12, folder.test_y)


def _image_cut_short(folder):
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    png = pq.read_table(folder.file("test-00000-of-00001"))["img"][0].as_py()["bytes"]
    assert Image.open(io.BytesIO(png[:-200])).size == (32, 32)  # the header is whole, the pixels are not
    folder.write("test-00000-of-00001", [png[:-200]] * 12, folder.test_y)


def _image_absent(folder):
    folder.write("test-00000-of-00001", [{"bytes": None, "path": "a.png"}] * 11 + [b"x"], folder.test_y)


def _file_cut_short(folder):
    path = folder.file("train-00001-of-00002")
    path.write_bytes(path.read_bytes()[:-50])


def _file_damaged_inside(folder):
    path = folder.file("train-00001-of-00002")
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])


def _file_without_rows(folder):
    path = folder.file("test-00000-of-00001")
    pq.write_table(pq.read_table(path)[:0], path)


def _file_instead_of_folder(folder):
    shutil.rmtree(folder.path)
    folder.path.write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_file_without_rows, r"test-00000-of-00001.parquet has no rows: replace the file, or remove it if there are"),
        (_file_instead_of_folder, r"the data folder .*cifar10 is a file: give the folder that it lies in"),
        (_remove_folder, r"there is no data folder .*cifar10: give an existing one"),
        (_remove_files, r"no parquet file in .*cifar10"),
        (_remove_test, r"no test split in .*cifar10: name its files like test-00000-of-00001.parquet"),
        (
            _second_data_set,
            r"train files lie in several folders below .*give the folder of one data set, such as",
        ),
        (
            _no_image_column,
            r"test of cifar10 has no column img.bytes or img or image.bytes or image, only picture.bytes, .*label: give",
        ),
        (
            _no_label_column,
            r"test of cifar10 has no column label, only img.bytes, img.path, fine_label: give the folder of that data",
        ),
        (_columns_differ_within_a_split, r"cannot read the parquet files in .*plain_text"),
        (_label_too_large, r"label 10 in row 10 of test of cifar10 is out of range: labels must be 0 to 9"),
        (_label_negative, r"label -1 in row 0 of test of cifar10 is out of range"),
        (_label_missing, r"row 1 of column label of test of cifar10 is empty: remove the row, or replace the file"),
        (_label_text, r"column label of test of cifar10 must hold whole numbers, but holds string: give the folder"),
        (_labels_with_fractions, r"column label of test of cifar10 must hold whole numbers, but holds double"),
        (_one_image_smaller, r"image 5 in test of cifar10 is 32x16 pixels, but cifar10 has 32x32"),
        (_numbers_for_images, r"column img of test of cifar10 must hold bytes of files, but holds double"),
        (_paths_for_images, r"column img of test of cifar10 must hold bytes of files, but holds string"),
        (_one_image_missing, r"row 5 of column img.bytes of test of cifar10 is empty"),
        (
            _image_not_an_image,
            r"image 0 in test of cifar10 cannot be decoded: replace or remove the file .it is no image",
        ),
        (_image_cut_short, r"image 0 in test of cifar10 cannot be decoded"),
        (_image_absent, r"row 0 of column img.bytes of test of cifar10 is empty"),
        (_file_cut_short, r"cannot read .*train-00001-of-00002.parquet as parquet: replace the file"),
        (_file_damaged_inside, r"cannot read the parquet files in .*plain_text"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_sentence_and_leaves_no_cache(folder, tmp_path, capfd, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load("cifar10", folder.path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "cache").exists()


class FakeHub:
    """Stands for the hub: the probe and `load_dataset` answer from a local folder, or raise `error`."""

    def __init__(self, monkeypatch, folder=None, error=None, missing=()):
        import datasets
        import huggingface_hub

        self.asked = []

        def probe(_, hub_id, **__):
            self.asked.append(hub_id)
            if error:
                raise error

        def load_dataset(hub_id):
            files = {s: sorted((folder.path / "plain_text").glob(f"{s}-*")) for s in ("train", "test")}
            return datasets.DatasetDict(
                {s: datasets.Dataset.from_parquet([str(p) for p in f]) for s, f in files.items() if s not in missing}
            )

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", probe)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_without_a_folder_the_set_comes_from_the_hub_once_and_then_from_the_cache(folder, monkeypatch):
    hub = FakeHub(monkeypatch, folder)
    for _ in range(2):
        assert_holds(load("cifar10"), folder)
    assert hub.asked == ["uoft-cs/cifar10"]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), TimeoutError(), RuntimeError("401")])
def test_an_unreachable_hub_is_one_sentence_that_names_the_folder_option(monkeypatch, error):
    FakeHub(monkeypatch, error=error)
    with pytest.raises(UserError, match=r"cannot get uoft-cs/cifar10 from the .* hub \(.+\): .*--data-dir") as caught:
        load("cifar10")
    assert "\n" not in str(caught.value)


def test_a_hub_set_without_a_test_split_is_refused(folder, monkeypatch):
    FakeHub(monkeypatch, folder, missing=("test",))
    with pytest.raises(UserError, match="uoft-cs/cifar10 on the hub has no test split"):
        load("cifar10")


def test_smaller_images_are_means_of_squares_and_kept(folder, monkeypatch):
    data = load("cifar10", folder.path, image_size=8)
    squares = folder.train_x.astype(np.float64).reshape(30, 8, 4, 8, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert torch.equal(data.train_x, torch.from_numpy(np.floor(squares + 0.5)).to(torch.uint8))
    assert data.test_x.shape == (12, 3, 8, 8) and data.augment.crop_padding == 1
    for channel in range(3):
        levels = data.train_x[:, channel].double() / 255
        assert data.mean[channel] == pytest.approx(float(levels.mean()))
        assert data.std[channel] == pytest.approx(float(levels.std(correction=0)))
    assert_holds(load("cifar10", folder.path, image_size=32), folder)
    monkeypatch.setattr(images_module, "_smaller", None)
    assert torch.equal(load("cifar10", folder.path, image_size=8).train_x, data.train_x)


@pytest.mark.parametrize("size", [12, 64, 0])
def test_a_size_that_divides_nothing_is_refused(folder, size):
    with pytest.raises(UserError, match="give --image-size 1, 2, 4, 8, 16 or 32"):
        load("cifar10", folder.path, image_size=size)
