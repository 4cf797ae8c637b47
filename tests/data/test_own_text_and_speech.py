"""Text, sounds and pairs of sentences of one's own: layouts, tokens, splits, and what is refused."""

from __future__ import annotations

import io
import sys
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fourbit import data
from fourbit.data import SpeechData, TextData, TranslationData
from fourbit.errors import UserError

LINES = [f"line {n} of the text" for n in range(20)]


def text_of(found: TextData, split: str) -> str:
    return "".join(found.vocabulary[n] for n in found.split(split))


def load_text(folder: Path, **options) -> TextData:
    found = data.load("text", folder, **options)
    assert isinstance(found, TextData)
    return found


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        place = folder / name.replace("__", "/").replace("_txt", ".txt")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("train_txt", "test_txt", "valid_txt"),
        ("a__train__x_txt", "a__test__x_txt", "a__valid__x_txt"),
        ("my-train-text_txt", "my_test-text_txt".replace("_test", "-test"), "my-dev-text_txt"),
    ],
)
def test_files_are_for_what_their_names_say(tmp_path, names):
    found = load_text(write(tmp_path, **dict(zip(names, ("abc\ncab", "abz\n", "unread\n"), strict=True))))
    assert text_of(found, "train") == "abc\ncab\n"
    assert text_of(found, "test") == "ab<unk>\n"
    assert found.vocabulary == ("\n", "a", "b", "c", "<unk>")


def test_the_validation_text_is_for_the_test_where_there_is_no_other(tmp_path):
    found = load_text(write(tmp_path, book_txt="abc\n", valid_txt="cba\n"))
    assert (text_of(found, "train"), text_of(found, "test")) == ("abc\n", "cba\n")


def test_without_test_files_the_end_of_the_text_is_for_the_test(tmp_path):
    found = load_text(write(tmp_path, b_txt="\n".join(LINES[10:]), a__c_txt="\n".join(LINES[:10])))
    assert text_of(found, "train") + text_of(found, "test").replace("<unk>", "9") == "".join(f"{n}\n" for n in LINES)
    assert text_of(found, "test").startswith("line 1") and text_of(found, "test").count("\n") in (1, 2)
    one_line = load_text(write(tmp_path / "one", a_txt="ab" * 50))
    assert (len(one_line.train), len(one_line.test)) == (90, 11)  # there is no line end to cut at


def test_text_is_cut_into_bytes_or_words(tmp_path):
    write(tmp_path, train_txt="a é\nthe é\n", test_txt="other é\n")
    found = load_text(tmp_path, tokenizer="bytes")
    assert bytes(found.train.tolist()).decode() == "a é\nthe é\n" and len(found.vocabulary) == 256
    found = load_text(tmp_path, tokenizer="words")
    assert [found.vocabulary[n] for n in found.train] == ["a", "é", "<eos>", "the", "é", "<eos>"]
    assert [found.vocabulary[n] for n in found.test] == ["<unk>", "é", "<eos>"]


def write_tokenizer(path: Path, vocabulary: dict[str, int], unknown: str | None = None) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_text_is_cut_by_a_tokenizer_of_ones_own(tmp_path):
    write(tmp_path / "text", train_txt="a b a\nb\n" * 700, test_txt="b c\n")
    path = write_tokenizer(tmp_path / "tokenizer.json", {"a": 3, "b": 1, "?": 0}, "?")
    found = load_text(tmp_path / "text", tokenizer=str(path))
    assert found.vocabulary == ("?", "b", "", "a")
    assert found.train.tolist() == [3, 1, 3, 1] * 700 and found.test.tolist() == [1, 0]


def test_one_file_is_a_text(tmp_path):
    write(tmp_path, book_txt="abc\ncab\n" * 10)
    found = load_text(tmp_path / "book.txt")
    assert found.text(found.train.tolist()) + found.text(found.test.tolist()) == "abc\ncab\n" * 10
    with pytest.raises(UserError, match=r"there is no data folder .*other.txt"):
        load_text(tmp_path / "other.txt")


