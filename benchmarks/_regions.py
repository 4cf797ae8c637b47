"""Regions of a document that a script writes: what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.

A region whose text begins on a line of its own is a block; one inside a line stays inside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_REGION = re.compile(r"(<!-- begin ([\w-]+) -->)(\n?)(.*?)(<!-- end \2 -->)", re.DOTALL)


def names(text: str) -> list[str]:
    """The regions of a document, in their order."""
    return [match[2] for match in _REGION.finditer(text)]


def outside(text: str) -> str:
    """The document without its regions: what people write."""
    return _REGION.sub("", text)


def fill(text: str, shown: Mapping[str, str]) -> str:
    """The document with those of its regions replaced that there is something for.

    >>> fill("a <!-- begin x -->1<!-- end x --> b", {"x": "2"})
    'a <!-- begin x -->2<!-- end x --> b'
    """

    def replaced(match: re.Match[str]) -> str:
        if match[2] not in shown:
            return match[0]
        return f"{match[1]}{match[3]}{shown[match[2]]}{match[3]}{match[5]}"

    return _REGION.sub(replaced, text)
