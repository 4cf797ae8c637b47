"""Run folders, read back into typed values.

The trainer leaves a folder per run: `config.json` (what was asked for), `env.json` (where it ran) and `metrics.jsonl`
(what happened, one JSON object a line). Files are the interface between the two programs: this module knows the
format of the lines and nothing of the trainer. It is lenient with a run that is alive or was killed (a half-written
line is skipped and noted, a missing number is NaN) and strict with a file that is something else entirely
(`UserError`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fourbit._files import printable, require_inside
from fourbit.diagnosis import History
from fourbit.diagnosis import number as number
from fourbit.errors import UserError
from fourbit.report._metric import ACCURACY

Record = dict[str, Any]

SLOTS = ("x_fprop", "w_fprop", "g_dgrad", "w_dgrad", "g_wgrad", "x_wgrad")
"""The six operand slots in the order in which pages and tables list them."""

SCALES = ("g_exponent", "x_alpha")
"""What is kept of a layer's own numbers: GradScale's exponent and PACT's clip value."""

STATISTICS = ("underflow", "saturation", "sqnr_db")
"""What is kept of the numbers that are observed in each slot."""


MOST_EXAMPLES = 20
"""Rows of a table of examples that are read."""

FILES = ("config.json", "env.json", "metrics.jsonl", "sample.txt", "examples.json")
"""What is read of a run folder."""
TOKENS = "tokens"
"""The entry of lines with how many the run has been trained on."""

RATE = "_per_s"
"""What the names of rates end with."""


