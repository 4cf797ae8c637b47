"""What can be wrong with an input: bad values for every flag and every field, and files of all kinds, damaged."""

from __future__ import annotations

import dataclasses
import io
import math
import struct
import typing
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from fourbit.cli._app import app
from fourbit.train import CompareConfig, TrainConfig

LONG = "x" * 5000

NEVER = {
    int: ["x", "1.5", "nan", "", " ", "0x10", "1e3", "9" * 30, LONG, "\x00"],
    float: ["x", "nan", "", "1,5", LONG, "\x00", "🙂"],
    bool: ["maybe", "🙂", LONG],
    str: ["\x00", "🙂 <script>", LONG, "../../etc/passwd", "hf:", "timm:", "\udc80"],
    Path: ["\x00", LONG, "/dev/null/x", "/proc/nowhere/x"],
    tuple: ["🙂", LONG, "\x00", "0,0"],
    Literal: ["", "x", "🙂", LONG],
}
"""By type: what no flag of it takes; or, as a folder or a name, what there is not."""

ODD = {
    int: ["-1", "0", "9" * 18, "٣"],
    float: ["-1", "inf", "-inf", "1e400", "-0.0"],
    tuple: ["", ",", "nan", "-1", "0,,1"],
}
"""What some flags of a type take."""

SKIPPED = {"hardware", "--help", "-h", "--version", "--install-completion"}


def kind_of(hint: Any) -> Any:
    """The key of NEVER for a type hint."""
    if typing.get_origin(hint) is typing.Annotated:
        return kind_of(typing.get_args(hint)[0])
    members = [h for h in typing.get_args(hint) if h is not type(None)]
    origin = typing.get_origin(hint)
    if origin is Literal or origin is tuple:
        return origin
    return kind_of(members[0]) if members else hint


def takes_none(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return type(None) in typing.get_args(hint)


def command_lines() -> Iterator[tuple[list[str], bool]]:
    """Commands with one bad flag each, and whether the value is bad for sure."""
    for name in app:
        if name in SKIPPED:
            continue
        for argument in app[name].assemble_argument_collection():
            flags = [n for n in argument.names if n.startswith("--") and not n.startswith("--no-")]
            kind = kind_of(argument.hint)
            if not flags or kind not in NEVER:
                continue
            for sure, values in ((True, NEVER[kind]), (False, ODD.get(kind, []))):
                for value in values:
                    yield [name, f"{flags[0]}={value}"], sure


def fields() -> Iterator[tuple[type, str, Any, bool]]:
    """Fields of configurations with one bad value each, and whether it is bad for sure."""
    for cls in (TrainConfig, CompareConfig):
        for field, hint in typing.get_type_hints(cls, include_extras=True).items():
            kind = kind_of(hint)
            wrong = {int: ["1", 1.5, math.nan], float: ["1", b"1"], bool: ["yes", 2, None], Literal: ["x", 3]}
            wrong |= {str: [3, b"x", None], Path: [3, b"x"], tuple: [3, "x", {"a": 1}, (object(),), [[1]]]}
            for value in (*wrong[kind], object(), [], {}) if kind is not tuple else wrong[kind]:
                if value is not None or not takes_none(hint):
                    yield cls, field, value, True
            for value in {int: [-1, 10**30, True], float: [-1.0, math.inf, 10**400], str: ["", LONG]}.get(kind, []):
                yield cls, field, value, False


def defaults(config: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config)}


def _png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "png")
    return buffer.getvalue()


def _wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack("<400h", *range(400)))
    return buffer.getvalue()


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a b c"] * 20, "label": [0, 1] * 10}), buffer)
    return buffer.getvalue()


def damaged_folders() -> dict[str, Callable[[Path], None]]:
    """Ways to fill a folder with data that nobody can read, or hardly."""
    found: dict[str, Callable[[Path], None]] = {"empty": lambda folder: None}
    whole = {"png": _png, "wav": _wav, "parquet": _parquet}
    plain = {
        "csv": b'image,label\n"a.png,0\n',
        "json": b'{"text": [',
        "jsonl": b'{"text": 3}\n[1]\nnull\n',
        "txt": b"\xff\xfe\x00",
        "tsv": b"a\tb\tc\n\n\t\n",
        "zip": b"PK\x03\x04",
        "npy": b"\x93NUMPY\x01\x00",
    }

    def put(name: str, make: Callable[[], bytes]) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            for split in ("train", "test"):
                for label in ("a", "b"):
                    (folder / split / label).mkdir(parents=True, exist_ok=True)
                    (folder / split / label / f"0.{name}").write_bytes(make())
                (folder / f"{split}.{name}").write_bytes(make())

        return fill

    for name, make in (whole | {k: (lambda v=v: v) for k, v in plain.items()}).items():
        found[f"{name}-cut"] = put(name, lambda make=make: make()[: max(1, len(make()) // 2)])
        found[f"{name}-empty"] = put(name, lambda: b"")
        found[f"{name}-zeros"] = put(name, lambda: bytes(1000))
        found[f"{name}-foreign"] = put(name, lambda: b"<html>404</html>\n" * 3)
        found[f"{name}-long"] = put(name, lambda: b"a" * 100_000)
    found["png-whole"] = put("png", _png)
    found["wav-whole"] = put("wav", _wav)
    found["parquet-whole"] = put("parquet", _parquet)

    def loop(folder: Path) -> None:
        (folder / "train").symlink_to(folder / "test")
        (folder / "test").symlink_to(folder / "train")

    def folders(folder: Path) -> None:
        for name in ("train.txt", "test.txt", "train.csv", "train.parquet"):
            (folder / name).mkdir()

    return found | {"loop": loop, "folders": folders}
