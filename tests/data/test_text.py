"""Text as token numbers: vocabulary, windows that continue each other, and folders that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fourbit import data
from fourbit.data import TextData, num_windows, windows
from fourbit.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def write_ptb(folder: Path, train: str = "the cat sat\non the mat\n", test: str = "the dog sat\n") -> Path:
    (folder / "ptb.train.txt").write_text(train, encoding="utf-8", newline="")
    (folder / "ptb.test.txt").write_text(test)
    return folder


def test_words_are_numbered_by_frequency_and_other_words_are_unknown(tmp_path):
    text = data.load("ptb", write_ptb(tmp_path))
    assert isinstance(text, TextData)
    assert text.vocabulary == ("<eos>", "the", "<unk>", "cat", "mat", "on", "sat")
    assert [text.vocabulary[n] for n in text.train] == ["the", "cat", "sat", "<eos>", "on", "the", "mat", "<eos>"]
    assert [text.vocabulary[n] for n in text.test] == ["the", "<unk>", "sat", "<eos>"]


@pytest.mark.parametrize(("length", "batch_size"), [(1, 1), (4, 3), (5, 2), (100, 4)])
def test_windows_cover_every_row_once_and_targets_are_the_next_tokens(length, batch_size):
    text = TextData("x", torch.arange(50), torch.arange(50), tuple(map(str, range(50))))
    found = list(windows(text, "train", batch_size, length))
    assert len(found) == num_windows(text, "train", batch_size, length)
    per_row = 50 // batch_size
    rows = torch.arange(50)[: per_row * batch_size].view(batch_size, per_row)
    assert torch.equal(torch.cat([x for x, _ in found]), rows[:, :-1].t())
    assert torch.equal(torch.cat([y for _, y in found]), rows[:, 1:].t())
    late = list(windows(text, "train", batch_size, length, start=1))
    assert len(late) == len(found) - 1 and all(torch.equal(a[0], b[0]) for a, b in zip(late, found[1:], strict=True))


def test_characters_of_one_file_are_cut_into_nine_tenths_and_one(tmp_path):
    (tmp_path / "input.txt").write_text("abcdefghi\n" * 10)
    text = data.load("tinyshakespeare", tmp_path)
    assert (len(text.train), len(text.test)) == (90, 10) and text.vocabulary[0] == "\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: None,
            "there is no ptb.train.txt in .*: give the folder that holds ptb.train.txt and ptb.test.txt",
        ),
        (lambda folder: write_ptb(folder, test=""), "ptb.test.txt is empty"),
        (
            lambda folder: (folder / "ptb.train.txt").mkdir(),
            "there is no ptb.train.txt in .*: give the folder that holds ptb.train.txt and ptb.test.txt",
        ),
        (
            lambda folder: write_ptb(folder) and (folder / "ptb.train.txt").write_bytes(b"\xff\xfe\x00a"),
            "ptb.train.txt is not UTF-8 text but UTF-16: convert it, or replace the file",
        ),
        (
            lambda folder: (
                write_ptb(folder) and (folder / "ptb.train.txt").write_bytes("a b\nt\0\0\0".encode("utf-32"))
            ),
            "ptb.train.txt is not UTF-8 text but UTF-32: convert it",
        ),
        (
            lambda folder: write_ptb(folder) and (folder / "ptb.train.txt").write_bytes("a b\nc".encode("utf-16-le")),
            r"is not UTF-8 text \(character 1 is zero, as in binary files and in UTF-16\): convert it",
        ),
        (
            lambda folder: (
                write_ptb(folder) and (folder / "ptb.train.txt").write_bytes("tea\ncafé\n".encode("latin-1"))
            ),
            r"ptb.train.txt is not UTF-8 text \(byte 7, in line 2: invalid continuation byte\): convert it",
        ),
    ],
)
def test_bad_folders_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        data.load("ptb", tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_every_system_end_where_they_end_and_nowhere_else(tmp_path, end):
    odd = "a\x0cb\u2028c\x85d\x0be\x1cf\u2029g"
    (tmp_path / "input.txt").write_bytes(f"\ufeff{odd}{end}{odd}".encode() * 20)
    text = data.load("tinyshakespeare", tmp_path)
    assert isinstance(text, TextData)
    found = "".join(text.vocabulary[n] for n in torch.cat([text.train, text.test]))
    assert found == f"{odd}\n{odd}" * 20 + "\n"


def test_marks_and_separators_end_no_sentence_of_words(tmp_path):
    marked = "\ufeffthe cat\x0csat on\u2028the mat\n" * 3  # as of files with marks that were joined
    text = data.load("ptb", write_ptb(tmp_path, train=marked))
    assert isinstance(text, TextData)
    assert [text.vocabulary[n] for n in text.train] == ["the", "cat", "sat", "on", "the", "mat", "<eos>"] * 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"en": ["a"], "de": ["b"]},
            "train of wikitext2 has no column text, only en, de: give the folder of that data set",
        ),
        ({"text": [1, 2]}, "column text of train of wikitext2 must hold text, but holds int64: give the folder"),
        (
            {"text": ["a", None]},
            "row 1 of column text of train of wikitext2 is empty: remove the row, or replace the file",
        ),
    ],
)
def test_tables_of_another_data_set_are_named(tmp_path, columns, message):
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(UserError, match=message):
        data.load("wikitext2", tmp_path)


def test_sets_that_are_on_no_hub_ask_for_a_folder():
    for name in ("ptb", "tinyshakespeare"):
        with pytest.raises(UserError, match="--data-dir"):
            data.load(name)


def test_too_little_text_for_the_rows_is_named(tmp_path):
    text = data.load("ptb", write_ptb(tmp_path))
    with pytest.raises(UserError, match="batch size is 20, but train of ptb has 8 tokens: each row needs two"):
        num_windows(text, "train", 20, 35)
    with pytest.raises(UserError, match="unknown split 'valid'"):
        text.split("valid")
    with pytest.raises(UserError, match="token number outside"):
        TextData("x", torch.tensor([3]), torch.tensor([0]), ("a",))


@pytest.mark.skipif(not (REAL / "ptb").is_dir(), reason="no Penn Treebank beside the repository")
def test_the_penn_treebank_has_its_known_size():
    text = data.load("ptb", REAL / "ptb")
    assert (len(text.train), len(text.test), len(text.vocabulary)) == (929_589, 82_430, 10_000)


@pytest.mark.skipif(not (REAL / "wikitext2").is_dir(), reason="no WikiText-2 beside the repository")
@pytest.mark.slow
def test_wikitext_takes_the_validation_split_where_there_is_no_test_split():
    text = data.load("wikitext2", REAL / "wikitext2")
    assert 30_000 < len(text.vocabulary) < 34_000 and len(text.test) < len(text.train) / 8


def test_the_bytes_of_the_test_text_are_known_where_tokens_are_the_text(tmp_path):
    (tmp_path / "train.txt").write_text("Grüße und mehr\n" * 40)
    (tmp_path / "test.txt").write_text("Grüße\n")
    for tokenizer in ("characters", "bytes", "bpe:300"):
        assert data.load("text", tmp_path, tokenizer=tokenizer).test_bytes == 8
    assert data.load("text", tmp_path, tokenizer="words").test_bytes is None
    (tmp_path / "test.txt").write_text("Grüße!\n")  # "!" is unknown
    assert data.load("text", tmp_path, tokenizer="characters").test_bytes is None
    assert data.load("text", tmp_path, tokenizer="bpe:300").test_bytes == 9