@dataclass(frozen=True)
class LayerTrace:
    """What was written about the quantized layers of one run: arrays of shape [points in time T, layers L].

    Keys are `("g_exponent",)`, `("x_alpha",)` and `(slot, statistic)`, as in `("g_dgrad", "underflow")`. Layers are in
    the order of the file, which is the order of the model from input to output.
    """

    layers: tuple[str, ...] = ()
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    data: Mapping[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    def values(self, *key: str) -> np.ndarray:
        """The array [T, L] for a key; all NaN if it was never recorded."""
        return self.data.get(key, np.full((len(self.steps), len(self.layers)), math.nan))

    def has(self, *key: str) -> bool:
        """Whether at least one finite number was recorded for a key."""
        return key in self.data and bool(np.isfinite(self.data[key]).any())

    def last(self, *key: str) -> np.ndarray:
        """The newest finite number of every layer, shape [L]; NaN where there is none."""
        newest = np.full(len(self.layers), math.nan)
        for row in self.values(*key):
            newest = np.where(np.isfinite(row), row, newest)
        return newest

    def slots(self) -> tuple[str, ...]:
        """The slots with statistics, in canonical order."""
        seen = {key[0] for key in self.data if len(key) == 2}
        return tuple(s for s in SLOTS if s in seen)


@dataclass(frozen=True)
class Run:
    """One run folder. `steps` and `epochs` are the lines of that kind; `histograms` holds the first and the newest.

    `scales` has the exponents and clip values of every logged step, `trace` the statistics of every observation, `sample`
    what a language model was given and what it wrote, `examples` a table of what a network made of test examples, with its
    header as the first row, `history` what the diagnosis reads.
    """

    path: Path
    config: Mapping[str, Any]
    env: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Record] = ()
    epochs: Sequence[Record] = ()
    final: Record | None = None
    scales: LayerTrace = field(default_factory=LayerTrace)
    trace: LayerTrace = field(default_factory=LayerTrace)
    histograms: Sequence[Record] = ()
    notes: Sequence[str] = ()
    sample: tuple[str, str] | None = None
    examples: Sequence[Sequence[str]] = ()
    history: History = field(default_factory=History)

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return text(self.config["recipe"])

    @property
    def seed(self) -> str:
        """The seed as text: it identifies, nothing is computed from it."""
        return text(self.config.get("seed", "none"))

    @cached_property
    def metric(self) -> str | None:
        """Title of the metric by which the run is judged, as its newest line has it; None before the first evaluation."""
        lines = [*self.epochs, *self._finals]
        return _judged(lines[-1])[0] if lines else None

    @cached_property
    def _tokens(self) -> dict[int, float]:
        return {r["step"]: number(r[TOKENS]) for r in (*self.steps, *self.epochs, *self._finals) if TOKENS in r}

    @property
    def in_tokens(self) -> bool:
        """Whether it is known behind which tokens every loss and every evaluation stand."""
        lines = [*(r for r in self.steps if not math.isnan(number(r.get("loss")))), *self.epochs, *self._finals]
        return bool(lines) and all(r["step"] in self._tokens for r in lines)

    def tokens_at(self, steps: Sequence[float] | np.ndarray) -> np.ndarray:
        """How many tokens the run had been trained on at these steps; `in_tokens` says whether that is known."""
        known = sorted(self._tokens.items())
        return np.asarray(np.interp(steps, [s for s, _ in known], [t for _, t in known]))

    @property
    def bits_per_byte(self) -> float:
        """Of the test text at the last evaluation; NaN where it is not known."""
        lines = [*self.epochs, *self._finals]
        return number(lines[-1].get("bits_per_byte")) if lines else math.nan

    @property
    def _finals(self) -> list[Record]:
        return [self.final] if self.final else []

    @cached_property
    def evaluations(self) -> list[tuple[float, float, float]]:
        """(epoch, step, metric) of every evaluation; the final one counts where no epoch line stands for it.

        The metric is NaN where it was not measured, or where an older version of the trainer measured another.
        """
        found = [self._evaluation(r) for r in self.epochs]
        if self.final is not None:
            point = self._evaluation(self.final)
            if not math.isnan(point[2]) and (not found or point[1] > found[-1][1]):
                found.append(point)
        return found

    def _evaluation(self, line: Record) -> tuple[float, float, float]:
        metric, value = _judged(line)
        return number(line.get("epoch")), number(line.get("step")), value if metric == self.metric else math.nan

    @property
    def result(self) -> float:
        """The metric at the last evaluation (never the best one), as it is shown; NaN before the first."""
        return self.evaluations[-1][2] if self.evaluations else math.nan

    @property
    def train_loss(self) -> float:
        """Mean training loss of the last epoch, or of the last logged steps before the first epoch ended."""
        if self.epochs:
            return number(self.epochs[-1].get("train_loss"))
        return number(self.steps[-1].get("loss")) if self.steps else math.nan

    @property
    def seconds_per_epoch(self) -> float:
        """Median over the epochs, which a slow first epoch (warm-up, compilation) does not move."""
        seconds = [s for s in (number(r.get("seconds")) for r in self.epochs) if not math.isnan(s)]
        return float(np.median(seconds)) if seconds else math.nan

    @property
    def rate(self) -> tuple[str, float]:
        """What was trained on, in the plural, and how many of it per second, the median over the "step" lines."""
        found = [(k.removesuffix(RATE), number(v)) for r in self.steps for k, v in r.items() if k.endswith(RATE)]
        known = [value for _, value in found if not math.isnan(value)]
        return (found[-1][0] if found else "items"), float(np.median(known)) if known else math.nan

    @property
    def status(self) -> str:
        """ "done", "max_steps", "interrupted" (as the run said), "diverged", or "unfinished" (no final line yet)."""
        stopped = text(self.final.get("stopped", "done")) if self.final else "unfinished"
        newest = max(
            [*(r for r in self.steps[-1:]), *(r for r in self.epochs[-1:])],
            key=lambda r: r["step"],
            default=None,
        )
        if newest is not None:
            key = "loss" if newest["kind"] == "step" else "train_loss"
            if key in newest and math.isnan(number(newest[key])):
                return "diverged"
        return stopped

    @property
    def num_steps(self) -> int:
        """Optimizer steps done at the newest line."""
        newest = [r["step"] for r in (*self.steps[-1:], *self.epochs[-1:])]
        return int(max([*newest, self.final["step"] if self.final else 0]))


