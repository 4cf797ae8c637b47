"""Reads what is kept in docs/results: tables of runs, single runs, and tables in Markdown."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks._harness import ROOT
from benchmarks.claims._claim import Part, Table, seeds
from fourbit.reproduce import rows_of
from fourbit.reproduce._provenance import said_of_commits
from fourbit.reproduce._row import ScaleName, said_of
from fourbit.reproduce._run import _runs_folder
from fourbit.reproduce._statistics import Paired, paired
from fourbit.reproduce._table import Column

RESULTS = ROOT / "docs" / "results"
FOLDERS = {"spoken_digits": "fsdd"}
"""Of a data set in `data/`, where it is not its name."""


@dataclass(frozen=True)
class Runs:
    """The kept runs of one comparison.

    Args:
        label: network and length, in a few words.
        trained: what was trained, as its own table says it.
        unit: of differences.
        metric: what the numbers are.
        columns: by recipe.
        command: that trains them.
        commits: a sentence on the code that they are of.
        source: the table that the numbers are also in, from docs/results.
        paper: {recipe: the paper's number}.
    """

    label: str
    trained: str
    unit: str
    metric: str
    columns: Mapping[str, Column]
    command: str
    commits: str
    source: str
    paper: Mapping[str, float]

    def gap(self, recipe: str, other: str = "fp32") -> Paired | None:
        """Mean difference over the seeds that both have; None where a run diverged, or there is no such seed."""
        return self.columns[recipe].against(self.columns[other])

    def part(
        self, recipe: str, other: str = "fp32", least: float | None = None, most: float | None = None, where: str = ""
    ) -> Part:
        """The difference between two recipes as what a claim rests on."""
        what = f"{title_of(recipe)} - {title_of(other)}" + (f", {where}" if where else "")
        found = self.gap(recipe, other)
        if found is not None:
            return seeds(what, found, self.unit, least, most)
        diverged = any(self.columns[name].diverged for name in (recipe, other))
        why = "not compared: a run diverged" if diverged else "not compared: no seed in common"
        return Part(what, math.nan, None, None, self.unit, "", least, most, figure=why)

    def table(self, recipes: Sequence[str]) -> Table:
        """Each recipe with its seeds, its mean and its difference to FP32; the paper's numbers, where it has some."""
        told = any(recipe in self.paper for recipe in recipes)
        rows = []
        for recipe in recipes:
            column = self.columns[recipe]
            found = None if recipe == "fp32" or "fp32" not in self.columns else self.gap(recipe)
            half = "-" if found is None else "one seed" if found.half is None else f"±{found.half:.2f}"
            values = [f"{value:.2f}" for _, value in sorted(column.values.items())]
            shown = ", ".join(values) if len(values) <= 5 else f"{min(values, key=float)} to {max(values, key=float)}"
            rows.append(
                (
                    f"`{recipe}`",
                    *((f"{self.paper[recipe]:.2f}" if recipe in self.paper else "-",) if told else ()),
                    "-" if column.mean is None else f"{column.mean:.2f}",
                    shown or "-",
                    f"{len(values)}" + (f" ({len(column.diverged)} diverged)" if column.diverged else ""),
                    "-" if found is None else f"{found.mean:+.2f}",
                    half,
                )
            )
        head = ("recipe", *(("the paper",) if told else ()), self.metric, "by seed", "seeds", "to FP32", "95 %")
        return Table(f"{self.label} ([table](../{self.source}))", head, tuple(rows))


def title_of(recipe: str) -> str:
    """As the text calls it: FP32, or the recipe's name."""
    return "FP32" if recipe == "fp32" else f"`{recipe}`"


@functools.cache
def reproduced(
    table: str, name: str, label: str, lr: float | None = None, scale: ScaleName = "small", epochs: int | None = None
) -> Runs:
    """A row that `fourbit reproduce` has written from its runs; `lr` or `epochs`: of a row that has several."""
    row = rows_of(table)[name]
    folder = RESULTS / "reproduce" / f"{table}-{name}-{scale}"
    read = json.loads((folder / "reproduced.json").read_text())
    variation = {key: value for key, value in (("lr", lr), ("epochs", epochs)) if value is not None}
    part = read if isinstance(read, dict) else next(p for p in read if variation.items() <= p.items())
    settings = row.settings(scale) | variation
    columns = {
        c["recipe"]: Column(
            c["recipe"],
            {int(s): v for s, v in c["by_seed"].items()},
            tuple(c["diverged"]),
            settings["lr"],
            settings["epochs"],
        )
        for c in part["columns"]
    }
    seeds_of = sorted({s for column in columns.values() for s in column.values})
    place = _runs_folder(row, scale, RESULTS / "reproduce", settings["model"], variation)
    data = settings["data"]
    command = f"fourbit reproduce {table} --row {name} --seeds {','.join(map(str, seeds_of))}"
    command += f" --scale {scale}" if scale != "small" else ""
    command += f" --data-dir data/{FOLDERS.get(data, data)} --threads 1"
    if scale != "small" or any(recipe not in row.columns for recipe in columns):
        command += f" \\\n        --columns {','.join(columns)}"
    return Runs(
        label,
        said_of(settings, seeds_of),
        "points" if "%" in row.metric else row.metric.removeprefix("test "),
        row.metric.removeprefix("CIFAR-10 "),
        columns,
        command,
        said_of_commits(place, list(columns.values())),
        f"reproduce/{folder.name}/reproduced.md",
        row.paper,
    )


@functools.cache
def digits(epochs: int, optimizer: str = "sgd", lr: float = 0.1) -> Runs:
    """The comparison on digits, 16 seeds, after 8 or 40 epochs; 8 also with LARS, at a learning rate of 0.01."""
    name = "table" if epochs == 8 else f"table-{epochs}-epochs"
    name += "" if optimizer == "sgd" else f"-8-epochs-{optimizer}"
    by = "" if optimizer == "sgd" else f", {optimizer.upper()}"
    flags = f"--model digits_cnn --data digits --epochs {epochs} "
    flags += "" if optimizer == "sgd" else f"--optimizer {optimizer} --lr {lr:g} "
    flags += f"--threads 1 --out runs/digits{epochs}"
    names = f"Digits, small network, {epochs} epochs{by}", f"digits_cnn on digits, {epochs} epochs{by}"
    return _compared(
        f"digits/{name}",
        names,
        flags,
        lr,
        epochs,
        "The folders of these runs are not kept; their accuracies by seed are.",
    )


@functools.cache
def half_resnet_lars() -> Runs:
    """Half a ResNet-20 for three epochs with LARS."""
    flags = "--model 'resnet20?width=8' --data cifar10 --data-dir data/cifar10 --image-size 16 --batch-size 128 "
    flags += "--optimizer lars --lr 0.01 \\\n        --schedule step --epochs 3 --threads 1 --observe-every 0 --out runs/lars"
    name = "resnet20-half-lars"
    names = "Half a ResNet-20, pictures of 16x16, 3 epochs, LARS", "resnet20?width=8 on cifar10, 3 epochs, LARS"
    found = _compared(f"{name}/table", names, flags, 0.01, 3, "")
    return replace(found, commits=said_of_commits(RESULTS / name, list(found.columns.values())))


def _compared(table: str, names: tuple[str, str], flags: str, lr: float, epochs: int, commits: str) -> Runs:
    """The kept table of a comparison of image networks; `names`: its label, and what was trained."""
    rows = json.loads((RESULTS / f"{table}.json").read_text())
    columns = {
        r["recipe"]: Column(
            r["recipe"],
            {int(s): v * 100 for s, v in r["test_accuracy_by_seed"].items()},
            tuple(r["diverged_seeds"]),
            lr,
            epochs,
        )
        for r in rows
    }
    every_seed = ",".join(map(str, range(rows[0]["n"])))
    command = f"fourbit compare {flags} \\\n        --seeds {every_seed} \\\n        --recipes {','.join(columns)}"
    trained = f"{names[1]}, {rows[0]['n']} seeds"
    return Runs(names[0], trained, "points", "test accuracy %", columns, command, commits, f"{table}.md", {})


def change(later: Runs, earlier: Runs, recipe: str) -> Paired:
    """How the gap of a recipe to FP32 differs between two comparisons, seed by seed."""

    def gaps(runs: Runs) -> dict[int, float]:
        reference = runs.columns["fp32"].values
        return {s: v - reference[s] for s, v in runs.columns[recipe].values.items() if s in reference}

    a, b = gaps(later), gaps(earlier)
    found = paired([a[s] - b[s] for s in a if s in b])
    assert found is not None
    return found


def final(folder: str) -> dict[str, Any]:
    """The last line of the metrics of a kept run, its folder from docs/results; `train_loss` is that of its last epoch."""
    found: dict[str, Any] = {}
    for line in (RESULTS / folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] in ("epoch", "final"):
            found |= record
    return found


def by_epoch(folder: str) -> list[float]:
    """The metric on the test data after each epoch of a kept run."""
    lines = (RESULTS / folder / "metrics.jsonl").read_text().splitlines()
    return [record["test_metric"] for record in map(json.loads, lines) if record["kind"] == "epoch"]


def markdown_rows(path: str, head: str) -> list[list[str]]:
    """The cells of the table in a file of docs/results whose head begins with `head`, without marks of bold and code."""
    lines = (RESULTS / path).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`*") for cell in line.strip("|").split("|")])
    return rows


def head_of(path: str, head: str) -> list[str]:
    """The head of such a table."""
    line = next(x for x in (RESULTS / path).read_text().splitlines() if x.startswith(f"| {head}"))
    return [re.sub("`", "", cell.strip()) for cell in line.strip("|").split("|")]


@functools.cache
def fidelity(path: str) -> dict[str, dict[str, tuple[float, float]]]:
    """{recipe: {layer: (projection, cosine)}} of a table of `fourbit fidelity`, without the last layer, which has no 4 bits."""
    recipes = head_of(path, "layer")[1:]
    rows = [row for row in markdown_rows(path, "layer") if row[0] not in ("fc", "classifier", "projection", "head")]
    return {
        recipe: {row[0]: tuple(float(x) for x in row[i + 1].split(", ")) for row in rows}  # type: ignore[misc]
        for i, recipe in enumerate(recipes)
    }


def conform_reports(library: str) -> list[dict[str, Any]]:
    """Of the quantizers of one library, as `fourbit conform --out` wrote them."""
    paths = sorted((RESULTS / "conformance").glob(f"{library}-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def benchmark(name: str) -> dict[str, Any]:
    """The results of a benchmark."""
    return json.loads((RESULTS / "performance" / f"{name}.json").read_text())


def trained(model: str, recipes: Sequence[str], seeds_of: Sequence[int]) -> str:
    """On which code the networks of a figure were trained: those that questions and figures share."""
    columns = [Column(recipe, dict.fromkeys(seeds_of, 0.0), (), 0.0, 0) for recipe in recipes]
    words = f"The trained networks: {model}, seed{'s' if len(seeds_of) > 1 else ''} {', '.join(map(str, seeds_of))}. "
    return words + said_of_commits(RESULTS / "reproduce" / "networks-small" / model, columns)
