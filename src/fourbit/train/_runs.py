"""What lies in folders of runs, and how each of them stands."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fourbit._files import printable
from fourbit.errors import UserError
from fourbit.train import _checkpoint
from fourbit.train._folder import RunFolder, last_record, read_json

Row = tuple[str, ...]


def described(paths: Iterable[Path]) -> list[Row]:
    """Folder, model, data, recipe, seed, state, step and score of each run at or below `paths`.

    Raises:
        UserError: a path is no folder, or there is no run at all.
    """
    rows = [tuple(map(printable, _described(folder))) for path in paths for folder in _folders(Path(path))]
    if not rows:
        raise UserError(f"there is no run in {', '.join(map(str, paths))}: name a folder of runs.")
    return rows


def _folders(top: Path) -> Iterator[Path]:
    if not top.is_dir():
        raise UserError(f"{top} is not a folder: name the folder of a run, or one that contains runs.")
    for folder, inside, files in os.walk(top):
        inside.sort()
        if "config.json" in files:
            inside.clear()
            yield Path(folder)


def _described(folder: Path) -> Row:
    try:
        config = read_json(folder / "config.json")
    except UserError as error:
        return str(folder), "", "", "", "", f"damaged: {error}", "", ""
    named = tuple(" ".join(str(config.get(key, "")).split()) for key in ("model", "data", "recipe", "seed"))
    final, step = last_record(folder, "final") or {}, last_record(folder, "step") or {}
    state = _state(folder, final)
    score = final.get("test_metric") if state == "finished" else None
    shown = f"{score:.4g} {final.get('metric', '')}" if isinstance(score, int | float) else "-"
    return str(folder), *named, state, str(max(_step(final), _step(step))), " ".join(shown.split())


def _step(line: dict[str, Any]) -> int:
    step = line.get("step")
    return step if isinstance(step, int) else 0


def _state(folder: Path, final: dict[str, Any]) -> str:
    run = RunFolder(folder)
    if run.is_held():
        return "running"
    if final.get("stopped") == "diverged":
        return "diverged"
    try:
        if _checkpoint.exists(run.checkpoint):
            _checkpoint.load(run.checkpoint)
    except UserError as error:
        return f"damaged: {error}"
    return "finished" if final.get("stopped") in ("done", "max_steps") else "stopped"
