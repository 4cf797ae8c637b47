"""Says what goes wrong with a run while it does."""

from __future__ import annotations

import json

from fourbit.diagnosis import Finding, Warner
from fourbit.train._display import Display
from fourbit.train._folder import RunFolder


def warn_live(folder: RunFolder, display: Display, goes_on: bool) -> None:
    """From now on, each kind of finding is said once, and none that a sitting before has said.

    Args:
        folder: of the run.
        goes_on: its metrics.jsonl has lines already, and ends where the run goes on.
    """

    def say(finding: Finding) -> None:
        display.say(f"warning: {finding}")

    warner = Warner(say)
    if folder.active and goes_on:
        with (folder.path / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    warner.recall(record)
        warner.recalled()
    folder.listeners.append(warner.add)
