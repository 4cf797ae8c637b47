"""Pages of claims, and the index of them, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks._harness import markdown
from benchmarks.claims._claim import Claim, Group, Part, Table, Verdict, together
from fourbit.reproduce._statistics import detectable

MARKS = {Verdict.HOLDS: "**Holds.**", Verdict.FAILS: "**Does not hold.**", Verdict.OPEN: "**Cannot tell.**"}
SPELLED = {
    "fp16": "FP16",
    "fp4": "FP4",
    "fp8": "FP8",
    "gradscale": "GradScale",
    "int4": "INT4",
    "luq": "LUQ",
    "mobilenet": "MobileNet",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "resnet20": "ResNet-20",
    "vgg16": "VGG16",
}
"""Words of the names of pages, as they are written."""
TERMS = (
    "Words: [the three products of a layer, fprop, dgrad and wgrad](../../concepts/products.md); "
    "[scales](../../concepts/scales.md); [radix-4 FP4 and two phases](../../concepts/phases.md); "
    "[recipes](../../concepts/recipes.md). [How verdicts are reached](../README.md#how-a-verdict-is-reached)."
)


def page(claim: Claim, stands: dict[str, bool]) -> str:
    """The page of a claim; `stands` says which verdicts stay when all are looked at together."""
    parts = [
        "<!-- Written by `python -m benchmarks.claims`: change benchmarks/claims, not this file. -->",
        f"# {claim.title.rstrip('.')}",
        f"{MARKS[claim.verdict]} {_decided(claim)}",
        claim.asked,
        TERMS,
        f"![{_alt(claim)}]({_picture(claim)})",
    ]
    parts += ["## What was measured"]
    if claim.runs:
        parts.append(_legend(claim))
    if _compares(claim):
        parts.append(_comparisons(claim))
    for runs, recipes in claim.runs:
        parts += [_table(runs.table(recipes))]
    parts += [_table(table) for table in claim.tables]
    if claim.why:
        parts += ["## Why", *claim.why]
    parts += ["## What it cannot tell", "\n".join(f"- {limit}" for limit in _limits(claim, stands))]
    parts += ["## How it was measured"]
    parts += [f"{runs.label}: {runs.trained}. {runs.commits}" for runs, _ in claim.runs]
    parts += claim.method
    commands = [*dict.fromkeys(runs.command for runs, _ in claim.runs), *claim.commands]
    parts += ["To repeat it:", "\n".join(f"    {command}" for command in commands)]
    return "\n\n".join(parts) + "\n"


def index(claims: Sequence[Claim], group: Group) -> str:
    """The table of a group."""
    stands = together(claims)
    rows = [
        [
            f"[{claim.title.rstrip('.')}](claims/{claim.name}.md)",
            f"**{claim.verdict}**" + ("" if stands.get(claim.name, True) or claim.verdict is Verdict.OPEN else "\\*"),
            _figure(claim.decides),
        ]
        for claim in claims
        if claim.group is group
    ]
    return markdown(["claim", "verdict", "the figure that decides it"], rows, 3)


def contents(claims: Sequence[Claim]) -> str:
    """The hidden list of the pages, for the site; in its margin they have short names."""
    names = [claim.name for group in Group for claim in claims if claim.group is group]
    lines = [f"{_short(name)} <claims/{name}>" for name in names]
    return "\n".join(["```{toctree}", ":hidden:", "", *lines, "```"])


def _short(name: str) -> str:
    words = [SPELLED.get(word, word) for word in name.split("-")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def summary(claims: Sequence[Claim]) -> str:
    """How many verdicts of each kind, and which stay when all are looked at together."""
    count = {verdict: sum(c.verdict is verdict for c in claims) for verdict in Verdict}
    stands = together(claims)
    decided = [c for c in claims if c.name in stands and c.verdict is not Verdict.OPEN]
    staying = sum(stands[c.name] for c in decided)
    return (
        f"{len(claims)} claims: {count[Verdict.HOLDS]} hold, {count[Verdict.FAILS]} do not, and of "
        f"{count[Verdict.OPEN]} we cannot tell. Differences between runs decide {len(decided)} of them. Looked at "
        f"together, with an error of 5 % for all (Holm's correction over {len(stands)} claims that have several seeds), "
        f"{staying} of these stay; the others are marked with \\* in the index."
    )


def _decided(claim: Claim) -> str:
    part = claim.decides
    words = f"{part.what[0].upper()}{part.what[1:]}: {part.said}."
    if part.bound and claim.verdict is not Verdict.OPEN:
        words += f" The claim needs {part.bound}."
    elif part.bound and not part.figure:
        words += f" The claim needs {part.bound}, and " + (
            "one seed has no interval." if part.low is None else "the interval reaches both sides of that."
        )
    return words


def _figure(part: Part) -> str:
    return f"{part.what}: {part.said}" + (f"; needed: {part.bound}" if part.bound else "")


def _alt(claim: Claim) -> str:
    if isinstance(claim.picture, tuple):
        return claim.picture[1]
    return claim.picture.title if claim.picture else "The differences with their intervals"


def _picture(claim: Claim) -> str:
    return f"../{claim.picture[0]}" if isinstance(claim.picture, tuple) else f"{claim.name}.png"


def _compares(claim: Claim) -> bool:
    return bool(claim.beside) or len(claim.parts) > 1 or any(part.paired is not None for part in claim.parts)


def _comparisons(claim: Claim) -> str:
    rows = []
    for part in (*claim.parts, *claim.beside):
        rows.append(
            [part.what, part.said, part.bound or "(shown beside)", str(part.verdict) if part.bound else _reading(part)]
        )
    return markdown(["what", "measured", "the claim needs", ""], rows, 4)


def _reading(part: Part) -> str:
    if part.low is None or part.high is None:
        return "one seed: not compared"
    if part.paired is None:
        return ""
    return "differs" if part.low > 0 or part.high < 0 else "cannot be told apart"


def _table(table: Table) -> str:
    head = f"**{table.title}**\n\n" if table.title else ""
    return head + markdown(table.head, table.rows, table.words)


def _legend(claim: Claim) -> str:
    from fourbit import recipes

    names = dict.fromkeys(recipe for _, shown in claim.runs for recipe in shown)
    return "\n".join(f"- `{name}`: {recipes.get(name).summary}" for name in names)


def _limits(claim: Claim, stands: dict[str, bool]) -> list[str]:
    limits = list(claim.limits)
    limits += _power(claim)
    if any(part.paired is not None and part.paired.half is None for part in claim.parts):
        limits.append("One seed: how far seeds scatter is not known, so no difference of the table is a finding.")
    elif any(len(runs.columns[r].values) == 1 for runs, shown in claim.runs for r in shown):
        limits.append("Recipes with one seed stand in the table and are not compared.")
    if claim.name in stands and claim.verdict is not Verdict.OPEN:
        stays = "stays" if stands[claim.name] else "does not stay"
        limits.append(
            f"Looked at together with all claims of the [index](../README.md), this verdict {stays} (Holm's correction)."
        )
    return limits


def _power(claim: Claim) -> list[str]:
    """What so many seeds could have seen, by the median scatter of the comparisons of the page with as many."""
    first = claim.parts[0].paired
    if first is None or not first.error:
        return []
    unit = claim.parts[0].unit
    errors = [
        p.paired.error for p in (*claim.parts, *claim.beside) if p.unit == unit and p.paired and p.paired.n == first.n
    ]
    known = [error for error in errors if error]
    seen = detectable(statistics.median(known), first.n)
    return [
        f"By the scatter of these comparisons, {first.n} seeds see a true difference of about "
        f"{seen:.2g}{f' {unit}' if unit else ''} four "
        "times in five. Smaller ones are missed more often."
    ]
