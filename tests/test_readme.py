"""What the README and the how-tos say works: code blocks run (those of the how-tos in test_docs.py), commands are commands."""

from __future__ import annotations

import io
import re
import shlex
import wave
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from fourbit import data
from fourbit.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
HOWTOS = sorted((ROOT / "docs" / "howto").glob("*.md"))
COMMANDS = list(
    dict.fromkeys(
        command
        for text in (README, *(page.read_text() for page in HOWTOS))
        for command in re.findall(r"^    (fourbit .*)$", text, re.MULTILINE)
        if "mymodule" not in command  # the user's own; tests/conform has such
    )
)
LONG = ("hardware report", "reproduce table", "reproduce questions", "train --model transformer_small", "tune")
"""They train or price several large networks; other tests run the same commands on small ones."""


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4096, 10),
    )


def write_data(folder: Path) -> None:
    """Files of the kind that the last word of the folder's path names; text, and pairs of sentences, otherwise."""
    folder.mkdir(parents=True)
    if folder.name in ("pictures", "tables", "sounds"):
        content = io.BytesIO()
        if folder.name == "sounds":
            with wave.open(content, "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(bytes(range(200)) * 4)
        else:
            Image.new("RGB", (8, 8), "red").save(content, "png")
        if folder.name == "tables":
            cells = [{"bytes": content.getvalue(), "path": None}] * 300
            pq.write_table(pa.table({"image": cells, "label": [0, 1] * 150}), folder / "train.parquet")
            return
        for label in ("a", "b"):
            (folder / label).mkdir()
            for i in range(80):
                (folder / label / f"{i}{'.wav' if folder.name == 'sounds' else '.png'}").write_bytes(content.getvalue())
        return
    sentences = [f"a sentence with {n} words" for n in ("two", "three", "four")] * 50
    (folder / "input.txt").write_text("\n".join(sentences * 8))
    for split in ("train", "test"):
        pq.write_table(pa.table({"en": sentences, "de": sentences}), folder / f"{split}.parquet")


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_blocks_run(block):
    loader = [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))] * 2
    exec(compile(block, "README.md", "exec"), {"model": network(), "loader": loader})


def _marked() -> list[Any]:
    return [pytest.param(c, marks=pytest.mark.slow if c.split(" ", 1)[1].startswith(LONG) else ()) for c in COMMANDS]


@pytest.mark.parametrize("command", _marked())
def test_the_commands_run(command, tmp_path, monkeypatch, capsys):
    """As written, but on digits, one step each, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOURBIT_CACHE", str(tmp_path / "cache"))
    words = shlex.split(command)[1:]
    if words[0] in ("train", "compare", "tune"):
        words = [{"resnet20": "digits_cnn", "cifar10": "digits", "0,1,2": "0"}.get(word, word) for word in words]
        words += ["--max-steps", "1"]
    if words[0] == "reproduce" and words[1] != "list":
        words = [{"0,1,2": "0", "multiplier": "zerosum"}.get(word, word) for word in words]
        words += ["--scale", "smoke", "--threads", "1"]
        if words[1] == "table1":
            digits = data.load("digits")
            monkeypatch.setattr(data, "load", lambda name, folder=None: digits)
    for name in [w.removeprefix("hf:./") for w in words if "path/to/" in w and ":make" not in w]:
        write_data(Path(name))
    if "mine.toml" in words and words[1] != "save":
        assert main(["recipes", "save", "ibm2020", "--to", "mine.toml"]) == 0
    if "path/to/net.py:make" in words:
        Path("path/to/net.py").write_text(
            "from torch import nn\n\n\ndef make(num_classes, in_channels):\n"
            "    convolutions = [nn.Conv2d(width, 8, 3, stride=2) for width in (in_channels, 8, 8)]\n"
            "    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)]\n"
            "    return nn.Sequential(*convolutions, *pool)\n"
        )
    if words[0] in ("fidelity", "export", "evaluate"):
        assert main(["train", "--model", "digits_cnn", "--data", "digits", "--max-steps", "1", "--out", words[1]]) == 0
    if words[0] in ("report", "diagnose"):
        assert (
            main(
                ["compare", "--model", "digits_cnn", "--data", "digits", "--recipes", "ibm2020", "--seeds", "0"]
                + ["--max-steps", "1", "--out", words[1]]
            )
            == 0
        )
    assert main(words) == 0, capsys.readouterr().err
    if "--png" in words:
        assert Path(words[-1]).stat().st_size > 5000


def test_there_are_blocks_and_commands_to_test():
    assert BLOCKS and len(COMMANDS) >= 6


def test_the_makefile_has_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", sorted((ROOT / "examples").glob("*.md")), ids=lambda page: page.stem)
def test_the_commands_of_the_examples_run(page, tmp_path, monkeypatch, capsys):
    """One after the other, but with one step of two recipes each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOURBIT_CACHE", str(tmp_path / "cache"))
    commands = re.findall(r"^    (fourbit .*)$", page.read_text().replace("\\\n", " "), re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] == "compare":
            words[words.index("--recipes") + 1] = "fp32,nvfp4"
            words[words.index("--max-steps") + 1] = "1"
            words += ["--sample-tokens", "2"]
        for name in {w for w in words if "path/to/" in w and not Path(w).exists()}:
            write_data(Path(name))
        assert main(words) == 0, capsys.readouterr().err
