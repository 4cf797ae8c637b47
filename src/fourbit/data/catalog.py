"""The data sets, one registered function each: the place to add another.

A loader gets the user's folder (or None) and returns an `ImageData`. Sets stored as parquet with an image column and a
label column, the hub's usual form, need only the constants that `read_images` asks for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fourbit.data._base import ImageData
from fourbit.data._cache import cached
from fourbit.data._columns import file_column, number_column, text_column
from fourbit.data._images import ImageSource, load_images
from fourbit.data._large_images import LargeImages, from_tables, open_large_images
from fourbit.data._own_text import make_text, text_of_tables
from fourbit.data._registered import register
from fourbit.data._sources import find_parquet, fingerprint, open_folder, open_hub
from fourbit.data._speech import SpeechData, make_speech, read_wav_folders
from fourbit.data._text import TextData, from_characters, from_words, read_lines
from fourbit.data._translation import (
    TOKENIZER_FILE,
    TranslationData,
    encode_pairs,
    from_tensors,
    load_tokenizer,
    read_rows,
    require_tokenizers,
)
from fourbit.errors import UserError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

DIGITS_NUM_TEST = 360


@register("digits")
def digits(data_dir: Path | None) -> ImageData:
    """1,797 handwritten digits, 8x8 grey, that come with scikit-learn: no download, a run takes seconds.

    Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI 1998. The 17 grey levels 0..16 become
    round(level * 255/16). The split into 1,437 training and 360 test images is fixed and has the same share of each
    class. Digits are neither flipped (a mirrored 2 is no digit) nor shifted (they fill the frame).
    """
    if data_dir is not None:
        raise UserError("digits comes with scikit-learn and reads no folder: leave out the data folder (--data-dir).")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("digits needs scikit-learn: pip install 'fourbit[train]'.") from error
    levels, labels = load_digits(return_X_y=True)
    pixels = np.rint(levels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_NUM_TEST, random_state=0, stratify=labels)
    x, y = torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))
    return ImageData(
        name="digits",
        train_x=x[train],
        train_y=y[train],
        test_x=x[test],
        test_y=y[test],
        classes=tuple("0123456789"),
        # Over all pixels of the 1,437 training images.
        mean=(0.3054,),
        std=(0.3760,),
    )


@register("cifar10")
def cifar10(data_dir: Path | None, image_size: int | None = None) -> ImageData:
    """50,000 training and 10,000 test photographs, 32x32 colour, 10 classes. Krizhevsky 2009.

    Augmented in the usual way: 4 pixels of padding, a random 32x32 crop, a random horizontal flip. image_size (16, 8, ...):
    averaged over squares of pixels, and padded by as much less.
    """
    source = ImageSource(
        "cifar10",
        hub_id="uoft-cs/cifar10",
        channels=3,
        image_size=32,
        classes=CIFAR10_CLASSES,
        # Over all pixels of the training images. (The widespread std of about 0.20 averages per-image deviations.)
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        crop_padding=4,
    )
    return load_images(source, data_dir, image_size)


@register("fashion_mnist")
def fashion_mnist(data_dir: Path | None, image_size: int | None = None) -> ImageData:
    """60,000 training and 10,000 test pictures of clothes, 28x28 grey, 10 classes. Xiao et al., arXiv 1708.07747.

    Augmented by 2 pixels of padding, a random 28x28 crop, a random horizontal flip. image_size (14, 7, ...): as for cifar10.
    """
    source = ImageSource(
        "fashion_mnist",
        hub_id="zalando-datasets/fashion_mnist",
        channels=1,
        image_size=28,
        classes=FASHION_CLASSES,
        # Over all pixels of the training images.
        mean=(0.2860,),
        std=(0.3530,),
        crop_padding=2,
    )
    return load_images(source, data_dir, image_size)


def _large_images(name: str, hub_id: str, data_dir: Path | None) -> LargeImages:
    return from_tables(name, open_hub(hub_id)) if data_dir is None else open_large_images(name, data_dir)


@register("imagenet")
def imagenet(data_dir: Path | None) -> LargeImages:
    """ImageNet, 1.28 million training and 50,000 validation photographs, 1000 classes. Russakovsky et al. 2015.

    Reads folders train/CLASS/*.JPEG and val/CLASS/*.JPEG, or parquet files with the columns image and label; the hub gives it
    to those who have accepted its terms. Networks read 224x224 pixels.
    """
    return _large_images("imagenet", "ILSVRC/imagenet-1k", data_dir)


@register("imagenette")
def imagenette(data_dir: Path | None) -> LargeImages:
    """Ten classes of ImageNet that are easy to tell apart. Howard, github.com/fastai/imagenette.

    Read as imagenet is; a stand-in for it on small machines.
    """
    if data_dir is None:
        raise UserError("imagenette needs the folder of its images or parquet files: give it with --data-dir.")
    return _large_images("imagenette", "", data_dir)


@register("ptb")
def ptb(data_dir: Path | None) -> TextData:
    """Penn Treebank, 929,589 training and 82,430 test words, 10,000 different ones, with Mikolov's preprocessing.

    Marcus et al. 1993; Mikolov et al. 2010. Reads ptb.train.txt and ptb.test.txt.
    """
    names = {"train": "ptb.train.txt", "test": "ptb.test.txt"}
    if data_dir is None:
        raise UserError(
            "ptb is not on the hub as plain text: give the folder of ptb.train.txt and ptb.test.txt (--data-dir)."
        )
    return from_words("ptb", read_lines(data_dir, names))


@register("wikitext2")
def wikitext2(data_dir: Path | None, tokenizer: str | None = None) -> TextData:
    """WikiText-2, two million words of Wikipedia, 33,278 different ones, or other tokens (--tokenizer bpe). Merity et al.,
    arXiv 1609.07843.

    The test split is that of the files; where they have none, it is the validation split.
    """
    if data_dir is None:
        tables = open_hub("Salesforce/wikitext", "wikitext-2-v1")
    else:
        tables = open_folder(find_parquet(data_dir, {"test": "validation"}))
    if tokenizer is not None:
        return make_text("wikitext2", text_of_tables(tables, ("text",)), tokenizer)
    return from_words("wikitext2", {s: text_column(table, f"{s} of wikitext2", "text") for s, table in tables.items()})


@register("tinyshakespeare")
def tinyshakespeare(data_dir: Path | None, tokenizer: str | None = None) -> TextData:
    """1,115,394 characters of Shakespeare, 65 different ones, or other tokens (--tokenizer bpe); the last tenth is the test
    split. Karpathy 2015.

    Reads input.txt.
    """
    if data_dir is None:
        raise UserError("tinyshakespeare needs the folder of its file input.txt: give it with --data-dir.")
    lines = read_lines(data_dir, {"train": "input.txt"})["train"]
    text = "".join(f"{line}\n" for line in lines)
    cut = len(text) * 9 // 10
    if tokenizer is not None:
        return make_text("tinyshakespeare", {"train": text[:cut], "test": text[cut:]}, tokenizer)
    return from_characters("tinyshakespeare", text[:cut], text[cut:])


SPOKEN_DIGITS_RATE = 8000


@register("spoken_digits")
def spoken_digits(data_dir: Path | None) -> SpeechData:
    """3,000 recordings of the ten digits by six speakers, 8 kHz. Jackson et al., Free Spoken Digit Dataset, CC BY-SA 4.0.

    Reads parquet files with the columns audio and label, or folders train/0/*.wav to test/9/*.wav. Files that put the
    recordings of one speaker into the test split measure what a network makes of a voice that it has not heard.
    """
    if data_dir is None:
        raise UserError("spoken_digits needs the folder of its parquet or WAV files: give it with --data-dir.")
    classes = tuple("0123456789")
    if any(data_dir.rglob("*.parquet")):
        rows = {}
        for split, table in open_folder(find_parquet(data_dir)).items():
            where = f"{split} of spoken_digits"
            audio, labels = file_column(table, where, "audio"), number_column(table, where, "label")
            pairs = zip(audio.to_pylist(), labels.tolist(), strict=True)
            rows[split] = [(content, f"row {i} of {where}", label) for i, (content, label) in enumerate(pairs)]
    else:
        rows = read_wav_folders(data_dir, classes)
    return make_speech("spoken_digits", rows, classes, SPOKEN_DIGITS_RATE)


def _translation(
    name: str,
    data_dir: Path | None,
    hub: tuple[str, str | None],
    languages: tuple[str, str],
    num_tokens: int,
    longest: int = 250,
) -> TranslationData:
    require_tokenizers()
    files = None if data_dir is None else find_parquet(data_dir)
    own = None if data_dir is None else data_dir / TOKENIZER_FILE
    own = own if own is not None and own.is_file() else None
    if own is not None:
        load_tokenizer(own)
    known = {**(files or {}), **({} if own is None else {"tokenizer": [own]})}
    key = fingerprint(f"{name} {hub} {num_tokens} {longest}", known, data_dir)

    def make() -> dict[str, torch.Tensor]:
        tables = open_hub(*hub) if files is None else open_folder(files)
        return encode_pairs(read_rows(tables, languages, name), num_tokens, longest, own)

    return from_tensors(name, cached(name, key, make))


@register("multi30k")
def multi30k(data_dir: Path | None) -> TranslationData:
    """Captions of photographs, English to German: 29,000 training and 1,000 test pairs (2016), 5,000 pieces of words.

    Elliott et al., "Multi30K: multilingual English-German image descriptions", 2016. Reads parquet files with the columns en
    and de. Training pairs of more than 250 pieces are left out, with a warning (here there are none).
    """
    return _translation("multi30k", data_dir, ("bentrevett/multi30k", None), ("en", "de"), 5000)


@register("wmt14")
def wmt14(data_dir: Path | None) -> TranslationData:
    """WMT 2014, English to German: 4.5 million training and 3,003 test pairs, 37,000 pieces of words as in Vaswani et al.

    Reads parquet files with the columns en and de, or with one column translation. Training pairs of more than 250 pieces are
    left out, with a warning.
    """
    return _translation("wmt14", data_dir, ("wmt/wmt14", "de-en"), ("en", "de"), 37_000)
