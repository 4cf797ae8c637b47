"""What is wrong with runs: their own findings, and seeds that are unlike the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourbit.diagnosis import OUTLIER, Finding, examine, outlier
from fourbit.report._groups import Group, group_runs
from fourbit.report._metric import unit
from fourbit.report._read import Run, load_runs


@dataclass(frozen=True)
class Diagnosis:
    """One run and what was found; healthy without findings."""

    run: Run
    findings: tuple[Finding, ...]


def diagnose(paths: Path | Sequence[Path]) -> list[Diagnosis]:
    """What is wrong with every run at or below `paths`, from what they recorded.

    Runs that differ by their seed alone are compared with each other, too. A run that goes on, or was killed, is judged by what
    it has written so far. What a version before wrote may lack what some rules read: they then find nothing.

    Args:
        paths: run folders, or folders that contain run folders.

    Returns:
        One `Diagnosis` for each run, in the order of the folders.

    Raises:
        UserError: no run folder, or files that no trainer wrote.
    """
    found = [Path(paths)] if isinstance(paths, str | Path) else list(paths)
    runs = load_runs(found)
    return _diagnosed(runs, group_runs(runs))


def diagnosed_groups(groups: Sequence[Group]) -> list[Diagnosis]:
    """The same of runs that are grouped already."""
    return _diagnosed([run for group in groups for run in group.runs], groups)


def _diagnosed(runs: Sequence[Run], groups: Sequence[Group]) -> list[Diagnosis]:
    apart = {run.path: finding for group in groups for run, finding in _outlier(group)}
    return [Diagnosis(run, (*examine(run.history), *([apart[run.path]] if run.path in apart else []))) for run in runs]


def _outlier(group: Group) -> list[tuple[Run, Finding]]:
    ended = [run for run in group.runs if run.status in ("done", "max_steps", "diverged")]
    results = [math.nan if run.status == "diverged" else run.result for run in ended]
    percent = bool(unit(group.metric))
    place = outlier(results, percent)
    if place is None:
        return []
    run, value = ended[place], results[place]
    others = [r for i, r in enumerate(results) if i != place]
    ends = "diverged" if math.isnan(value) else f"ends at a {group.metric} of {value:.2f}"
    sentence = (
        f"Seed {run.seed} {ends}, while the {len(others)} others lie between {min(others):.2f} and {max(others):.2f}: it is no "
        "sample of the same."
    )
    remedy = (
        "Look at its first steps (a warm-up or --gradient-clip makes seeds agree), and report it as a run that failed."
    )
    return [(run, Finding(OUTLIER, run.num_steps, (), value, sentence, remedy))]
