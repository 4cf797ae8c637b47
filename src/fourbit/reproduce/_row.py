"""What a row of a table is: the paper's numbers, and the runs that stand for them at each scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fourbit.errors import UserError, unknown

ScaleName = Literal["paper", "converged", "small", "smoke"]
TableName = Literal["table1", "table2", "table3", "questions", "debates"]
SCALES: tuple[ScaleName, ...] = ("paper", "converged", "small", "smoke")
TABLES: tuple[TableName, ...] = ("table1", "table2", "table3", "questions", "debates")
HALF_ONLY = "converged is for questions on ResNet-20 and MobileNetV2, as in questions --row length"
OWN: tuple[TableName, ...] = ("questions", "debates")
"""Tables of our own, whose rows share the runs of a network."""
TITLES = {
    "table1": "CIFAR-10",
    "table2": "ImageNet",
    "table3": "speech and text",
    "questions": "beyond the paper",
    "debates": "on which papers contradict one another",
}

COLUMNS: dict[str, str] = {
    "fp32": "FP32",
    "int4-fwd": "INT4 forward, FP32 backward",
    "ibm2020": "TPR FP4",
    "ibm2020-dw8": "dgrad FP4, wgrad FP8",
    "ibm2020-bottom1x1fp8": "TPR FP4, bottom 1x1 FP8",
    "ibm2020-1x1fp8": "TPR FP4, all 1x1 FP8",
}
"""Recipe of each column, and the column's title."""

SHORT = ("FP32", "INT4 fwd", "TPR FP4", "dx 4 dW 8", "bottom 1x1", "all 1x1")
"""The same, for narrow tables."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class TableRow:
    """One row.

    Args:
        table, name: where it stands, and what `--row` calls it.
        title: the paper's words.
        metric: what the numbers are.
        paper: {recipe of the column: the paper's number}; {} for a row of our own.
        bold: the recipe whose number the paper prints in bold.
        columns: recipes that run.
        scales: {scale: fields of `fourbit.train.Settings`}.
        missing: why a scale is missing.
        higher_is_better: otherwise lower is.
        rates: learning rates to run every column with, instead of the one of `scales`.
        lengths: {scale: numbers of epochs to run every column for}, instead of the one of `scales`; the schedule fits each.
        pairs: recipes whose difference answers the row's question; every column is compared with FP32 anyway.
        network: of a table of our own, the name of the folder that shares the runs; "": the model's.
    """

    table: TableName
    name: str
    title: str
    metric: str
    paper: Mapping[str, float]
    bold: str
    columns: tuple[str, ...]
    scales: Mapping[str, Settings]
    missing: str = ""
    higher_is_better: bool = True
    rates: tuple[float, ...] = ()
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    network: str = ""

    def settings(self, scale: str) -> dict[str, Any]:
        """Fields of `fourbit.train.Settings`.

        Raises:
            UserError: an unknown scale, or one that is missing.
        """
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
        if scale not in self.scales:
            why = HALF_ONLY if scale == "converged" else self.missing
            raise UserError(f"{self.name} of {self.table} cannot run at the scale {scale}: {why}.")
        return dict(self.scales[scale])

    def variations(self, scale: str) -> list[Settings]:
        """Settings of each comparison that the row consists of, over those of `settings`: one of `rates`, one of `lengths`, or
        none."""
        if self.rates:
            return [{"lr": rate} for rate in self.rates]
        return [{"epochs": epochs} for epochs in self.lengths.get(scale, ())] or [{}]


def said_of(settings: Settings, seeds: Sequence[int]) -> str:
    """What is trained, in a few words.

    >>> said_of({"model": "digits_cnn", "data": "digits", "epochs": 4}, (0, 1))
    'digits_cnn on digits, 4 epochs, seeds 0, 1'
    """
    epochs, steps = settings["epochs"], settings.get("max_steps")
    length = f"{epochs} epoch{'s' if epochs != 1 else ''}" + (f", at most {steps} steps" if steps else "")
    numbers = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    return f"{settings['model']} on {settings['data']}, {length}, {numbers}"
