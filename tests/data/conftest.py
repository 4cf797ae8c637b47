"""Small image folders like the hub's, made of random pictures, and caches that no other test shares."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def encode(pixels: np.ndarray) -> bytes:
    """PNG of uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


class Folder:
    """A CIFAR-10-like folder: 30 training images in two files and 12 test images, nested like the hub's."""

    def __init__(self, path: Path):
        self.path = path
        random = np.random.default_rng(0)
        self.train_x = random.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
        self.test_x = random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        self.train_y, self.test_y = np.arange(30) % 10, np.arange(12) % 10
        self.write("train-00000-of-00002", self.train_x[:20], self.train_y[:20])
        self.write("train-00001-of-00002", self.train_x[20:], self.train_y[20:])
        self.write("test-00000-of-00001", self.test_x, self.test_y)

    def file(self, stem: str) -> Path:
        return self.path / "plain_text" / f"{stem}.parquet"

    def write(self, stem: str, images, labels, image_column="img", label_column="label") -> None:
        """Write a table of `images` (pixels, or bytes of a file, or any other cells) and `labels`."""
        cells = [encode(i) if isinstance(i, np.ndarray) else i for i in images]
        cells = [{"bytes": c, "path": None} if isinstance(c, bytes) else c for c in cells]
        self.file(stem).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({image_column: cells, label_column: labels}), self.file(stem))


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("FOURBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "cifar10")


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets named by FOURBIT_DATA, else `shared/data` beside the repository."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("FOURBIT_DATA") or default)
    if not path.is_dir():
        pytest.skip(f"no real data in {path}; set FOURBIT_DATA to a folder with cifar10/ and fashion_mnist/")
    return path
