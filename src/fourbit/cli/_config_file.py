"""`--config run.toml`: every flag of `train` and `compare` as a field of a file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fourbit.errors import UserError, unknown
from fourbit.train import CompareConfig, TrainConfig

ConfigFile = Annotated[Path | None, Parameter(name="--config")]

CONFIGS = {"train": TrainConfig, "compare": CompareConfig}


def with_config_file(arguments: Sequence[str] | None, typed: Sequence[str]) -> list[str] | None:
    """The command line with the fields of the file as flags, where a flag does not say otherwise.

    Raises:
        UserError: no such file, or a field that there is not.
    """
    words = list(typed if arguments is None else arguments)
    path = _given(words)
    if not words or words[0] not in CONFIGS or path is None:
        return None if arguments is None else words
    flags = {word.partition("=")[0] for word in words}
    fields = {field.name: field for field in dataclasses.fields(CONFIGS[words[0]])}
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        if name not in fields:
            raise UserError(f"{path}: {unknown('field', key, fields)}")
        flag = f"--{name.replace('_', '-')}"
        if not flags & {flag, f"--no-{flag[2:]}"}:
            words.append(_flag(flag, value, f"{path}: {key}"))
    return words


def _given(words: Sequence[str]) -> Path | None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == "--config" and after:
            return Path(after)
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a TOML file ({error}): correct that place.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise UserError(f"the settings {path} cannot be read ({reason}): check --config.") from error


def _flag(flag: str, value: Any, place: str) -> str:
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return f"{flag}={','.join(map(str, value))}"
    if isinstance(value, str | int | float):
        return f"{flag}={value}"
    raise UserError(f"{place} is {value!r}, but must be a text, a number, true, false, or a list of them.")
