"""From signs to findings: one for each kind, with all its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fourbit.diagnosis._history import History
from fourbit.diagnosis._rules import RULES, Rule
from fourbit.diagnosis._signs import Sign

NAMED = 3
"""So many layers are named in a sentence; a finding holds them all."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a run.

    Attributes:
        kind: name of the rule.
        step: since when; the earliest of all layers.
        layers: where, in the order of the network; () where it concerns the whole.
        value: the number that shows it, of the worst layer.
        sentence, remedy: for people.
    """

    kind: str
    step: int
    layers: tuple[str, ...]
    value: float
    sentence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.sentence} {self.remedy}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"layers": list(self.layers), "value": None if self.value != self.value else self.value}


def examine(history: History, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """All findings, in the order of the rules."""
    return list(_found(history, rules))


def _found(history: History, rules: Sequence[Rule]) -> Iterator[Finding]:
    for rule in rules:
        found: list[Sign] = list(rule.test(history))
        if found:
            worst = max(found, key=lambda sign: sign.badness)
            since = min(sign.step for sign in found)
            layers = tuple(dict.fromkeys(sign.layer for sign in found if sign.layer is not None))
            words = rule.sentence.format(layers=_listed(layers), value=worst.value, badness=worst.badness, step=since)
            yield Finding(rule.kind, since, layers, worst.value, words, rule.remedy)


def _listed(layers: Sequence[str]) -> str:
    more = len(layers) - NAMED
    return ", ".join(layers[:NAMED]) + (f" and {more} more" if more > 0 else "")
