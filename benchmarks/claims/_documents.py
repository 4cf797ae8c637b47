"""Regions of README.md and of the pages in docs whose numbers come from kept runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import _regions
from benchmarks._harness import ROOT, markdown
from benchmarks.claims._claim import Claim, Group, Verdict, together
from benchmarks.claims._page import contents, index, summary
from benchmarks.claims._read import RESULTS, Runs, digits, final, reproduced
from benchmarks.claims.hardware import energy_table
from benchmarks.claims.speed import EMULATORS, range_of_ratios, saved_memory
from fourbit.reproduce import rows_of
from fourbit.reproduce._row import TABLES
from fourbit.reproduce._statistics import sentence

COLUMNS = ("fp32", "int4-fwd", "ibm2020", "ibm2020-dw8", "ibm2020-luq", "fourbit")
FOLDER = RESULTS / "claims"


def documents() -> list[Path]:
    """README.md and the pages of docs that have regions of this package; those of the claims are written whole."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        path
        for path in found
        if FOLDER not in path.parents and "_build" not in path.parts and "_generated" not in path.parts
    ]


def filled(path: Path, claims: Sequence[Claim]) -> str:
    """A document as its regions should be."""
    text = path.read_text()
    shown = {}
    for name in _regions.names(text):
        if name in REGIONS:
            shown[name] = REGIONS[name]()
        elif name == "claims-summary":
            shown[name] = summary(claims)
        elif name == "claims-headline":
            shown[name] = headline(claims)
        elif name == "claims-contents":
            shown[name] = contents(claims)
        elif name.startswith("claims-"):
            shown[name] = index(claims, Group[name.removeprefix("claims-").upper()])
        elif name in CITED:
            by_name = {claim.name: claim for claim in claims}
            stands = together(claims)
            shown[name] = "\n".join(_line(path, by_name[cited], stands) for cited in CITED[name])
    return _regions.fill(text, shown)


def headline(claims: Sequence[Claim]) -> str:
    """The main findings in plain sentences, each of which stands only while the verdicts of its claims are what it says."""
    verdicts = {claim.name: claim.verdict for claim in claims}
    return " ".join(
        text for text, needs in HEADLINES if all(verdicts[name] is verdict for name, verdict in needs.items())
    )


def _line(path: Path, claim: Claim, stands: dict[str, bool]) -> str:
    """One claim with its verdict, as other pages cite it."""
    alone = claim.verdict is not Verdict.OPEN and not stands.get(claim.name, True)
    to = os.path.relpath(FOLDER / f"{claim.name}.md", path.parent)
    return (
        f"- [{claim.title.rstrip('.')}]({to}): **{claim.verdict}**{', looked at alone' * alone}; {claim.decides.said}."
    )


def _results() -> str:
    rows: list[tuple[str, Runs | dict[str, float]]] = [
        ("digits, small network, 40 epochs, accuracy %", digits(40)),
        ("the same, 8 epochs", digits(8)),
        ("CIFAR-10, ResNet-20, 30 epochs, accuracy %", _thirty()),
        ("the same, 10 epochs", reproduced("table1", "resnet20", "")),
        ("the same, 3 epochs", reproduced("questions", "luq", "")),
        ("CIFAR-10, VGG16, 3 epochs, accuracy %", reproduced("table1", "vgg16", "")),
        ("CIFAR-10, MobileNetV2, 2 epochs, accuracy %", reproduced("table1", "mobilenet_v2", "")),
        ("Penn Treebank, 2-layer LSTM, perplexity", reproduced("table3", "ptb", "")),
        ("Multi30k, small Transformer, BLEU", reproduced("table3", "wmt", "")),
        ("spoken digits, 4-layer biLSTM, word error rate %", reproduced("table3", "swb300", "")),
        ("Shakespeare, small language model, perplexity", reproduced("debates", "families", "")),
    ]
    table = []
    for title, runs in rows:
        cells = []
        for recipe in COLUMNS:
            if isinstance(runs, dict):
                cells.append(f"{runs[recipe]:.1f} (1)" if recipe in runs else "")
                continue
            column = runs.columns.get(recipe)
            cells.append(f"{column.mean:.1f} ({len(column.values)})" if column and column.mean is not None else "")
        table.append([title, *cells])
    head = [
        "mean (seeds)",
        "FP32",
        "INT4 forward",
        "TPR FP4 (`ibm2020`)",
        "dgrad FP4, wgrad FP8",
        "LUQ's gradients",
        "`fourbit`",
    ]
    return markdown(head, table)


