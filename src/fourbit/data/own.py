"""Data of one's own, one registered function for each kind: what networks can be trained on without writing code.

The parameters behind the folder are the options of `fourbit.data.load`, which the trainer has as flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fourbit.data._base import ImageData
from fourbit.data._examples import find_examples
from fourbit.data._large_images import LargeImages
from fourbit.data._own_images import IMAGES, make_images
from fourbit.data._own_speech import SOUNDS, make_own_speech
from fourbit.data._own_text import find_text, make_text
from fourbit.data._own_translation import own_translation
from fourbit.data._registered import register
from fourbit.data._speech import SpeechData
from fourbit.data._text import TextData
from fourbit.data._translation import TranslationData
from fourbit.errors import UserError


@register("images")
def images(
    data_dir: Path | None, image_size: int | None = None, mirror: bool = False, columns: Sequence[str] = ()
) -> ImageData | LargeImages:
    """Your own images, of any classes: folders train/CLASS and test/CLASS (or val), folders CLASS alone (a tenth is for the
    test), a list metadata.csv of files and labels, or parquet files with both (--columns IMAGE,LABEL). Grey or colour, mean and
    deviation are found; images of several sizes need --image-size.

    Args:
        data_dir: the folder.
        image_size: height and width that they are scaled to; None: theirs.
        mirror: whether training images are mirrored at random.
        columns: of image and label, where it is not clear which.
    """
    examples = find_examples(_given(data_dir, "images"), IMAGES, columns)
    return make_images("images", examples, image_size, mirror)


@register("text")
def text(data_dir: Path | None, tokenizer: str | None = None, columns: Sequence[str] = ()) -> TextData:
    """Your own text: .txt files, those with test (or valid) in their names for the test, else the last tenth of all; or parquet
    files with a column of text; or one file of text. --tokenizer characters, bytes, words, bpe (bpe:4096: pieces of words,
    learned from the training text) or the path of a tokenizer.json.

    Args:
        data_dir: the folder, or the file.
        tokenizer: one of these; None: characters.
        columns: that of the text, where it is not clear which.
    """
    return make_text("text", find_text(_given(data_dir, "text"), columns), tokenizer)


@register("speech")
def speech(data_dir: Path | None, columns: Sequence[str] = ()) -> SpeechData:
    """Your own sounds, WAV files with a word or another label each: laid out as images are. Utterances with the same label or
    transcript are of one class.

    Args:
        data_dir: the folder.
        columns: of sound and label, where it is not clear which.
    """
    return make_own_speech("speech", find_examples(_given(data_dir, "speech"), SOUNDS, columns))


@register("translation")
def translation(data_dir: Path | None, tokenizer: str | None = None, columns: Sequence[str] = ()) -> TranslationData:
    """Your own pairs of sentences: files train.en and train.de, line by line, .tsv or .csv files with the languages in the
    first line, or parquet files; --columns en,de names languages and direction. Cut into 8,000 pieces of words, or by a
    tokenizer.json (--tokenizer, or in the folder).

    Args:
        data_dir: the folder.
        tokenizer: the path of a file of the package tokenizers.
        columns: source and target, where it is not clear which.
    """
    return own_translation("translation", _given(data_dir, "translation"), columns, tokenizer)


def _given(data_dir: Path | None, name: str) -> Path:
    if data_dir is None:
        raise UserError(f"{name} means data of your own: give its folder with --data-dir.")
    return data_dir