def _judged(line: Record) -> tuple[str, float]:
    """Title and value of the metric in a line "epoch" or "final"; older lines have the accuracy alone."""
    if isinstance(line.get("metric"), str):
        return text(line["metric"]), number(line.get("test_metric"))
    return ACCURACY, 100 * number(line.get("test_accuracy"))


def text(value: object) -> str:
    """One line of text for any JSON value; 1 and 1.0 read the same.

    >>> text(1.0), text(0.05), text(" a  b "), text(None), text([1, 2])
    ('1', '0.05', 'a b', 'none', '[1, 2]')
    """
    if isinstance(value, str):
        return printable(" ".join(value.split()))
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return "none" if value is None else json.dumps(value)


def find_run_folders(paths: Iterable[Path]) -> list[Path]:
    """Folders at or below `paths` that hold `config.json` and `metrics.jsonl`, each once, in the order of their names.

    Raises:
        UserError: a path does not exist, or there is no run folder at all.
    """
    asked = [Path(p) for p in paths]
    found: dict[Path, Path] = {}
    for top in asked:
        if not top.is_dir():
            raise UserError(f"{top} is not a folder: give the folder of a run, or one that contains runs.")
        for folder, subfolders, files in os.walk(top):
            subfolders.sort()
            if {"config.json", "metrics.jsonl"} <= set(files):
                found.setdefault(Path(folder).resolve(), Path(folder))
                subfolders.clear()  # what lies in a run folder (checkpoints) is part of that run
    if not found:
        where = ", ".join(str(p) for p in asked) or "an empty list of paths"
        raise UserError(
            f"no run folder found in {where}: a run folder holds config.json and metrics.jsonl, "
            "which `fourbit train` and `fourbit compare` write."
        )
    return list(found.values())


def planned_order(runs: Iterable[Run]) -> list[str]:
    """Recipes in the order in which `fourbit compare` was given them, from the table beside the runs; [] without one."""
    found: dict[str, None] = {}
    for folder in dict.fromkeys(run.path.parent for run in runs):
        try:
            rows = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(rows, list):
            found |= dict.fromkeys(text(r["recipe"]) for r in rows if isinstance(r, dict) and "recipe" in r)
    return list(found)


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """Every run at or below `paths`. Raises `UserError` as `find_run_folders` and `load_run` do."""
    return [load_run(folder) for folder in find_run_folders(paths)]


def load_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        UserError: `config.json` or `metrics.jsonl` is not what the trainer writes, or a file is a link that leads elsewhere.
    """
    require_inside(folder, [folder / name for name in FILES])
    config = _object(folder / "config.json")
    if "recipe" not in config:
        raise UserError(f"{folder / 'config.json'} is not the configuration of a run: it names no recipe.")
    env = _object(folder / "env.json") if (folder / "env.json").is_file() else {}
    kinds, notes = _records(folder / "metrics.jsonl")
    return Run(
        path=folder,
        config=config,
        env=env,
        steps=kinds["step"],
        epochs=kinds["epoch"],
        final=kinds["final"][-1] if kinds["final"] else None,
        scales=_scales([*kinds["step"], *kinds["layers"]]),
        trace=_trace(kinds["layers"]),
        histograms=kinds["histograms"],
        notes=notes,
        sample=_sample(folder / "sample.txt"),
        examples=_examples(folder / "examples.json"),
        history=_history(kinds),
    )


def _history(kinds: Mapping[str, Sequence[Record]]) -> History:
    history = History()
    for lines in kinds.values():
        for line in lines:
            history.add(line)
    return history


def _sample(path: Path) -> tuple[str, str] | None:
    """What stands before and behind the line of three dashes; None without one."""
    try:
        prompt, dashes, written = path.read_text(encoding="utf-8", errors="replace").partition("\n---\n")
    except OSError:
        return None
    return (printable(prompt), printable(written)) if dashes else None


def _examples(path: Path) -> list[list[str]]:
    """Header and rows; [] without a table."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table = [found["columns"], *found["rows"][:MOST_EXAMPLES]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    whole = all(isinstance(row, list) and len(row) == len(table[0]) for row in table)
    return [[text(cell) for cell in row] for row in table] if whole and table[0] else []


