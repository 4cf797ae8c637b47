"""Reading what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_TRAIN, NUM_TEST, BATCH_SIZE = 96, 40, 32
STEPS_PER_EPOCH = NUM_TRAIN // BATCH_SIZE

CLOCK = ("seconds", "images_per_s", "tokens_per_s", "utterances_per_s")
"""Fields of metrics.jsonl that no two runs share."""


def metrics(folder: Path, *, clock: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; without what depends on the clock, unless asked for."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if clock or k not in CLOCK} for line in lines]


def tensors(folder: Path) -> dict[str, bytes]:
    """Both tensor files of a run's checkpoint, byte by byte."""
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoint").glob("*.safetensors"))}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
