"""What trainers log of an observation: numbers by name."""

from __future__ import annotations

from collections.abc import Iterator

from fourbit.nn import Observation

_SHOWN = ("underflow", "saturation", "sqnr_db")


def by_layer(observation: Observation) -> Iterator[tuple[str, float]]:
    """fourbit/LAYER/SLOT/STATISTIC of every operand of every layer."""
    for layer, slots in observation.items():
        for slot, statistics in slots.items():
            for name in _SHOWN:
                yield f"fourbit/{layer}/{slot}/{name}", getattr(statistics, name)


def means(observation: Observation) -> dict[str, float]:
    """fourbit_SLOT_STATISTIC: their means over layers."""
    found: dict[str, list[float]] = {}
    for slots in observation.values():
        for slot, statistics in slots.items():
            for name in _SHOWN:
                found.setdefault(f"fourbit_{slot}_{name}", []).append(getattr(statistics, name))
    return {name: sum(values) / len(values) for name, values in found.items()}
