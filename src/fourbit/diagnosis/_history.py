"""The numbers of one run, as arrays over time and layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = Mapping[str, Any]

KEPT_FIRST, KEPT_LAST = 16, 64
"""Lines of a kind that a history with a limit keeps: the beginning, which rules compare with, and what is new."""


def number(value: object) -> float:
    """`value` as a float; NaN for null (how the trainer writes infinity and NaN) and for anything not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Series:
    """A number of every layer over time: `values` [T, L] at `steps` [T], NaN where there is none."""

    steps: np.ndarray
    layers: tuple[str, ...]
    values: np.ndarray


class History:
    """Lines of metrics.jsonl, kind by kind, each in the order of its steps.

    Args:
        limited: keep the first and the last lines of a kind alone, for a run that goes on for long.
    """

    def __init__(self, limited: bool = False):
        self._limited = limited
        self._lines: dict[str, list[Record]] = {kind: [] for kind in ("step", "layers", "vitals", "epoch", "final")}

    def add(self, line: Record) -> None:
        """One more line; of kinds that no rule reads, nothing is kept."""
        lines = self._lines.get(line.get("kind", ""))
        if lines is None:
            return
        lines.append(line)
        if self._limited and len(lines) > KEPT_FIRST + KEPT_LAST:
            del lines[KEPT_FIRST]

    def lines(self, kind: str) -> list[Record]:
        """The lines of a kind."""
        return self._lines[kind]

    def numbers(self, kind: str, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a field of lines; NaN for null, without the lines that lack it."""
        found = [(number(line["step"]), number(line[field])) for line in self._lines[kind] if field in line]
        return np.array([s for s, _ in found]), np.array([v for _, v in found])

    @property
    def first_loss(self) -> float:
        """The loss of the first step, or the mean of the first steps where only that was written; NaN without any."""
        for lines in (self._lines["vitals"], self._lines["step"]):
            if lines and "loss" in lines[0]:
                return number(lines[0]["loss"])
        return math.nan

    def statistic(self, slot: str, name: str) -> Series:
        """A statistic of an operand, by observation."""
        return self._series("layers", "layers", lambda layer: _at(layer, "slots", slot, name))

    def remembered(self, name: str, kind: str = "layers") -> Series:
        """`g_exponent` or `x_alpha`: by observation, or with `kind` "step" by line."""
        return self._series(kind, "layers" if kind == "layers" else "scales", lambda layer: _at(layer, name))

    def vital(self, slot: str, name: str, index: int | None = None) -> Series:
        """What was measured beside the statistics of an operand; the element `index` of a list."""

        def value(layer: Any) -> object:
            found = _at(layer, slot, name)
            return found if index is None else _element(found, index)

        return self._series("vitals", "layers", value)

    def norm(self, name: str) -> Series:
        """`mean` or `deviation` of every batch normalization."""
        return self._series("vitals", "norms", lambda norm: _at(norm, name))

    def codes(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{layer: (where the sampled weights lie in grid units, what they became)}, each [T, N]; of full records."""
        found: dict[str, list[list[list[float]]]] = {}
        for line in self._lines["vitals"]:
            for name, layer in _entries(line, "layers"):
                pair = _at(layer, "w_fprop", "codes")
                if _are_lists_of_numbers(pair):
                    found.setdefault(name, []).append(pair)
        whole = {name: pairs for name, pairs in found.items() if len({len(p[0]) for p in pairs}) == 1}
        return {
            name: (np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs], dtype=float))
            for name, pairs in whole.items()
        }

    def _series(self, kind: str, under: str, value: Callable[[Any], object]) -> Series:
        lines = [line for line in self._lines[kind] if isinstance(line.get(under), dict)]
        layers = tuple(dict.fromkeys(name for line in lines for name in line[under]))
        column = {name: i for i, name in enumerate(layers)}
        values = np.full((len(lines), len(layers)), math.nan)
        for row, line in enumerate(lines):
            for name, entry in _entries(line, under):
                values[row, column[name]] = number(value(entry))
        return Series(np.array([number(line["step"]) for line in lines]), layers, values)


def _entries(line: Record, under: str) -> list[tuple[str, Any]]:
    entries = line.get(under)
    return list(entries.items()) if isinstance(entries, dict) else []


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _element(values: Any, index: int) -> object:
    return values[index] if isinstance(values, list) and len(values) > index else None


def _are_lists_of_numbers(pair: object) -> bool:
    """Whether it is two lists of as many numbers."""
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, list) for part in pair):
        return False
    return len(pair[0]) == len(pair[1]) and all(isinstance(v, int | float) for part in pair for v in part)
