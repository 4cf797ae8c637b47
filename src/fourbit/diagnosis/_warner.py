"""A run's findings while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fourbit.diagnosis._findings import Finding, examine
from fourbit.diagnosis._history import History

ASKED_AFTER = ("vitals", "epoch")
"""Kinds of lines with which an observation, or an epoch, is complete."""


class Warner:
    """Takes the lines of a run and says each kind of finding once.

    Args:
        say: is called with a finding.
    """

    def __init__(self, say: Callable[[Finding], None]):
        self._say, self._history, self._said = say, History(limited=True), set[str]()

    def recall(self, line: Mapping[str, Any]) -> None:
        """A line of before, of which somebody was told already."""
        self._history.add(line)

    def recalled(self) -> None:
        """All of before has come."""
        self._said |= {finding.kind for finding in examine(self._history)}

    def add(self, line: Mapping[str, Any]) -> None:
        """A new line; where it completes an observation, what it shows is said."""
        self._history.add(line)
        if line.get("kind") not in ASKED_AFTER:
            return
        for finding in examine(self._history):
            if finding.kind not in self._said:
                self._said.add(finding.kind)
                self._say(finding)