@pytest.mark.parametrize("tokenizer", ["characters", "bytes", "words", "bpe:300"])
def test_tokens_are_made_a_text_again(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("FOURBIT_CACHE", str(tmp_path / "cache"))
    text = "the é of\nthe \u2028 cat\n" * 20
    write(tmp_path / "text", train_txt=text, test_txt=text)
    found = load_text(tmp_path / "text", tokenizer=tokenizer)
    expected = text.replace("\u2028 ", "") if tokenizer == "words" else text
    assert found.text(found.test.tolist()) == expected


def test_pieces_of_words_are_learned_from_the_training_text_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURBIT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "text", train_txt="lowest lower newest newer\n" * 50, test_txt="lowest Zürich\n")
    found = load_text(tmp_path / "text", tokenizer="bpe:262")
    pieces = [found.vocabulary[n] for n in found.test]
    assert len(found.vocabulary) == 262 and found.text(found.test.tolist()) == "lowest Zürich\n"
    assert pieces[0] in ("lo", "low", "lowe")
    assert pieces[-8:] == [*"ZÃ¼rich", "Ċ"]  # what was never seen is bytes, written as GPT-2 writes them

    def never(*_):
        raise AssertionError("learned again")

    monkeypatch.setattr("fourbit.data._pieces._learned", never)
    again = load_text(tmp_path / "text", tokenizer="bpe:262")
    assert (
        again.vocabulary == found.vocabulary
        and again.train.equal(found.train)
        and data.identity(again) == data.identity(found)
    )
    with pytest.raises(AssertionError, match="learned again"):
        load_text(tmp_path / "text", tokenizer="bpe:263")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write(tmp_path, train_txt="a\n" * 50)
    with pytest.raises(UserError, match=r"pieces of words need the package tokenizers: pip install 'fourbit\[train\]'"):
        load_text(tmp_path, tokenizer="bpe")


def test_a_column_of_a_table_is_a_text(tmp_path):
    pq.write_table(pa.table({"title": ["x", "y"], "text": ["a\r\nb", "c\n"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"title": ["x", "y"], "text": ["a", "b"]}), tmp_path / "test.parquet")
    assert text_of(load_text(tmp_path), "train") == "a\nb\nc\n"
    assert text_of(load_text(tmp_path, columns=("title",)), "test") == "x\ny\n"
    pq.write_table(pa.table({"title": ["x", "y"], "body": ["a", "c\n"]}), tmp_path / "train.parquet")
    with pytest.raises(
        UserError, match="which of the columns title, body holds the text is unclear: name it with --col"
    ):
        load_text(tmp_path)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, r"has neither \.txt nor parquet files: give the folder of your text"),
        (
            {"test_txt": "a"},
            {},
            r"has files to test with, such as test.txt, and none to train with: add some, with train in",
        ),
        ({"train_txt": " \n", "test_txt": "a"}, {}, "the train part of the text is empty: give more of it"),
        ({"a_txt": "a\n"}, {"columns": ("x",)}, "has text files, which have no columns: leave out --columns"),
        (
            {"a_txt": "ab\n" * 9},
            {"tokenizer": "letters"},
            "there is no tokenizer letters: give characters, bytes, words, bpe, or",
        ),
        (
            {"a_txt": "ab\n" * 9, "j.json": "{}"},
            {"tokenizer": "j.json"},
            "j.json is not a tokenizer of the package tokeni",
        ),
        (
            {"a_txt": "ab\n" * 9},
            {"tokenizer": "known.json"},
            "the tokenizer known.json cannot encode the text .* unknown tok",
        ),
    ],
)
def test_text_that_cannot_be_trained_on_is_refused_in_one_sentence(tmp_path, monkeypatch, files, options, message):
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "known.json", {"a": 0})
    (tmp_path / "text").mkdir()
    write(tmp_path / "text", **{name: content for name, content in files.items() if name != "j.json"})
    (tmp_path / "j.json").write_text("{}")
    with pytest.raises(UserError, match=message) as caught:
        load_text(tmp_path / "text", **options)
    assert "\n" not in str(caught.value)


