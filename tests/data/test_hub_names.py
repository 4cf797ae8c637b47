"""Data sets by hf:NAME: what they hold is told by their columns, and what cannot be had is one sentence."""

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
from fourbit.data import ImageData, SpeechData, TextData, TranslationData
from fourbit.errors import UserError


def picture(number: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10, 10), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


@pytest.fixture
def hub(monkeypatch):
    """Answers for the hub from what a test puts into it: {name: {split: datasets.Dataset}}."""
    import datasets
    import huggingface_hub

    shelves: dict = {}
    asked = []

    def probe(_, name, **__):
        if name not in shelves:
            raise ConnectionError(f"no route to {name}\nat all")

    def load_dataset(path, name=None, revision=None, split=None):
        asked.append((path, name, revision, split))
        found = datasets.DatasetDict(shelves[path])
        return found if split is None else found[split]

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", probe)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    shelves["asked"] = asked
    return shelves


def table(features: dict | None = None, **columns):
    import datasets

    return datasets.Dataset.from_dict(columns, features=None if features is None else datasets.Features(features))


def images(count: int, classes: int, offset: int = 0):
    import datasets

    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(num_classes=classes)}
    cells = [{"bytes": picture(offset + i), "path": None} for i in range(count)]
    return table(features, picture=cells, kind=[i % classes for i in range(count)])


def test_images_with_declared_classes(hub):
    hub["owner/shapes"] = {"train": images(24, 12), "validation": images(12, 12, offset=50)}
    found = data.load("hf:owner/shapes")
    assert isinstance(found, ImageData)
    assert found.num_classes == 12 and found.test_y.tolist() == list(range(12))
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(picture(50)))))
    assert torch.equal(found.test_x[0, 0], expected)
    scaled = data.load("hf:owner/shapes", image_size=16, mirror=True)
    assert isinstance(scaled, ImageData) and scaled.image_size == 16 and scaled.augment.flip


def test_configuration_revision_and_splits_are_passed_on(hub):
    hub["owner/shapes"] = {"a": images(24, 2), "train": images(4, 2), "b": images(4, 2)}
    found = data.load("hf:owner/shapes?config=small&revision=v2&train=a&test=b")
    assert isinstance(found, ImageData) and (len(found.train_y), len(found.test_y)) == (24, 4)
    assert hub["asked"] == [("owner/shapes", "small", "v2", "a"), ("owner/shapes", "small", "v2", "b")]
    held_out = data.load("hf:owner/shapes?train=a")
    assert isinstance(held_out, ImageData) and (len(held_out.train_y), len(held_out.test_y)) == (22, 2)


def test_a_test_split_with_secret_labels_gives_way(hub):
    hub["x/y"] = {
        split: table(None, image=[picture(i) for i in range(4)], label=labels)
        for split, labels in (("train", [0, 1, 0, 1]), ("test", [-1] * 4), ("validation", [1, 1, 0, 0]))
    }
    found = data.load("hf:x/y")
    assert isinstance(found, ImageData) and found.test_y.tolist() == [1, 1, 0, 0]


def test_text_sound_and_translations_are_told_by_their_columns(hub):
    import datasets
    from test_own_text_and_speech import wav

    hub["a/text"] = {"train": table(None, id=[1, 2], text=["a b\n", "c"]), "test": table(None, id=[1], text=["a"])}
    found = data.load("hf:a/text", tokenizer="words")
    assert isinstance(found, TextData) and len(found.train) == 5
    sounds = [{"bytes": wav(300), "path": "x.wav"}, {"bytes": wav(900), "path": "y.wav"}] * 2
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    names = datasets.ClassLabel(names=["no", "yes"])
    made = table({"audio": stored, "label": names}, audio=sounds, label=[0, 1, 0, 1])
    made = made.cast_column("audio", datasets.Audio(decode=False))  # writing decoded sound would need torchcodec
    hub["a/sound"] = {"train": made.cast_column("audio", datasets.Audio())}
    found = data.load("hf:a/sound")
    assert isinstance(found, SpeechData) and found.classes == ("no", "yes")
    pairs = [{"de": f"Hund {i}", "en": f"dog {i}"} for i in range(20)]
    feature = datasets.Translation(languages=["de", "en"])
    hub["a/pairs"] = {"train": table({"translation": feature}, translation=pairs)}
    found = data.load("hf:a/pairs", columns=("en", "de"))
    assert isinstance(found, TranslationData) and found.languages == ("en", "de") and len(found.train[0]) == 18
    hub["a/two"] = {"train": table(None, fr=["chien"] * 20, it=["cane"] * 20)}
    found = data.load("hf:a/two")
    assert isinstance(found, TranslationData) and found.languages == ("fr", "it")


def test_a_folder_that_datasets_takes_is_read_without_the_network(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for an address"))
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "pets" / split / label / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "tables").mkdir()
    for split in ("train", "test"):
        cells = [picture(i) for i in range(6)]
        pq.write_table(pa.table({"image": cells, "label": [0, 1] * 3}), tmp_path / "tables" / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    found = data.load("hf:./pets")
    assert isinstance(found, ImageData)
    assert found.classes == ("cat", "dog") and found.test_y.tolist() == [0, 0, 1, 1]
    assert torch.equal(found.train_x, data.load("images", Path("pets")).train_x)  # type: ignore[union-attr]
    assert len(data.load("hf:tables").train_y) == 6  # type: ignore[union-attr]


def test_what_cannot_be_had_or_used_is_one_sentence(hub, tmp_path):
    hub["a/odd"] = {"train": table(None, n=[1, 2], m=[0.5, 1.5])}
    hub["a/parts"] = {"part1": images(4, 2)}
    hub["a/shapes"] = {"train": images(4, 2)}
    (tmp_path / "empty").mkdir()
    for name, options, message in (
        (
            "hf:no/where",
            {},
            r"cannot get no/where from the Hugging Face hub \(no route to no/where\): check the network",
        ),
        (
            "hf:a/odd",
            {},
            "hf:a/odd has the columns n, m, and which to train on is unclear: name those of image and label",
        ),
        ("hf:a/odd", {"columns": ("k",)}, "hf:a/odd has no column k, only n, m: name others with --columns"),
        ("hf:a/parts", {}, r"has the splits part1, and none called train: choose one, as in hf:a/parts\?train=part1"),
        (
            "hf:a/parts?split=part1",
            {},
            "unknown option of hf:a/parts 'split'.* Valid names: config, revision, train, test",
        ),
        (
            "hf:a/shapes",
            {"tokenizer": "words"},
            "hf:a/shapes holds images, which has no option tokenizer: leave it out",
        ),
        ("hf:", {}, "hf: needs the name of a data set, as in hf:ylecun/mnist, or a folder, as in hf:./folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            data.load(name, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="hf:a/shapes comes from the hub, or from the folder in its name: leave out --data-"
    ):
        data.load("hf:a/shapes", tmp_path)


def test_a_folder_that_datasets_does_not_take_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"datasets cannot read the folder \S+empty \([^\n]+\): give one that it takes"):
        data.load(f"hf:{tmp_path / 'empty'}")
