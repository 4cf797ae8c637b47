"""Which code the runs of a table are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fourbit.reproduce._table import Column


def said_of_commits(runs: Path, columns: Sequence[Column]) -> str:
    """A sentence about the commits in the env.json of each run: one, several, or unknown."""
    commits = set()
    for column in columns:
        for seed in (*column.values, *column.diverged):
            try:
                commits.add(json.loads((runs / f"{column.recipe}-seed{seed}" / "env.json").read_text()).get("commit"))
            except (OSError, ValueError, AttributeError):
                commits.add(None)
    known = sorted(commit[:7] + "+" * commit.endswith("+") for commit in commits if commit)
    words = []
    if known:
        words.append(f"commit {known[0]}" if len(known) == 1 else f"{len(known)} commits ({', '.join(known)})")
    if None in commits:
        words.append("code without a commit")
    changed = " (+: with changes)" if any(commit.endswith("+") for commit in known) else ""
    return f"Runs of {' and '.join(words)}{changed}."
