"""Text files as people have them: UTF-8 with or without its mark, and line ends of every system.

A line ends with a line feed, a carriage return or both. Form feeds, U+0085, U+2028 and other separators are characters:
`str.splitlines` would end lines there, and pairs of sentences, or words and labels, would no longer belong together.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from fourbit.errors import UserError

OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    r"""The text with \n as the only line end, and without byte-order marks: joined files have them in the middle, too.

    Raises:
        UserError: it cannot be read, is in another encoding, or is binary (has a zero byte).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error
    for mark, encoding in OTHER_MARKS.items():
        if content.startswith(mark):
            raise UserError(f"{path} is not UTF-8 text but {encoding}: convert it, or replace the file.")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}, in line {line}: {error.reason}): convert it, or replace the file."
        ) from error
    if "\0" in text:
        raise UserError(
            f"{path} is not UTF-8 text (character {text.index(chr(0))} is zero, as in binary files and in UTF-16): convert "
            "it, or replace the file."
        )
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text: str) -> list[str]:
    r"""The lines of what `read_text` returns, without their ends; a last one needs none.

    >>> lines_of("a\n\nb\x0cc\n"), lines_of("a"), lines_of("")
    (['a', '', 'b\x0cc'], ['a'], [])
    """
    return text.removesuffix("\n").split("\n") if text else []
