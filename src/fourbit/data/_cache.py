"""Decoded tensors kept on disk: one safetensors file per data set and fingerprint.

The file is written beside its final place and then renamed, so that a reader sees all of it or none, and carries a
checksum: a damaged file is made anew without a word. Deleting the folder is always safe.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

VERSION = "1"  # of the content: raise it when decoding changes, and old files are no longer found


def cache_folder() -> Path:
    """$FOURBIT_CACHE, else $XDG_CACHE_HOME/fourbit, else ~/.cache/fourbit."""
    if own := os.environ.get("FOURBIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fourbit"


def cached(name: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of file `name-key`; made by `make()` and stored where there is no intact one.

    A cache folder that cannot be written is a warning, not an error: the tensors are returned all the same.
    """
    path = cache_folder() / f"{name}-{key}-v{VERSION}.safetensors"
    tensors = _read(path)
    if tensors is None:
        tensors = make()
        try:
            _write(path, tensors)
        except OSError as error:
            warnings.warn(
                f"decoded data could not be kept in {path.parent} ({error.strerror or error}): the next start "
                f"decodes them again; set FOURBIT_CACHE to a folder that can be written."
            )
    return tensors


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors in `path`, or None if it is missing or damaged in any way."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            intact = (file.metadata() or {}).get("crc32") == _checksum(tensors)
    except (OSError, SafetensorError):
        return None
    return tensors if intact else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"crc32": _checksum(tensors)})
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, Exception) and not isinstance(error, OSError):
            raise OSError(str(error)) from error  # safetensors has its own type for a full disk
        raise


def _checksum(tensors: dict[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().data, crc)
    return f"{crc:08x}"
