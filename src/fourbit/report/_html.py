"""The page: tables, figures and captions in one HTML file that needs nothing else, not even a network.

Figures are embedded as PNG and also written next to the page, to be put in a paper or a chat. Every string that came
from a file is escaped by the template engine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import jinja2

from fourbit._files import problem, replace_file, require_inside
from fourbit.errors import UserError
from fourbit.report import _tables as tables
from fourbit.report._diagnose import diagnosed_groups
from fourbit.report._figures import Section, sections
from fourbit.report._groups import Group, group_runs, listing, metrics, title
from fourbit.report._metric import name, sign, unit
from fourbit.report._read import load_runs, text
from fourbit.report._stats import RecipeSummary, summarize_group
from fourbit.report._style import DPI, Plot, looks, style


@dataclass(frozen=True)
class Picture:
    """A rendered figure as the template needs it."""

    plot: Plot
    png: bytes
    kind: ClassVar[str] = "picture"

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


MARK = "fourbit report"
"""Every page contains it."""


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page about all runs at or below `paths`, and each figure as PNG beside it.

    Args:
        paths: run folders, or folders that contain run folders.
        out: the folder to write into (`index.html` and `figures/`), or the name of the page if it ends in `.html` (`X.html`
            and `X_figures/`); default: `report` in the first path.

    Returns:
        The path of the page (`index.html` in the folder, unless named).

    Raises:
        UserError: no run folder at `paths`, a file there that no trainer wrote, `out` cannot be written,
            or there is a page there that is not a report.
    """
    paths = [Path(p) for p in paths]
    groups = group_runs(load_runs(paths))
    if out is None:
        out = paths[0] / "report"
        require_inside(paths[0], [out, *out.glob("*")])
    out = Path(out)
    page = page_of(out)
    try:
        folder = page.parent / ("figures" if page is not out else f"{page.stem}_figures")
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{page} exists and is not a report of fourbit: choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        with style():
            chapters = [(s, [render(p, folder) for p in s.plots]) for s in sections(groups)]
        replace_file(page, _page(groups, chapters).encode())
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {problem(error, page)}.") from error
    return page


def render(plot: Plot, folder: Path) -> Picture:
    """As PNG, which is also written into the folder.

    Raises:
        UserError: it would be written through a link to elsewhere.
    """
    require_inside(folder.parent, [folder, folder / f"{plot.name}.png"])
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png", dpi=DPI)
    replace_file(folder / f"{plot.name}.png", buffer.getvalue())
    return Picture(plot, buffer.getvalue())


