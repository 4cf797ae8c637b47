"""Photographs on disk: both layouts, parts that are drawn, and folders that are not what they should be."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fourbit import data
from fourbit.data import LargeImages, batches, num_batches
from fourbit.data._large_images import MEAN, STD, _Decoded, _middle, _random_part
from fourbit.errors import UserError


def photograph(number: int, width: int = 300, height: int = 260) -> bytes:
    random = np.random.default_rng(number)
    small = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, "png")
    return buffer.getvalue()


def write_folders(folder: Path, test: str = "val") -> Path:
    for split, count in (("train", 4), (test, 2)):
        for label in ("n01", "n02"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                (folder / split / label / f"{i}.JPEG").write_bytes(photograph(i + 10 * int(label[1:]), 200 + 10 * i))
    return folder


def write_tables(folder: Path, **columns) -> Path:
    folder.mkdir()
    for split, count in (("train", 8), ("validation", 4)):
        cells = [{"bytes": photograph(i % 2 * 10 + i), "path": None} for i in range(count)]
        table = pa.table(columns or {"image": cells, "label": [i % 2 for i in range(count)]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(params=["folders", "tables"])
def photographs(tmp_path, request) -> LargeImages:
    write = write_folders if request.param == "folders" else write_tables
    found = data.load("imagenet", write(tmp_path / "data"))
    assert isinstance(found, LargeImages)
    return found


def test_both_layouts_give_normalised_batches_of_one_size(photographs):
    assert photographs.num_classes == 2 and num_batches(photographs, "train", 3) == 2
    x, y = next(batches(photographs, "train", 3, workers=0))
    assert x.shape == (3, 3, 224, 224) and x.dtype == torch.float32 and y.shape == (3,)
    pixels = x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    assert float(pixels.min()) + 1e-5 >= 0 and float(pixels.max()) <= 1 + 1e-5
    labels = torch.cat([y for _, y in batches(photographs, "test", 3, workers=0)])
    assert torch.equal(labels, photographs.test_y)


def test_what_is_drawn_depends_on_image_and_epoch_alone(photographs):
    def epoch(number: int, start: int = 0, size: int = 2, workers: int = 0):
        return list(batches(photographs, "train", size, seed=3, epoch=number, start=start, workers=workers))

    whole, late, wide = epoch(0), epoch(0, start=2), epoch(0, size=4)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[2:], late, strict=True))
    assert torch.equal(torch.cat([x for x, _ in whole]), torch.cat([x for x, _ in wide]))
    assert not torch.equal(whole[0][0], epoch(1)[0][0])
    apart = epoch(0, workers=1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, apart, strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_job_does_not_take_the_workers_away(photographs, number):
    stream = batches(photographs, "train", 1, workers=1)
    seen = [next(stream)]
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    os.kill(workers[0].pid, number)
    assert len(seen + list(stream)) == num_batches(photographs, "train", 1)
    assert not workers[0].is_alive()


def test_a_worker_that_hangs_does_not_outlive_the_stream(photographs, monkeypatch):
    """It ignores SIGTERM while the stream is open, and not any more when it is closed."""
    opened = _Decoded._open
    monkeypatch.setattr(_Decoded, "_open", lambda self, i: time.sleep(600) if self.epoch == 7 else opened(self, i))
    stream = batches(photographs, "train", 1, epoch=7, workers=1)
    timer = threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGALRM))
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError))
    timer.start()
    try:
        with pytest.raises(TimeoutError):
            next(stream)
    finally:
        signal.signal(signal.SIGALRM, before)
    stream.close()
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(30)
        assert not worker.is_alive()


def test_processes_decode_their_own_share_of_each_batch(photographs):
    whole = list(batches(photographs, "test", 3, workers=0))
    parts = [list(batches(photographs, "test", 3, workers=0, part=slice(rank, None, 3))) for rank in range(3)]
    assert [len(x) for x, _ in parts[2]] == [1, 0]  # the last batch has one image
    for k, (x, y) in enumerate(whole):
        shares = [part[k] for part in parts]
        assert torch.equal(torch.cat([s for s, _ in shares]), x) and torch.equal(torch.cat([s for _, s in shares]), y)


def test_the_middle_is_what_pil_gives_step_by_step():
    image = Image.open(io.BytesIO(photograph(1, 512, 256)))
    found = np.asarray(_middle(image, 224), dtype=float)
    expected = np.asarray(image.crop((144, 16, 368, 240)), dtype=float)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1


def test_random_parts_have_the_areas_and_aspects_of_the_paper():
    """A gradient image shows from the corners of a part where it was cut."""
    width, height = 400, 300
    grid = np.zeros((height, width, 3), np.uint8)
    grid[..., 0] = (np.arange(width) * 255 / (width - 1)).astype(np.uint8)
    grid[..., 1] = (np.arange(height) * 255 / (height - 1)).astype(np.uint8)[:, None]
    areas, mirrored = [], 0
    for i in range(300):
        part = np.asarray(_random_part(Image.fromarray(grid), 64, torch.Generator().manual_seed(i)), dtype=float)
        w = abs(part[32, 60, 0] - part[32, 3, 0]) / 57 * 64 / 255 * width
        h = abs(part[60, 32, 1] - part[3, 32, 1]) / 57 * 64 / 255 * height
        areas.append(w * h / (width * height))
        mirrored += part[32, 60, 0] < part[32, 3, 0]
        assert 0.6 < w / h < 1.6
    assert 0.05 < min(areas) < 0.15 and max(areas) > 0.8
    assert 110 < mirrored < 190


def test_bad_input_is_named_with_the_remedy(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither folders train/CLASS and val/CLASS nor parquet files"):
        data.load("imagenet", tmp_path / "empty")
    half = write_folders(tmp_path / "half", test="other")
    with pytest.raises(UserError, match="has no folder val or validation or test"):
        data.load("imagenet", half)
    strange = write_folders(tmp_path / "strange")
    (strange / "val" / "n01").rename(strange / "val" / "n99")
    with pytest.raises(UserError, match=r"n99.*is of class n99, which no training image has"):
        data.load("imagenet", strange)
    cell = {"bytes": photograph(0), "path": None}
    for i, (columns, message) in enumerate(
        [
            ({"text": ["a"]}, "train of imagenet has no column image.bytes or image, only text: give the folder"),
            ({"image": [cell]}, "train of imagenet has no column label, only image.bytes, image.path"),
            (
                {"image": ["a.png"], "label": [0]},
                "column image of train of imagenet must hold bytes of files, but holds s",
            ),
            ({"image": [cell, None], "label": [0, 1]}, "row 1 of column image.bytes of train of imagenet is empty"),
            (
                {"image": [cell], "label": [0.5]},
                "column label of train of imagenet must hold whole numbers, but holds d",
            ),
            ({"image": [cell], "label": [-1]}, "label -1 in row 0 of train of imagenet is out of range: .* 0 to 0"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            data.load("imagenet", write_tables(tmp_path / f"tables{i}", **columns))
    damaged = write_folders(tmp_path / "damaged")
    (damaged / "train" / "n01" / "0.JPEG").write_bytes(b"no image")
    found = data.load("imagenet", damaged)
    assert isinstance(found, LargeImages)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^\S+n01/0.JPEG cannot be decoded: replace or remove the file \([^\n]*$"):
            list(batches(found, "train", 8, workers=workers))


def test_imagenette_itself(shared_data):
    folder = shared_data / "imagenette"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}")
    found = data.load("imagenette", folder)
    assert isinstance(found, LargeImages)
    assert (len(found.train), len(found.test), found.num_classes) == (800, 250, 10)
    x, _ = next(batches(found, "test", 64, workers=0))
    assert float(x.mean().abs()) < 0.3 and 0.7 < float(x.std()) < 1.4


def test_decoding_leaves_torchs_random_numbers_alone(photographs):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(batches(photographs, "train", 4, workers=0))
    assert torch.equal(torch.rand(3), expected)


def test_a_test_split_without_labels_gives_way_to_the_validation_split(tmp_path):
    folder = write_tables(tmp_path / "hub")
    cells = [{"bytes": photograph(i), "path": None} for i in range(3)]
    pq.write_table(pa.table({"image": cells, "label": [-1, -1, -1]}), folder / "test-00000-of-00001.parquet")
    found = data.load("imagenet", folder)
    assert isinstance(found, LargeImages)
    assert len(found.test) == 4 and found.num_classes == 2


def test_classes_without_names_are_counted_over_both_splits(tmp_path):
    folder = write_tables(tmp_path / "data")
    cells = [{"bytes": photograph(i), "path": None} for i in range(6)]
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 2, 0, 1, 2]}), folder / "train-00000-of-00001.parquet")
    found = data.load("imagenet", folder)
    assert isinstance(found, LargeImages) and found.num_classes == 3
    pq.write_table(pa.table({"image": cells, "label": [None, 1, 2, 0, 1, 2]}), folder / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="row 0 of column label of train of imagenet is empty"):
        data.load("imagenet", folder)
