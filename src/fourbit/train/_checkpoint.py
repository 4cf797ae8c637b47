"""Checkpoints: a folder with two safetensors files and one JSON file; reading one executes nothing.

    model.safetensors       the model's state_dict, quantization state included
    training.safetensors    optimizer state ("optimizer.<parameter>.<name>") and random generators ("rng.<device>")
    state.json              counters, memory layout of the tensors, and length and checksum of the other two files

A new checkpoint is written beside the old one, flushed to the disk, and only then takes its name; the one before is kept:

    checkpoint.new/ complete  ->  checkpoint/ becomes checkpoint.old/  ->  checkpoint.new/ becomes checkpoint/

so that at every moment one of the three is complete. state.json is written last and removed first: without it a folder
counts for nothing. Where the newest one is damaged, or of another run, a run goes on from the one before, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit._files import sync_folder
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


def save(path: Path, checkpoint: Checkpoint, *, keep_last: bool = True) -> None:
    """Write a checkpoint to the folder `path`, replacing the one that is there when this one is complete.

    Args:
        keep_last: keep the one that was there, as `path`.old.

    Raises:
        UserError: it could not be written (disk full, no permission); the one before is still there.
    """
    new, old = _beside(path)
    with writing(path):
        try:
            _write_folder(new, checkpoint)
        except OSError:
            _remove(new)
            raise
        _rotate(path)
        if not keep_last:
            _remove(old)


def exists(path: Path) -> bool:
    """Whether anything was saved at `path`."""
    return path.exists() or any((folder / "state.json").is_file() for folder in _beside(path))


def newest(path: Path, check: Callable[[Checkpoint], None]) -> tuple[Path, Checkpoint] | None:
    """The newest whole checkpoint for `path`, and where it lies; None: there is none at all.

    Args:
        check: raises a UserError for a checkpoint that belongs elsewhere.

    Raises:
        UserError: none is whole; the message is about the newest one.
    """
    new, old = _beside(path)
    first: UserError | None = None
    for folder in (new, path, old):
        if not (folder / "state.json").is_file() and not (folder == path and exists(path)):
            continue  # was never completed
        try:
            found = load(folder)
            check(found)
        except UserError as error:
            first = first or error
            continue
        if first is not None:
            warnings.warn(f"{str(first).partition(': ')[0]}: going on from the one before it, {folder}.", stacklevel=2)
        return folder, found
    if first is not None:
        raise first
    return None


def adopt(path: Path, found: Path) -> None:
    """Make the checkpoint that `newest` found the one at `path`, and remove what a killed process left, or a damaged disk.

    Raises:
        UserError: the folder cannot be written.
    """
    new, old = _beside(path)
    with writing(path):
        if found == new:
            _rotate(path)
        elif found == old:
            _remove(path)
            os.rename(old, path)
            sync_folder(path.parent)
        _remove(new)


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

    _remove(folder)
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
    sync_folder(folder)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the next checkpoint is written, and where the last one is kept."""
    return path.with_name(path.name + ".new"), path.with_name(path.name + ".old")


def _rotate(path: Path) -> None:
    """Give a complete checkpoint its name, and the one before it the name of the last."""
    new, old = _beside(path)
    if path.exists():
        _remove(old)
        os.rename(path, old)
    os.rename(new, path)
    sync_folder(path.parent)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, so that what is left if this is cut off does not count as one."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
