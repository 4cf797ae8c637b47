"""A page of text, tables and figures about anything; `_html` has the one about training runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from fourbit._files import problem, replace_file
from fourbit.errors import UserError
from fourbit.report._html import MARK, environment, page_of, render
from fourbit.report._style import Plot, style


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Grid:
    """A table: its head and its rows; the first `words` columns hold words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Chapter:
    """A heading and what stands under it."""

    id: str
    title: str
    blocks: Sequence[Text | Grid | Plot]


def write_page(out: Path, title: str, summary: str, chapters: Sequence[Chapter]) -> Path:
    """Write a page, and each figure as PNG in the folder X_figures beside it.

    Args:
        out: the page's name, X.html, or a folder: then its index.html and figures/.

    Returns:
        The path of the page.

    Raises:
        UserError: `out` cannot be written, or there is a page there that is not a report.
    """
    page = page_of(out)
    folder = page.parent / ("figures" if page is not out else f"{page.stem}_figures")
    try:
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{page} exists and is not a report of fourbit: choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        with style():
            rendered = [
                Chapter(c.id, c.title, [render(b, folder) if isinstance(b, Plot) else b for b in c.blocks])  # type: ignore[misc]
                for c in chapters
            ]
        text = (
            environment()
            .get_template("page.html.j2")
            .render(
                title=title,
                summary=summary,
                chapters=rendered,
                written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            )
        )
        replace_file(page, text.encode())
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {problem(error, page)}.") from error
    return page
