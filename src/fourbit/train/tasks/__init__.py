"""What a run trains for: which network fits the data, how batches come, what the loss is, and by which number it is judged.

A task is chosen by the data: images are classified, of text the next token is predicted, speech is heard, pairs of sentences
are translated. The loop asks a task for batches and losses and knows nothing else about data.
"""

from __future__ import annotations

import torch

from fourbit import data as datasets
from fourbit import models
from fourbit.data import SpeechData, TextData, TranslationData
from fourbit.errors import UserError
from fourbit.train._config import TrainConfig
from fourbit.train.tasks._base import Batch as Batch
from fourbit.train.tasks._base import Examples as Examples
from fourbit.train.tasks._base import Task as Task
from fourbit.train.tasks._classification import Classification
from fourbit.train.tasks._language import LanguageModelling
from fourbit.train.tasks._metric import Metric as Metric
from fourbit.train.tasks._metric import metric_of as metric_of
from fourbit.train.tasks._speech import SpeechRecognition
from fourbit.train.tasks._translation import Translation


def make_task(config: TrainConfig, device: torch.device, rank: int, world: int) -> Task:
    """The task of the configured data.

    Raises:
        UserError: data that cannot be loaded, or that the network does not read.
    """
    data = datasets.load(config.data, config.data_dir, **config.data_options())
    kinds: dict[type, models.Kind] = {TextData: "text", SpeechData: "speech", TranslationData: "translation"}
    kind = kinds.get(type(data), "image")
    reads = models.kind_of(config.model)
    if reads != kind:
        words = {"text": "text", "image": "images", "speech": "speech", "translation": "pairs of sentences"}
        raise UserError(
            f"{config.model} reads {words[reads]}, but {config.data} has {words[kind]}: choose one of "
            f"{', '.join(models.names(kind))}."
        )
    processes = device, rank, world
    if isinstance(data, TextData):
        return LanguageModelling(config, data, *processes)
    if isinstance(data, SpeechData):
        return SpeechRecognition(config, data, *processes)
    if isinstance(data, TranslationData):
        return Translation(config, data, *processes)
    return Classification(config, data, *processes)
