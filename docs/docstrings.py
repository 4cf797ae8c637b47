"""Docstrings are written to be read in a terminal: prose, `code`, |x|, formulas and examples that are indented. Here they
become what Sphinx reads."""

from __future__ import annotations

import re
from typing import Any

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")
SPECIAL = re.compile(r"([\\\\*|_])")


def to_restructured_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Change `lines` in place: code and special characters, and indented blocks, which are literal outside of sections."""
    found: list[str] = []
    section, literal = False, False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            found.append("")
            continue
        if text in SECTIONS and indent == 0:
            section, literal = True, False
        elif indent == 0:
            if literal and found and found[-1]:
                found.append("")
            section, literal = False, False
        elif not section and not literal and not text.startswith((">>>", "- ")):
            found += ([] if found and not found[-1] else [""]) + ["::", ""]
            literal = True
        if literal or text.startswith((">>>", "...")) or _follows_example(found):
            found.append(line)
        else:
            found.append(" " * indent + inline(text))
    lines[:] = found


def _follows_example(lines: list[str]) -> bool:
    """Whether the last lines are an example whose result comes now."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if line.lstrip().startswith(">>>"):
            return True
    return False


def inline(text: str) -> str:
    """`code` becomes ``code``; characters that mean something elsewhere stand for themselves."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return SPECIAL.sub(r"\\\1", text)
    return "".join(
        SPECIAL.sub(r"\\\1", part) if n % 2 == 0 else f"``{part}``" if part else "" for n, part in enumerate(parts)
    )
