"""Files that hold all of what was written or what they held before, and the words for what can go wrong with one."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from fourbit.errors import UserError

CONTROL = ("Cc", "Cf", "Cs")
"""Unicode's categories of control and format characters, and of halves of characters."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""No space, or none for this user."""


def require_inside(folder: Path, items: Iterable[Path]) -> None:
    """Reject a folder from elsewhere whose files are links that lead out of it: they would be read, or written through.

    Args:
        folder: it may be a link itself.
        items: in it; they need not be there.

    Raises:
        UserError: names the first such link.
    """
    inside = folder.resolve()
    for item in items:
        if item.is_symlink() and not item.resolve().is_relative_to(inside):
            raise UserError(f"{item} is a link that leads out of the run's folder: put the file itself there.")


def printable(text: str) -> str:
    """Text that moves no cursor and hides nothing where it is shown: control characters but line ends and tabs are replaced.

    >>> printable("a\\x1b]0;b\\n")
    'a\N{REPLACEMENT CHARACTER}]0;b\\n'
    """
    mark = "\N{REPLACEMENT CHARACTER}"
    return "".join(mark if unicodedata.category(c) in CONTROL and c not in "\n\t" else c for c in text)


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that it holds all of `content` or what it held before.

    The content is written beside it, flushed to the disk, and only then takes its name. Links are followed; what is no
    ordinary file (a device, a pipe) is written as it is.

    Raises:
        OSError: it could not be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames durable, where the system lets one open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def problem(error: OSError, path: Path) -> str:
    """What is wrong with `path`, and the remedy, to stand after a colon.

    >>> problem(FileNotFoundError(errno.ENOENT, "No such file or directory"), Path("nowhere/x.png"))
    'there is no folder nowhere; create it, or write elsewhere'
    """
    if error.errno in FULL:
        return "the disk is full; free some space, or write elsewhere"
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return f"nothing can be created in {path.parent}; write elsewhere"
    if error.errno == errno.ENOENT:
        return f"there is no folder {path.parent}; create it, or write elsewhere"
    if error.errno == errno.ENOTDIR:
        return f"{path.parent} is not a folder; write elsewhere"
    if error.errno == errno.EISDIR:
        return "it is a folder; give the name of a file"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "there is no permission to write it; change that, or write elsewhere"
    return f"{error.strerror or error}; write elsewhere"