def environment() -> jinja2.Environment:
    """Of all templates: what comes from files is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fourbit.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page_of(out: Path) -> Path:
    """The page that `out`, X.html or a folder, stands for.

    Raises:
        UserError: the name of another kind of file.
    """
    if out.suffix.lower() in (".pdf", ".htm", ".md", ".png", ".svg", ".txt", ".json") and not out.is_dir():
        raise UserError(
            f"a report is a page of HTML, not {out.suffix}: give --out a folder, or a name that ends in .html."
        )
    return out if out.suffix == ".html" else out / "index.html"


def _page(groups: Sequence[Group], chapters: Sequence[tuple[Section, list[Picture]]]) -> str:
    runs = [r for g in groups for r in g.runs]
    summaries = [summarize_group(g, groups) for g in groups]
    names, rows = tables.differing_settings(groups)
    return (
        environment()
        .get_template("template.html.j2")
        .render(
            title=title(groups),
            summary=summary_sentences(groups, summaries),
            diagnoses=[(f"{d.run.recipe}, seed {d.run.seed}", f) for d in diagnosed_groups(groups) for f in d.findings],
            notes=[note for r in runs for note in r.notes],
            results=tables.result_tables(summaries),
            has_percent=any(unit(m) for m in metrics(groups)),
            has_bits=any(s.bits_per_byte is not None for s in summaries),
            looks=looks(groups),
            chapters=chapters,
            samples=[(g.label, sample) for g in groups if (sample := _sample(g))],
            examples=[(g.label, table) for g in groups if (table := _examples(g))],
            words=tables.WORDS,
            shared=tables.shared_settings(groups),
            differing_names=names,
            differing_rows=rows,
            environment=tables.environment(runs),
            runs=tables.run_tables(groups),
            num_runs=len(runs),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def _sample(group: Group) -> tuple[str, str] | None:
    """Of the lowest seed that has one."""
    return next((r.sample for r in group.runs if r.sample), None)


def _examples(group: Group) -> Sequence[Sequence[str]]:
    """Of the lowest seed that has some."""
    return next((r.examples for r in group.runs if r.examples), ())


def summary_sentences(groups: Sequence[Group], summaries: Sequence[RecipeSummary]) -> str:
    """One short paragraph: what was trained, with which recipes and seeds, and what came out."""
    runs = [r for g in groups for r in g.runs]
    seeds = sorted({r.seed for r in runs}, key=lambda s: (len(s), s))
    recipes = list(dict.fromkeys(g.recipe for g in groups))
    parts = [
        f"{title(groups)}: {_count(len(runs), 'run')}"
        + _length(groups)
        + f" with {_count(len(recipes), 'recipe')} ({listing(recipes, 12)}), "
        + f"seed{'s' if len(seeds) != 1 else ''} {listing(seeds, 10)}."
    ]
    for metric in metrics(groups):
        parts.extend(_result(metric, [(g, s) for g, s in zip(groups, summaries, strict=True) if g.metric == metric]))
    for status, words in (
        ("diverged", "diverged (loss is not finite)"),
        ("unfinished", "not finished: the numbers are those so far"),
        ("interrupted", "interrupted"),
    ):
        count = sum(r.status == status for r in runs)
        if count:
            parts.append(f"{_count(count, 'run')} {words}.")
    return " ".join(parts)


def _length(groups: Sequence[Group]) -> str:
    """How long the runs were to be: steps where --max-steps cut the epochs short."""
    lengths: dict[str, None] = {}
    for group in groups:
        given = [(name, w) for name, w in (("max_steps", "step"), ("epochs", "epoch")) if group.config.get(name)]
        if given:
            name, word = given[0]
            count = text(group.config[name])
            lengths[f"{count} {word}{'' if count == '1' else 's'}"] = None
    return f" of {'different lengths: ' if len(lengths) > 1 else ''}{' or '.join(lengths)}" if lengths else ""


def _result(metric: str, results: Sequence[tuple[Group, RecipeSummary]]) -> list[str]:
    """The outcome in a sentence or two: full precision, the closest recipe to it, and the furthest."""
    measured = [(g, s) for g, s in results if s.metric_mean is not None]
    if not measured:
        return [f"No test {name(metric)} has been measured yet."]
    said = [f"{s.label} reached a test {name(metric)} of {_reached(s)}." for g, s in measured if g.is_reference][:3]
    better = sign(metric)
    compared = sorted((s for _, s in measured if s.diff_mean is not None), key=lambda s: -better * (s.diff_mean or 0.0))
    if compared:
        best, worst = compared[0], compared[-1]
        contrast = f"; worst: {_against(worst)}" if worst is not best else ""
        said.append(f"Best against full precision: {_against(best)}{contrast}.")
    elif len(said) < len(measured):
        best = max((s for _, s in measured), key=lambda s: better * (s.metric_mean or 0.0))
        extreme = ("highest " if better > 0 else "lowest ") if len(measured) > 1 else ""
        said.append(f"The {extreme}{name(metric)} is {_reached(best)} ({best.label}).")
    return said


def _against(summary: RecipeSummary) -> str:
    difference = tables.measured(summary.diff_mean, summary.diff_half, signed=True)
    return f"{summary.label} with {_reached(summary)} ({difference}{' points' if unit(summary.metric) else ''})"


def _reached(summary: RecipeSummary) -> str:
    return tables.measured(summary.metric_mean, summary.metric_std) + unit(summary.metric)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
