"""Pairs of sentences: one vocabulary, batches of similar length, and folders and tokenizers that do not fit."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fourbit import data
from fourbit.data import PAD, TranslationData, num_batches, pairs
from fourbit.data._translation import Sentences
from fourbit.errors import UserError

WORDS = ("ein", "Hund", "läuft", "über", "die", "Wiese", "und", "bellt")


def sentence(number: int, language: str) -> str:
    return f"{language} " + " ".join(WORDS[(number * k) % 8] for k in range(1, 2 + number % 5))


def write_pairs(folder: Path, count: int = 23, nested: bool = False, **columns) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", count), ("test", 7)):
        sides = {language: [sentence(i, language) for i in range(rows)] for language in ("en", "de")}
        table = {"translation": [dict(zip(sides, row, strict=True)) for row in zip(*sides.values(), strict=True)]}
        pq.write_table(pa.table(columns or (table if nested else sides)), folder / f"{split}.parquet")
    return folder


@pytest.fixture(params=[False, True])
def pairs_of_text(tmp_path, request) -> TranslationData:
    found = data.load("multi30k", write_pairs(tmp_path / "data", nested=request.param))
    assert isinstance(found, TranslationData)
    return found


def test_tokens_become_the_sentences_again(pairs_of_text):
    for side, language in zip(pairs_of_text.train, ("en", "de"), strict=True):
        assert [pairs_of_text.text(side[i].tolist()) for i in range(23)] == [sentence(i, language) for i in range(23)]
    assert pairs_of_text.references == tuple(sentence(i, "de") for i in range(7))
    assert all(int(t[-1]) == 2 and int(t.min()) >= 2 for t in (pairs_of_text.train[0][i] for i in range(23)))


def test_every_training_pair_comes_once_with_its_partner(pairs_of_text):
    seen = []
    for source, rows, target in pairs(pairs_of_text, "train", 4, seed=1):
        for column, row in enumerate(rows.tolist()):
            for side, sentences in ((source, pairs_of_text.train[0]), (target, pairs_of_text.train[1])):
                kept = side[:, column]
                assert torch.equal(kept[kept != PAD], sentences[row])
            seen.append(row)
    assert len(seen) == len(set(seen)) == 20 == 4 * num_batches(pairs_of_text, "train", 4)
    again = [rows.tolist() for _, rows, _ in pairs(pairs_of_text, "train", 4, seed=1)]
    other = [rows.tolist() for _, rows, _ in pairs(pairs_of_text, "train", 4, seed=1, epoch=1)]
    late = [rows.tolist() for _, rows, _ in pairs(pairs_of_text, "train", 4, seed=1, start=2)]
    assert [r for rows in again for r in rows] == seen and other != again and late == again[2:]


def test_test_pairs_all_come_and_lengths_are_similar(pairs_of_text):
    rows = [r for _, rows, _ in pairs(pairs_of_text, "test", 3) for r in rows.tolist()]
    assert sorted(rows) == list(range(7))
    padding = sum(int((t == PAD).sum()) for _, _, t in pairs(pairs_of_text, "train", 4))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    lengths = pairs_of_text.train[1].lengths[shuffled].view(5, 4)
    assert padding < int((lengths.max(1, keepdim=True).values - lengths).sum())


def test_empty_and_overlong_training_pairs_are_left_out(tmp_path):
    rows = {"en": ["a", "", "b " * 300, "c"], "de": ["x", "y", "z", "w"]}
    with pytest.warns(
        UserWarning, match="2 of 4 training pairs are left out: a side is empty, or has more than 250 tokens."
    ):
        found = data.load("multi30k", write_pairs(tmp_path / "data", **rows))
    assert isinstance(found, TranslationData)
    assert len(found.train[0]) == 2 and len(found.test[0]) == 4


def test_sentences_in_one_row():
    found = Sentences.of([[5, 6], [], [7], [8, 9, 10]])
    kept = found.only(torch.tensor([True, False, False, True]))
    assert [found[i].tolist() for i in range(4)] == [[5, 6], [], [7], [8, 9, 10]] and found.tokens.dtype == torch.int32
    assert [kept[i].tolist() for i in range(len(kept))] == [[5, 6], [8, 9, 10]]
    assert len(Sentences.of([])) == 0


def test_the_cache_and_a_tokenizer_of_ones_own(tmp_path, pairs_of_text):
    folder = write_pairs(tmp_path / "other", count=40)
    first = data.load("multi30k", folder)
    assert isinstance(first, TranslationData)
    (folder / "tokenizer.json").write_text(pairs_of_text.tokenizer.to_str())
    second = data.load("multi30k", folder)
    assert isinstance(second, TranslationData)
    assert second.num_tokens == pairs_of_text.num_tokens
    assert second.text(second.train[1][30].tolist()) == sentence(30, "de")


def test_bad_input_is_named_with_the_remedy(tmp_path, pairs_of_text):
    for i, (columns, message) in enumerate(
        [
            ({"fr": ["a"], "it": ["b"]}, "train of multi30k has no column en or translation.en, only fr, it: give the"),
            ({"en": ["a"], "it": ["b"]}, "train of multi30k has no column de or translation.de, only en, it"),
            ({"en": [1], "de": [2]}, "column en of train of multi30k must hold text, but holds int64"),
            ({"en": ["a", "b"], "de": ["c", None]}, "row 1 of column de of train of multi30k is empty: remove the row"),
            (
                {"translation": [None, {"en": "a", "de": "b"}]},
                "row 0 of column translation.en of train of multi30k is e",
            ),
            ({"translation": ["a"]}, "train of multi30k has no column en or translation.en, only translation: give"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            data.load("multi30k", write_pairs(tmp_path / f"columns{i}", **columns))
    folder = write_pairs(tmp_path / "wrong")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer .* replace or remove it"):
        data.load("multi30k", folder)
    from tokenizers import Tokenizer, models

    (folder / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a")).to_str())
    with pytest.raises(UserError, match="does not match: its tokens 0, 1, 2 are a, b, c"):
        data.load("multi30k", folder)
    with pytest.raises(UserError, match="batch size 24 is larger than multi30k's 23 training pairs"):
        num_batches(pairs_of_text, "train", 24)
    with pytest.raises(UserError, match=r"source sentence \d+ in train of multi30k has \d+ tokens, but small takes 3"):
        pairs_of_text.check_length(3, "small")


def write_tokenizer(folder: Path, vocabulary: dict[str, int], unknown: str | None = None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, **vocabulary}, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_may_leave_numbers_out(tmp_path):
    folder = write_pairs(tmp_path / "data", en=["a b", "b a a"], de=["b", "a b"])
    write_tokenizer(folder, {"a": 5000, "b": 4})
    found = data.load("multi30k", folder)
    assert isinstance(found, TranslationData)
    assert found.num_tokens == 5001 == 1 + int(found.train[0].tokens.max())
    assert found.text([5000, 7, 4]) == "a b"


def test_a_tokenizer_that_pads_and_cuts_does_neither_here(tmp_path, pairs_of_text):
    folder = write_pairs(tmp_path / "other", count=40)
    own = type(pairs_of_text.tokenizer).from_str(pairs_of_text.tokenizer.to_str())
    own.enable_padding(length=30)
    own.enable_truncation(2)
    (folder / "tokenizer.json").write_text(own.to_str())
    found = data.load("multi30k", folder)
    assert isinstance(found, TranslationData)
    assert found.text(found.train[1][30].tolist()) == sentence(30, "de") and len(found.train[1][30]) < 30


def test_a_tokenizer_that_does_not_know_all_words_is_named(tmp_path):
    folder = write_pairs(tmp_path / "data", en=["a b", "b c"], de=["b", "a"])
    write_tokenizer(folder, {"a": 3, "b": 4})
    with pytest.raises(
        UserError, match=r"tokenizer in \S*tokenizer.json cannot encode .* give it an unknown token, or rem"
    ):
        data.load("multi30k", folder)
    write_tokenizer(folder, {"a": 3, "b": 4, "<unk>": 5}, "<unk>")
    found = data.load("multi30k", folder)
    assert isinstance(found, TranslationData)
    assert found.train[0][1].tolist() == [4, 5, 2]


@pytest.mark.slow
def test_multi30k_itself(shared_data):
    folder = shared_data / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}")
    found = data.load("multi30k", folder)
    assert isinstance(found, TranslationData)
    assert (len(found.train[0]), len(found.test[0]), found.num_tokens) == (29_000, 1_000, 5_000)
    assert [found.text(found.test[1][i].tolist()) for i in range(1000)] == list(found.references)
