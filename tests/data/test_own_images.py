"""Images of one's own: every layout, any classes, size and channels found, and folders that are not what they should be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fourbit import data
from fourbit.data import ImageData, LargeImages, batches
from fourbit.errors import UserError

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def picture(number: int, size: tuple[int, int] = (12, 12), colour: bool = False) -> bytes:
    shape = (size[1], size[0], 3) if colour else (size[1], size[0])
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def pixels(content: bytes) -> torch.Tensor:
    found = torch.from_numpy(np.array(Image.open(io.BytesIO(content))))
    return found[None] if found.ndim == 2 else found.permute(2, 0, 1)


def write(folder: Path, content: bytes) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_bytes(content)


def write_folders(folder: Path, classes=LETTERS, count: int = 2, test: str | None = "test", **kwargs) -> Path:
    for split, rows in (("train", count), *([(test, 1)] if test else [])):
        for number, name in enumerate(classes):
            for i in range(rows):
                place = folder / name if test is None else folder / split / name
                write(place / f"{i}.png", picture(1000 * number + 10 * i + len(split), **kwargs))
    return folder


def load(folder: Path, **options) -> ImageData:
    found = data.load("images", folder, **options)
    assert isinstance(found, ImageData)
    return found


@pytest.mark.parametrize("test", ["test", "val", "valid", "Validation"])
def test_folders_of_26_classes_become_grey_images_with_their_own_statistics(tmp_path, test):
    found = load(write_folders(tmp_path, test=test))
    assert (found.classes, found.channels, found.image_size) == (LETTERS, 1, 12)
    assert found.train_y.tolist() == [n for n in range(26) for _ in range(2)] and found.test_y.tolist() == list(
        range(26)
    )
    assert torch.equal(found.train_x[3], pixels(picture(1000 + 10 + 5)))
    values = found.train_x.double() / 255
    assert found.mean == pytest.approx([values.mean().item()])
    assert found.std == pytest.approx([values.std(correction=0).item()])
    assert not found.augment.flip and found.augment.crop_padding == 1


def test_one_colour_image_makes_the_set_a_colour_one(tmp_path):
    write(write_folders(tmp_path) / "train" / "b" / "9.png", picture(9, colour=True))
    found = load(tmp_path, mirror=True)
    assert found.channels == 3 and found.augment.flip
    assert torch.equal(found.train_x[4], pixels(picture(9, colour=True)))
    assert torch.equal(found.train_x[0], pixels(picture(5)).expand(3, -1, -1))
    values = found.train_x.double() / 255
    assert found.mean == pytest.approx(values.mean((0, 2, 3)).tolist())


def test_without_a_test_folder_a_tenth_of_each_class_is_held_out_always_the_same(tmp_path):
    write_folders(tmp_path / "wrapped", classes=("x", "y"), count=30, test=None)
    write(tmp_path / "wrapped" / "z" / "deep" / "1.png", picture(1))  # one image of a class is for training
    write(tmp_path / "wrapped" / ".hidden" / "1.png", picture(1))
    write(tmp_path / "wrapped" / "x" / "notes.txt", b"no image")
    write(tmp_path / "wrapped" / "x" / "._0.png", b"what an archive of macOS adds")
    found, again = load(tmp_path), load(tmp_path / "wrapped")
    assert found.classes == ("x", "y", "z")
    assert found.test_y.tolist() == [0] * 3 + [1] * 3 and found.train_y.tolist() == [0] * 27 + [1] * 27 + [2]
    assert torch.equal(found.test_x, again.test_x)
    everything = torch.cat([found.train_x, found.test_x]).flatten(1)
    assert len(everything.unique(dim=0)) == 61


def test_a_test_folder_without_labels_gives_way_to_the_validation_folder(tmp_path):
    write_folders(tmp_path, test="val")
    write(tmp_path / "test" / "0.png", picture(77))
    assert len(load(tmp_path).test_y) == 26


def test_images_of_several_sizes_need_one_and_are_scaled(tmp_path):
    write(write_folders(tmp_path) / "train" / "b" / "wide.png", picture(7, (24, 12)))
    with pytest.raises(UserError, match=r"the images have several sizes: choose the one .* with --image-size"):
        load(tmp_path)
    found = load(tmp_path, image_size=16)
    assert found.train_x.shape == (53, 1, 16, 16)
    expected = Image.open(io.BytesIO(picture(7, (24, 12)))).resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(found.train_x[4, 0], torch.from_numpy(np.array(expected)))


def test_images_that_are_not_square_need_a_size(tmp_path):
    write_folders(tmp_path, size=(20, 10))
    with pytest.raises(
        UserError, match="have 20x10 pixels, but networks read square ones: choose a size with --image-s"
    ):
        load(tmp_path)


@pytest.mark.parametrize(("colour", "channels"), [(False, 1), (True, 3)])
def test_large_images_stay_on_disk_and_are_normalised_by_what_is_measured(tmp_path, colour, channels):
    write_folders(tmp_path, classes=("a", "b"), count=3, size=(80, 80), colour=colour)
    found = data.load("images", tmp_path)
    assert isinstance(found, LargeImages)
    assert (found.channels, found.image_size, found.mirror) == (channels, 80, False)
    x, y = next(batches(found, "test", 2, workers=0))
    assert x.shape == (2, channels, 80, 80) and y.tolist() == [0, 1]
    assert float(x.mean().abs()) < 0.2 and 0.8 < float(x.std()) < 1.2
    assert next(batches(found, "train", 2, workers=0))[0].shape == (2, channels, 80, 80)


def test_a_list_of_files_and_labels_is_read_with_its_splits(tmp_path):
    for i in range(6):
        write(tmp_path / "pictures" / f"{i}.png", picture(i))
    rows = [
        f"pictures/{i}.png,{label},{split}"
        for i, label, split in zip(range(6), "xyxyxy", ["train"] * 4 + ["test"] * 2, strict=True)
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(["Filename,class,split", *rows]))
    found = load(tmp_path)
    assert found.classes == ("x", "y") and found.train_y.tolist() == [0, 1, 0, 1] and found.test_y.tolist() == [0, 1]
    assert torch.equal(found.test_x[1], pixels(picture(5)))
    (tmp_path / "metadata.csv").write_text("\n".join(["Filename,class,split", *rows, "nowhere.png,x,train"]))
    with pytest.raises(UserError, match=r"line 8 of \S+metadata.csv names \S+nowhere.png, which is not there"):
        load(tmp_path)
    (tmp_path / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        UserError, match="has the columns a, b, and which one is the file is unclear: name those of file an"
    ):
        load(tmp_path)


def write_table(folder: Path, name: str = "data", **columns) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


CELLS = [picture(i) for i in range(20)]


def test_tables_of_bytes_with_text_or_numbers_for_labels_are_read(tmp_path):
    names = [f"class {i % 4}" for i in range(20)]
    found = load(write_table(tmp_path / "text", content=CELLS, name_of_it=names))
    assert found.classes == ("class 0", "class 1", "class 2", "class 3") and len(found.test_y) == 4
    write_table(
        tmp_path / "numbers",
        "train",
        image=[{"bytes": c, "path": None} for c in CELLS],
        label=[1 + i % 3 for i in range(20)],
    )
    found = load(
        write_table(tmp_path / "numbers", "valid", image=[{"bytes": c, "path": None} for c in CELLS[:2]], label=[3, 1])
    )
    assert (
        found.classes == ("1", "2", "3")
        and found.train_y[:4].tolist() == [0, 1, 2, 0]
        and found.test_y.tolist() == [2, 0]
    )
    assert torch.equal(found.train_x[19], pixels(CELLS[19]))


def test_columns_that_could_both_be_meant_are_chosen_by_name(tmp_path):
    fine, coarse = [i % 5 for i in range(20)], [i % 2 for i in range(20)]
    folder = write_table(tmp_path / "data", img=CELLS, fine_label=fine, coarse_label=coarse)
    with pytest.raises(
        UserError, match=r"^fine_label and coarse_label could all hold the labels: name those of file and la"
    ):
        load(folder)
    assert load(folder, columns=("img", "coarse_label")).num_classes == 2
    assert load(folder, columns=("img", "fine_label")).num_classes == 5
    with pytest.raises(
        UserError, match="there is no column label, only img, fine_label, coarse_label: name others with"
    ):
        load(folder, columns=("img", "label"))


def test_names_that_a_table_declares_keep_their_order(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a", "unused"])})
    cells = [{"bytes": c, "path": None} for c in CELLS]
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(20)]}, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    found = load(tmp_path)
    assert found.classes == ("z", "a", "unused") and found.train_y[:2].tolist() == [0, 1]


def _one_class(folder):
    write_folders(folder, classes=("only",))


def _no_images(folder):
    (folder / "train" / "a").mkdir(parents=True)


def _flat(folder):
    write(folder / "0.png", picture(0))


def _class_in_the_test_alone(folder):
    write(write_folders(folder, classes=("a", "b")) / "test" / "c" / "0.png", picture(0))


def _test_alone(folder):
    write(folder / "test" / "a" / "0.png", picture(0))


def _one_of_each(folder):
    write_folders(folder, count=1, test=None)


def _damaged(folder):
    write(write_folders(folder, classes=("a", "b")) / "train" / "a" / "0.png", b"hello")


def _no_label(folder):
    write_table(folder, image=CELLS)


def _no_image(folder):
    write_table(folder, label=[0, 1])


def _empty_cell(folder):
    write_table(folder, image=[*CELLS[:3], None], label=[0, 1, 0, 1])


def _test_without_labels(folder):
    write_table(folder, "train", image=CELLS, label=[0, 1] * 10)
    write_table(folder, "test", image=CELLS[:2], id=[0, 1])


def _empty_label(folder):
    write_table(folder, image=CELLS[:4], label=["a", "b", " ", "a"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_one_class, "all images are of one class, only: a network that tells classes apart needs two at least"),
        (
            _no_images,
            r"train has no images: need a folder for each class, CLASS/NAME.bmp, parquet files, or a list metad",
        ),
        (_flat, "has 1 images in no folders of classes: need a folder for each class"),
        (_class_in_the_test_alone, r"test/c/0.png is of class c, which none of the images to train with has: are both"),
        (_test_alone, "has a folder test and none called train: add one"),
        (_one_of_each, "each class has but one of the images, and no test split: add some to test with"),
        (_damaged, r"train/a/0.png cannot be decoded: replace or remove the file \(it is no image\)"),
        (
            _no_label,
            "none of the columns image seems to hold the labels: name those of file and label with --columns FI",
        ),
        (
            _no_image,
            r"none of the columns label seems to hold the files \(image or img\): name those of file and label",
        ),
        (_empty_cell, "row 3 of column image of train is empty: remove the row, or replace the file"),
        (
            _test_without_labels,
            "the test split has no column label, as the training split has, only image, id: are both",
        ),
        (_empty_label, "row 2 of column label of train is empty: remove the row, or fill it in"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_sentence(tmp_path, spoil, message):
    (tmp_path / "data").mkdir()
    spoil(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_options_that_a_data_set_does_not_have_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^images has no option tokenizer, only image_size, mirror, columns: leave it out"
    ):
        load(tmp_path, tokenizer="bytes")
    with pytest.raises(UserError, match=r"^digits has no option mirror, and takes no options: leave it out"):
        data.load("digits", mirror=True)
    with pytest.raises(UserError, match=r"^images means data of your own: give its folder with --data-dir"):
        data.load("images")


def test_a_named_set_with_other_classes_names_the_way_to_ones_own(folder):
    folder.write("test-00000-of-00001", folder.test_x, np.arange(12))
    with pytest.raises(
        UserError, match=r"labels must be 0 to 9 \(for data of your own, with any classes: --data images\)"
    ):
        data.load("cifar10", folder.path)


def test_other_labels_of_the_same_files_are_other_data(tmp_path):
    for i in range(8):
        write(tmp_path / f"{i}.png", picture(i))
    seen = set()
    for labels in ("xyxyxyxy", "xyxyxyyx", "xyxyxyxy"):
        (tmp_path / "metadata.csv").write_text("file,label\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(labels)))
        seen.add(data.identity(load(tmp_path)))
    assert len(seen) == 2
