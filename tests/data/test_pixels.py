"""Pixels of every kind of image that files hold: grey levels and colours stay what they are, or the file is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fourbit import data
from fourbit.data import ImageData, LargeImages, batches
from fourbit.data._pixels import converted, is_grey, opened
from fourbit.errors import UserError

RAMP = np.linspace(0, 65535, 16 * 16).reshape(16, 16)
LEVELS = np.rint(RAMP / 257).astype(int)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def stored(image: Image.Image, format: str = "png") -> bytes:
    content = io.BytesIO()
    image.save(content, format)
    return content.getvalue()


def read(content: bytes, mode="RGB") -> np.ndarray:
    return np.asarray(converted(opened(content, "it"), mode, "it")).astype(int)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("format", "order"), [("png", "<u2"), ("png", ">u2"), ("tiff", "<u2"), ("tiff", ">u2"), ("ppm", "<u2")]
)
def test_sixteen_bit_levels_become_the_nearest_of_eight_bits(format, order, mode):
    found = read(stored(Image.fromarray(np.rint(RAMP).astype(order)), format), mode)
    assert np.abs(found - (LEVELS if mode == "L" else LEVELS[..., None])).max() == 0


def test_black_and_white_is_0_and_255():
    found = read(stored(Image.fromarray(COLOURS[..., 0] > 127)), "L")
    assert np.array_equal(found, np.where(COLOURS[..., 0] > 127, 255, 0))


@pytest.mark.parametrize(("mode", "format", "far"), [("YCbCr", "tiff", 4), ("LAB", "tiff", 8), ("RGB", "png", 0)])
def test_colours_of_other_spaces_are_about_those_that_were_written(mode, format, far):
    smooth = np.asarray(Image.fromarray(COLOURS[:3, :3]).resize((16, 16), Image.Resampling.BILINEAR))
    content = stored(Image.fromarray(smooth).convert(mode), format)
    assert Image.open(io.BytesIO(content)).mode == mode
    assert np.abs(read(content) - smooth).mean() <= far
    assert np.abs(read(content, "L") - smooth @ [0.299, 0.587, 0.114]).mean() <= max(far, 1)


def test_cmyk_is_its_complement_without_black():
    content = stored(
        Image.merge("CMYK", [Image.fromarray(255 - COLOURS[..., c]) for c in range(3)] + [Image.new("L", (16, 16))]),
        "tiff",
    )
    assert np.array_equal(read(content), COLOURS)


@pytest.mark.parametrize("mode", ["HSV", "RGBa", "La", "PA", "I;16N"])
def test_modes_that_only_memory_has_are_converted_too(mode):
    image = Image.new(mode, (4, 4))
    if mode == "I;16N":
        image = Image.fromarray(np.full((4, 4), 32896, "=u2"))
    found = np.asarray(converted(image, "RGB", "it"))
    assert found.shape == (4, 4, 3) and (found == {"HSV": 0, "I;16N": 128}.get(mode, 255)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white_and_half_of_it_half(mode):
    alpha = np.repeat([[0], [128], [255]], 3, 1).astype(np.uint8)
    black = np.zeros((3, 3), np.uint8)
    image = Image.fromarray(np.dstack([black] * (len(mode) - 1) + [alpha]))
    assert image.mode == mode
    assert read(stored(image), "L")[:, 0].tolist() == [255, 127, 0]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_that_a_png_declares_transparent_shows_white(mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), 1 if mode == "P" else (90, 90, 90) if mode == "RGB" else 90)
    if mode == "P":
        image.putpalette([0, 0, 0, 90, 90, 90])
    content = io.BytesIO()
    image.save(content, "png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert read(content.getvalue(), "L").tolist() == [[255, 90]]
    assert read(content.getvalue()).tolist() == [[[255] * 3, [90] * 3]]


@pytest.mark.parametrize(
    ("dtype", "words"), [(np.int32, "32-bit whole numbers"), (np.float32, "floating-point numbers")]
)
def test_numbers_without_a_known_white_are_refused_by_name(dtype, words):
    content = stored(Image.fromarray(np.rint(RAMP).astype(dtype)), "tiff")
    with pytest.raises(UserError, match=f"^scan.tif has pixels of {words}, and which one is white is unknown: conv"):
        converted(opened(content, "scan.tif"), "L", "scan.tif")


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("1", (2, 2)), True),
        (Image.new("L", (2, 2)), True),
        (Image.new("LA", (2, 2)), True),
        (Image.fromarray(np.zeros((2, 2), np.uint16)), True),
        (Image.new("L", (2, 2)).convert("P"), True),
        (Image.fromarray(COLOURS).convert("P"), False),
        (Image.new("RGB", (2, 2)), False),
        (Image.new("RGBA", (2, 2)), False),
    ],
)
def test_files_that_can_hold_grey_alone_are_known_by_their_header(image, grey):
    assert is_grey(opened(stored(image), "it")) is grey


def test_sixteen_bits_come_through_folders_and_tables(tmp_path):
    scan = stored(Image.fromarray(np.rint(RAMP).astype(np.uint16)))
    for split in ("train", "val"):
        (tmp_path / "folders" / split / "a").mkdir(parents=True)
        (tmp_path / "folders" / split / "a" / "scan.png").write_bytes(scan)
    folders = data.load("imagenette", tmp_path / "folders")
    assert isinstance(folders, LargeImages)
    x, _ = next(batches(folders, "test", 1, workers=0))
    pixels = (x[0] * 0.225 + 0.45) * 255
    assert 100 < float(pixels.mean()) < 155
    large = stored(Image.fromarray(np.rint(RAMP).astype(np.uint16)).resize((28, 28), Image.Resampling.NEAREST))
    (tmp_path / "tables").mkdir()
    for split in ("train", "test"):
        table = pa.table({"image": [{"bytes": large, "path": None}], "label": [3]})
        pq.write_table(table, tmp_path / "tables" / f"{split}.parquet")
    tables = data.load("fashion_mnist", tmp_path / "tables")
    assert isinstance(tables, ImageData)
    assert 100 < float(tables.train_x.float().mean()) < 155


def test_a_file_that_is_no_image_or_is_cut_off_is_named(tmp_path: Path):
    whole = stored(Image.fromarray(COLOURS))
    for content, reason in ((b"hello", "it is no image"), (whole[:-200], r"[^\n]+")):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError, match=rf"^x.png cannot be decoded: replace or remove the file \({reason}\)\.$"):
            converted(opened(tmp_path / "x.png", "x.png"), "RGB", "x.png")
