"""Data sets as whole tensors, images as uint8 and text as token numbers, and batches cut from them; large images are files.

    data = load("cifar10", data_dir="path/to/cifar10")       # or from the Hugging Face hub, without data_dir
    for x, y in batches(data, "train", 128, seed=0, epoch=3):
        ...                                                  # x float32 [128, 3, 32, 32], normalised; y int64 [128]

`load` decodes every image once and keeps the tensors in a cache file, so that the second start takes about a second.
`batches` works on whole tensors: one gather, crop, flip and normalisation per batch, with no worker processes. What it
returns depends only on (seed, epoch, batch index), so a run resumes in the middle of an epoch with the same numbers.
To add a data set, register one function (see `catalog`); data of one's own need none (see `own`).
"""

from fourbit.data import catalog as catalog
from fourbit.data import own as own
from fourbit.data._base import Augment as Augment
from fourbit.data._base import ImageData as ImageData
from fourbit.data._base import num_batches as num_batches
from fourbit.data._batches import batches as batches
from fourbit.data._describe import describe as describe
from fourbit.data._identity import identity as identity
from fourbit.data._large_images import LargeImages as LargeImages
from fourbit.data._load import is_hub as is_hub
from fourbit.data._load import load as load
from fourbit.data._registered import names as names
from fourbit.data._registered import register as register
from fourbit.data._speech import SpeechData as SpeechData
from fourbit.data._speech import utterances as utterances
from fourbit.data._text import TextData as TextData
from fourbit.data._text import num_sequences as num_sequences
from fourbit.data._text import num_windows as num_windows
from fourbit.data._text import sequences as sequences
from fourbit.data._text import windows as windows
from fourbit.data._translation import BEGIN as BEGIN
from fourbit.data._translation import PAD as PAD
from fourbit.data._translation import TranslationData as TranslationData
from fourbit.data._translation import pairs as pairs
