"""Checkpoints: a folder with two safetensors files and one JSON file; reading one executes nothing.

    model.safetensors       the model's state_dict, quantization state included
    training.safetensors    optimizer state ("optimizer.<parameter>.<name>") and random generators ("rng.<device>")
    state.json              counters, memory layout of the tensors, and length and checksum of the other two files

A new checkpoint is written beside the old one, flushed to the disk, and only then takes its name:

    checkpoint.new/ complete  ->  checkpoint/ becomes checkpoint.old/  ->  checkpoint.new/ becomes checkpoint/

so that at every moment one of the three is complete. state.json is written last: without it a folder counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.nn import upgraded
from fourbit.train._folder import writing

VERSION = 1
FILES = ("model.safetensors", "training.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by name, and plain values."""

    model: Mapping[str, Tensor]
    training: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to the folder `path`, replacing the one that is there when this one is complete.

    Raises:
        UserError: it could not be written (disk full, no permission); the old one is still there.
    """
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    with writing(path):
        try:
            _write_folder(new, checkpoint)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        _sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def find(path: Path) -> Path | None:
    """The newest complete checkpoint for `path`, also where saving was cut off between two renames; None: there is none."""
    candidates = (path, path.with_name(path.name + ".new"), path.with_name(path.name + ".old"))
    return next((c for c in candidates if (c / "state.json").is_file()), path if path.exists() else None)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check that every byte is as it was written.

    Raises:
        UserError: it is damaged, incomplete, or not a checkpoint of fourbit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, "state.json is missing or unreadable") from error
    if not isinstance(document, dict) or document.get("fourbit_checkpoint") != VERSION:
        raise UserError(f"{path} is not a checkpoint of this version of fourbit: start anew with another --out.")
    content = document.get("content") or {}
    if document.get("checksum") != _checksum(json.dumps(content).encode()):
        raise _damaged(path, "state.json does not match its checksum")
    tensors = []
    for name in FILES:
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise _damaged(path, f"{name} is missing or unreadable") from error
        if _checksum(data) != content["checksums"][name]:
            raise _damaged(path, f"{name} does not match its checksum")
        try:
            tensors.append(parse(data))
        except SafetensorError as error:
            raise _damaged(path, f"{name} is not a safetensors file") from error
    training = {name: _laid_out(t, content["strides"].get(name)) for name, t in tensors[1].items()}
    return Checkpoint(tensors[0], training, content["state"])


def restore_model(model: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a checkpoint's weights into a model of the same configuration.

    Raises:
        UserError: the checkpoint belongs to another model; the first difference is named.
    """
    own, tensors = model.state_dict(), upgraded(model, tensors)
    for name in [*own, *tensors]:
        if name not in tensors or name not in own or own[name].shape != tensors[name].shape:
            what = "lacks" if name not in tensors else "has an unknown" if name not in own else "has another shape of"
            raise UserError(
                f"the checkpoint in {path} is of another model (it {what} {name}): "
                "resume with the settings that it was made with, or choose another --out."
            )
    model.load_state_dict(tensors)


def _write_folder(folder: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save as serialise

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checksums = {}
    for name, tensors in zip(FILES, (checkpoint.model, checkpoint.training), strict=True):
        data = serialise({key: _portable(t) for key, t in tensors.items()})
        checksums[name] = _checksum(data)
        _write(folder / name, data)
    strides = {key: list(t.stride()) for key, t in checkpoint.training.items()}
    content = {"checksums": checksums, "strides": strides, "state": dict(checkpoint.state)}
    text = json.dumps(content, allow_nan=True)
    document = {"fourbit_checkpoint": VERSION, "checksum": _checksum(text.encode()), "content": content}
    _write(folder / "state.json", json.dumps(document).encode())
    _sync_folder(folder)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where the system lets one open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _portable(t: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with no other tensor (safetensors stores nothing else)."""
    return torch.empty(t.shape, dtype=t.dtype).copy_(t.detach())


def _laid_out(t: Tensor, stride: list[int] | None) -> Tensor:
    """`t` in the memory layout that it was saved from: sums over another layout could round differently."""
    return t if stride is None else torch.empty_strided(t.shape, stride, dtype=t.dtype).copy_(t)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the checkpoint in {path} is damaged ({what}): restore it, or start anew with another --out.")