def _object(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it or leave its folder out.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not the object that a run writes.")
    return value


def _records(path: Path) -> tuple[dict[str, list[Record]], list[str]]:
    """The lines by kind, and notes about lines that had to be skipped."""
    kinds: dict[str, list[Record]] = {k: [] for k in ("step", "epoch", "layers", "vitals", "histograms", "final")}
    damaged: list[int] = []
    newest = -1
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            damaged.append(row)
            continue
        if not isinstance(record, dict) or "kind" not in record or not isinstance(record.get("step"), int):
            raise UserError(f'{path}, line {row} is not a metrics line of fourbit: it lacks "kind" or "step".')
        if record["step"] < newest:  # resumed from an older checkpoint: what came after it never happened
            for kind in kinds:
                kinds[kind] = [r for r in kinds[kind] if r["step"] < record["step"]]
        if record["step"] != newest and kinds["final"]:  # continued after its end: the end was not the end
            kinds["final"].clear()
        newest = record["step"]
        if record["kind"] in kinds:
            kinds[record["kind"]].append(record)
        del kinds["histograms"][1:-1]  # they are large, and pages show the first and the last
    if damaged and len(damaged) == sum(1 for line in lines if line.strip()):
        raise UserError(f"{path} is not a metrics file of fourbit: no line of it is a JSON object.")
    if not damaged:
        return kinds, []
    which = f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} lines (first: {damaged[0]}) are"
    return kinds, [f"{path.parent.name}/{path.name}: {which} damaged (cut off while being written?) and left out."]


def _scales(records: Sequence[Record]) -> LayerTrace:
    """Exponents and clip values from the lines that have any: "step" (not in older runs) and "layers"."""
    points: dict[int, dict[str, dict[tuple[str, ...], object]]] = {}
    for record in sorted(records, key=lambda r: r["step"]):
        layers = record.get("scales", record.get("layers"))
        if isinstance(layers, dict):
            kept = {name: layer for name, layer in layers.items() if isinstance(layer, dict)}
            point = points.setdefault(record["step"], {})
            for name, layer in kept.items():
                point[name] = {(key,): layer.get(key) for key in SCALES}
    return _laid_out(points)


def _trace(records: Sequence[Record]) -> LayerTrace:
    """The statistics of the lines "layers"."""
    points: dict[int, dict[str, dict[tuple[str, ...], object]]] = {}
    for record in records:
        entry = record["layers"] if isinstance(record.get("layers"), dict) else {}
        point = points.setdefault(record["step"], {})
        for name, layer in entry.items():
            slots = layer.get("slots") if isinstance(layer, dict) else None
            found = {s: v for s, v in slots.items() if isinstance(v, dict)} if isinstance(slots, dict) else {}
            point[name] = {(slot, key): found[slot].get(key) for slot in found for key in STATISTICS}
    return _laid_out(points)


def _laid_out(points: Mapping[int, Mapping[str, Mapping[tuple[str, ...], object]]]) -> LayerTrace:
    """{step: {layer: {key: value}}} as arrays."""
    layers = tuple(dict.fromkeys(name for point in points.values() for name in point))
    column = {name: i for i, name in enumerate(layers)}
    data: dict[tuple[str, ...], np.ndarray] = {}
    for row, point in enumerate(points.values()):
        for name, values in point.items():
            for key, value in values.items():
                data.setdefault(key, np.full((len(points), len(layers)), math.nan))[row, column[name]] = number(value)
    return LayerTrace(layers, np.array(list(points), dtype=float), data)
