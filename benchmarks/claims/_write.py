"""Everything that the package writes, and whether the files have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.claims import conformance, debates, figures, gradients, hardware, paper, questions, scales, speed, sums
from benchmarks.claims._claim import CLAIMS, Claim, together
from benchmarks.claims._documents import FOLDER, documents, filled
from benchmarks.claims._draw import digest, draw, drawn
from benchmarks.claims._page import page

MODULES = (paper, questions, scales, gradients, figures, sums, debates, hardware, speed, conformance)
"""Modules that enter claims, in the order of the index."""


def claims() -> list[Claim]:
    """All of them, in the order of the index, which does not depend on that of imports."""
    order = [module.__name__ for module in MODULES]
    entries = sorted(CLAIMS.items(), key=lambda entry: order.index(entry[1][1].__module__))
    return [replace(make(), name=name, group=group) for name, (group, make) in entries]


def pages(found: Sequence[Claim]) -> dict[Path, str]:
    """The text of every page, and of every document with its regions filled in."""
    stands = together(found)
    texts = {FOLDER / f"{claim.name}.md": page(claim, stands) for claim in found}
    return texts | {path: filled(path, found) for path in documents()}


def pictures(found: Sequence[Claim]) -> dict[Path, Claim]:
    """Pictures that are drawn here."""
    return {FOLDER / f"{claim.name}.png": claim for claim in found if not isinstance(claim.picture, tuple)}


def stale() -> list[Path]:
    """Files that differ from what the kept runs give, and files of claims that are no more."""
    found = claims()
    texts, drawings = pages(found), pictures(found)
    old = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    old += [path for path, claim in drawings.items() if drawn(path) != digest(claim)]
    return sorted({*old, *_left_over(texts, drawings)})


def write() -> list[Path]:
    """Write what is stale; returns the files that changed."""
    found = claims()
    texts, drawings = pages(found), pictures(found)
    changed = stale()
    FOLDER.mkdir(exist_ok=True)
    for path in changed:
        if path in texts:
            path.write_text(texts[path])
        elif path in drawings:
            draw(drawings[path], path)
        else:
            path.unlink()
    return changed


def _left_over(texts: dict[Path, str], drawings: dict[Path, Claim]) -> list[Path]:
    return [path for path in FOLDER.glob("*") if path not in texts and path not in drawings]