def _thirty() -> dict[str, float]:
    return {r: final(f"cifar10-resnet20-30epochs/runs/{r}-seed0")["test_metric"] for r in ("fp32", "ibm2020")}


def _findings() -> str:
    """The main findings, each in a sentence with its interval."""
    said = []
    for where, runs, recipe, other, higher in (
        ("Digits, trained to the end (40 epochs)", digits(40), "ibm2020", "fp32", True),
        ("Digits, 8 epochs", digits(8), "ibm2020", "fp32", True),
        ("ResNet-20 on CIFAR-10, 10 epochs", reproduced("table1", "resnet20", ""), "ibm2020", "fp32", True),
        ("ResNet-20 on CIFAR-10, 3 epochs", reproduced("questions", "luq", ""), "ibm2020-luq", "ibm2020", True),
        ("A small language model", reproduced("debates", "families", ""), "ibm2020", "mxfp4-ceil-sr-g", False),
    ):
        names = {
            "fp32": "FP32",
            "ibm2020": "the paper's recipe",
            "ibm2020-luq": "the recipe with LUQ's gradients",
            "mxfp4-ceil-sr-g": "MXFP4",
        }
        found = runs.gap(recipe, other)
        if found is not None:
            said.append(f"- {where}: {sentence(names[recipe], names[other], found, runs.unit, higher)}")
    return "\n".join(said)


def _step_range() -> str:
    (least, fastest), (most, slowest) = range_of_ratios(("ours ibm2020",))
    (low, _), (high, _) = range_of_ratios(EMULATORS)
    return (
        f"from {least:.2f} ({fastest}) to {most:.2f} ({slowest}) of FP32's time on a 2-core EPYC, where emulators take "
        f"{low:.1f} to {high:.1f} times as long"
    )


def _not_run() -> str:
    """Rows without a kept table, by the table that they belong to."""
    said = []
    for table in TABLES:
        missing = [name for name in rows_of(table) if not any((RESULTS / "reproduce").glob(f"{table}-{name}-*"))]
        if missing:
            said.append(f"- `{table}`: {', '.join(f'`{name}`' for name in missing)}")
    return "\n".join(said)


def _saved_share() -> str:
    parts = sorted(saved_memory().parts, key=lambda part: part.value)
    least, most = (f"{part.value:.2f} ({re.split('[ ,]', part.what)[0]})" for part in (parts[0], parts[-1]))
    return f"from {least} to {most}"


def _accuracy_energy() -> str:
    table = energy_table()
    return markdown(table.head, table.rows, table.words)


REGIONS: dict[str, Callable[[], str]] = {
    "results": _results,
    "findings": _findings,
    "step-range": _step_range,
    "saved-share": _saved_share,
    "accuracy-energy": _accuracy_energy,
    "not-run": _not_run,
}
"""By name; besides, `claims-GROUP` is an index, `claims-summary` counts the verdicts, and `claims-contents` lists the pages."""

HEADLINES: tuple[tuple[str, dict[str, Verdict]], ...] = (
    (
        "Trained to the end on a small task, the paper's 4-bit training is less than a point behind FP32.",
        {"digits-to-the-end": Verdict.HOLDS},
    ),
    (
        "After a short training it is further behind, on ResNet-20 as on digits.",
        {"resnet20": Verdict.FAILS, "digits-early": Verdict.FAILS},
    ),
    ("On digits that gap closes when training goes on.", {"gap-closes": Verdict.HOLDS}),
    (
        "What the paper's rounding takes away is the length of the gradient, layer by layer. Recipes with as many bits that "
        "keep the length train better.",
        {"gradients-shrink": Verdict.HOLDS, "correction": Verdict.HOLDS, "luq-gradients": Verdict.HOLDS},
    ),
    ("A small language model is better off with block scales.", {"radix-4-or-blocks": Verdict.HOLDS}),
)
"""Sentences, and the verdicts that each needs."""

CITED: dict[str, tuple[str, ...]] = {
    "what-is-behind": ("gradients-shrink", "correction", "luq-gradients", "gap-closes"),
    "about-fourbit": ("fourbit-recipe", "fourbit-or-luq"),
    "about-energy": ("accuracy-and-energy",),
    "about-phases": ("two-phases", "phase-order", "a-fifth-bit", "stochastic-rounding", "luq-gradients"),
}
"""Regions that cite claims with their verdicts, a line each."""
