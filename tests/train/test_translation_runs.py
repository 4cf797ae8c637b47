"""Training a Transformer: it learns to translate in 4 bits, and is judged by BLEU."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sacrebleu

from fourbit import data, models
from fourbit.errors import UserError
from fourbit.train import TrainConfig, train

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "dog": "Hund", "cat": "Katze", "red": "rot"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sentences translated word by word."""
    chosen = random.Random(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 1200), ("test", 40)):
        english = [chosen.choices(list(WORDS), k=chosen.randint(4, 7)) for _ in range(count)]
        german = [" ".join(WORDS[word] for word in words) for words in english]
        pq.write_table(
            pa.table({"en": [" ".join(words) for words in english], "de": german}),
            tmp_path / "data" / f"{split}.parquet",
        )
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def tiny_transformer(monkeypatch):
    monkeypatch.setattr(
        models, "build", lambda name, num_classes, **_: models.Transformer(num_classes, 48, 4, 96, 2, max_length=40)
    )


def config(folder: Path, out: Path, **changes) -> TrainConfig:
    values = {
        "model": "transformer_small", "data": "multi30k", "data_dir": folder, "batch_size": 60, "epochs": 12,
        "optimizer": "adam", "lr": 0.004, "beta2": 0.98, "warmup_steps": 40, "schedule": "inverse_sqrt",
        "weight_decay": 0.0, "log_to": (), "threads": 1, "out": out,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "ibm2020"])
def test_it_learns_to_translate_and_reports_bleu(folder, tmp_path, recipe, capsys):
    untrained = train(config(folder, tmp_path / "untrained", recipe=recipe, beam_size=2, epochs=1, max_steps=1))
    result = train(config(folder, tmp_path / "run", recipe=recipe, beam_size=2))
    assert untrained.test_score is not None and result.test_score is not None
    # How near to 100 it comes depends on the order of sums, which differs between processors.
    assert untrained.test_score < 10 and result.test_score > untrained.test_score + 50
    assert "BLEU" in capsys.readouterr().out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["metric"] == "BLEU" and last["test_metric"] == last["test_score"] == result.test_score


def test_bleu_is_of_the_translations_in_the_order_of_their_references(folder, tmp_path, monkeypatch):
    """A network that knows the answers gets 100, one that gives them to the wrong sentences does not."""
    found = data.load("multi30k", folder)
    assert isinstance(found, data.TranslationData)
    answers = {tuple(found.test[0][i].tolist()): found.test[1][i] for i in range(40)}
    import torch

    def oracle(self, source, beam_size=1, **_):
        columns = [answers[tuple(t for t in column.tolist() if t)] for column in source.t()]
        return torch.nn.utils.rnn.pad_sequence(columns)

    monkeypatch.setattr(models.Transformer, "translate", oracle)
    result = train(config(folder, tmp_path / "run", epochs=1, max_steps=1, recipe="fp32", eval_batch_size=7))
    assert result.test_score == pytest.approx(100)
    table = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert table["columns"] == ["source", "reference", "translation"] and len(table["rows"]) == 8
    assert all(found == right == " ".join(WORDS[w] for w in source.split()) for source, right, found in table["rows"])
    shifted = [*found.references[1:], found.references[0]]
    assert sacrebleu.corpus_bleu(shifted, [list(found.references)]).score < 50


def test_sentences_that_are_too_long_and_networks_that_do_not_translate(folder, tmp_path):
    table = pa.table({"en": [" ".join(["one"] * 100)], "de": ["eins"]})
    pq.write_table(table, folder / "test.parquet")
    with pytest.raises(
        UserError, match="source sentence 0 in test of multi30k has 101 tokens, but transformer_small takes 40"
    ):
        train(config(folder, tmp_path / "run"))
    with pytest.raises(UserError, match="lstm_200 reads text, but multi30k has pairs of sentences"):
        train(config(folder, tmp_path / "run", model="lstm_200"))