def wav(hertz: float, rate: int = 16000) -> bytes:
    samples = (np.sin(2 * np.pi * hertz * np.arange(rate // 5) / rate) * 16000).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return content.getvalue()


def load_speech(folder: Path, **options) -> SpeechData:
    found = data.load("speech", folder, **options)
    assert isinstance(found, SpeechData)
    return found


def write_sounds(folder: Path, rate: int = 16000) -> Path:
    for word, hertz in (("no", 300), ("yes", 900)):
        (folder / word).mkdir(parents=True)
        for i in range(10):
            (folder / word / f"{i}.wav").write_bytes(wav(hertz + 10 * i, rate))
    return folder


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_sounds_of_any_rate_are_read_from_folders_of_words(tmp_path, rate):
    found = load_speech(write_sounds(tmp_path, rate))
    assert found.classes == ("no", "yes") and found.num_features == 40
    assert (found.train_y.bincount().tolist(), found.test_y.tolist()) == ([9, 9], [0, 1])
    assert all(len(t) == 18 for t in found.train_x)  # 0.2 s


def test_a_list_of_transcripts_gives_the_words(tmp_path):
    sounds = write_sounds(tmp_path / "clips")
    for split, rows in (("train", range(6)), ("test", range(6, 8))):
        lines = [f"clips/{word}/{i}.wav\t{word.upper()}  there" for i in rows for word in ("no", "yes")]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["path\tsentence", *lines]))
    found = load_speech(tmp_path)
    assert found.classes == ("NO there", "YES there") and found.test_y.tolist() == [0, 1, 0, 1]
    (sounds / "no" / "0.wav").write_bytes(wav(300, 8000))
    with pytest.raises(UserError, match=r"yes/0.wav has 16000 samples per second, but 8000 are needed: resample it"):
        load_speech(tmp_path)
    (tmp_path / "test.tsv").write_text("path\tsentence\nclips/no/1.wav\tmaybe\n")
    with pytest.raises(UserError, match=r"1.wav is of class maybe, which none of the WAV files to train with has"):
        load_speech(tmp_path)
    (tmp_path / "test.tsv").write_text("path\tsentence\nclips/no/1.wav\n")
    with pytest.raises(UserError, match=r"line 2 of .*test.tsv has 1 cells, but there are 2 columns: mend the line"):
        load_speech(tmp_path)


def test_sounds_in_tables_have_text_or_numbers_for_labels(tmp_path):
    cells = [{"bytes": wav(300 + 100 * (i % 2)), "path": "x.wav"} for i in range(20)]
    table = pa.table({"audio": cells, "speaker": [f"s{i % 4}" for i in range(20)], "label": [i % 2 for i in range(20)]})
    pq.write_table(table, tmp_path / "all.parquet")
    assert load_speech(tmp_path).classes == ("0", "1")
    assert load_speech(tmp_path, columns=("audio", "speaker")).classes == ("s0", "s1", "s2", "s3")


EN, DE = [f"dog {n} runs" for n in range(30)], [f"Hund {n} läuft" for n in range(30)]


def load_pairs(folder: Path, **options) -> TranslationData:
    found = data.load("translation", folder, **options)
    assert isinstance(found, TranslationData)
    return found


def sentences(found: TranslationData, split: str, side: int) -> list[str]:
    return [found.text(found.split(split)[side][i].tolist()) for i in range(len(found.split(split)[side]))]


def parallel(folder: Path, end: str = "", joint: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", slice(0, 24)), ("val", slice(24, 30))):
        for language, text in (("en", EN), ("de", DE)):
            content = "".join(f"{line}{joint}" for line in text[rows])
            (folder / f"{split}.{language}{end}").write_bytes(f"\ufeff{content}".encode())
    (folder / "README.md").write_text("no language")
    return folder


def tabbed(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in (("train", slice(0, 24)), ("dev", slice(24, 30))):
        lines = [f"{a}\t{b}" for a, b in zip(EN[rows], DE[rows], strict=True)]
        (folder / f"{split}.tsv").write_text("\n".join(["en\tde", *lines]), encoding="utf-8")
    return folder


def table(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in (("train", slice(0, 24)), ("test", slice(24, 30))):
        pairs = [{"de": b, "en": a} for a, b in zip(EN[rows], DE[rows], strict=True)]
        pq.write_table(pa.table({"id": list(range(len(pairs))), "translation": pairs}), folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("make", "languages"),
    [
        (parallel, ("de", "en")),
        (lambda f: parallel(f, end=".txt", joint="\r\n"), ("de", "en")),
        (tabbed, ("en", "de")),
        (table, ("de", "en")),
    ],
)
def test_pairs_are_found_with_their_languages_in_either_direction(tmp_path, make, languages):
    texts = {"en": EN, "de": DE}
    for options, expected in (({}, languages), ({"columns": languages[::-1]}, languages[::-1])):
        found = load_pairs(make(tmp_path / f"data{len(options)}"), **options)
        assert found.languages == expected
        for side, language in enumerate(expected):
            assert sentences(found, "train", side) == texts[language][:24]
            assert sentences(found, "test", side) == texts[language][24:]
        assert found.references == tuple(texts[expected[1]][24:])


def test_separators_inside_a_sentence_do_not_move_the_pairs(tmp_path):
    parallel(tmp_path)
    (tmp_path / "train.en").write_text("one\u2028more\ntwo\x0cpages\n", encoding="utf-8")
    (tmp_path / "train.de").write_text("eins\nzwei\n", encoding="utf-8")
    found = load_pairs(tmp_path)
    assert sentences(found, "train", 0) == ["eins", "zwei"] and sentences(found, "train", 1)[1] == "two\x0cpages"


def test_without_test_files_a_tenth_of_the_pairs_is_held_out(tmp_path):
    for language, text in (("en", EN), ("de", DE)):
        (tmp_path / f"corpus.{language}").write_text("\n".join(text), encoding="utf-8")
    found = load_pairs(tmp_path)
    assert len(found.test[0]) == 3
    assert sorted(sentences(found, "train", 1) + list(found.references)) == sorted(EN)


def test_pairs_that_cannot_be_trained_on_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"has no pairs of sentences: need files such as train.en and train.de"):
        load_pairs(tmp_path)
    parallel(tmp_path)
    (tmp_path / "train.fr").write_text("trois\n" * 24)
    with pytest.raises(
        UserError, match="which two of the languages de, en, fr are source and target is unclear: name them"
    ):
        load_pairs(tmp_path)
    with pytest.raises(UserError, match="there is no language it, only de, en, fr: name others with --columns"):
        load_pairs(tmp_path, columns=("de", "it"))
    with pytest.raises(UserError, match="--columns has de, but needs two: source and target"):
        load_pairs(tmp_path, columns=("de",))
    assert load_pairs(tmp_path, columns=("en", "de")).languages == ("en", "de")
    (tmp_path / "train.fr").write_text("trois\n" * 23)
    with pytest.raises(
        UserError, match=r"train.en has 24 lines, but .*train.fr 23: they must be translations line by line"
    ):
        load_pairs(tmp_path, columns=("en", "fr"))
    with pytest.raises(
        UserError, match=r"there is no tokenizer bytes: give the path of a file tokenizer.json, or leave it"
    ):
        load_pairs(tmp_path, columns=("en", "de"), tokenizer="bytes")
