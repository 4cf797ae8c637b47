"""The figures of a page, in the order in which a reader needs them, arranged in sections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fourbit.report._curves import curves_beside_reference, final_result, training_curves
from fourbit.report._groups import Group, metrics, networks, title
from fourbit.report._histograms import gradient_histograms
from fourbit.report._layers import STATISTICS, clip_values, grad_scales, slot_lines, slot_map
from fourbit.report._metric import name
from fourbit.report._style import Plot


@dataclass(frozen=True)
class Section:
    """A heading of the page with its figures; `nothing` is said instead when there is no figure."""

    id: str
    title: str
    plots: tuple[Plot, ...]
    nothing: str


def sections(groups: Sequence[Group]) -> list[Section]:
    """Every figure that the runs have data for: those of each network and metric apart."""
    parts = networks(groups)
    judged = [(part, m) for part in parts for m in metrics(part)]
    names = ", ".join(map(name, metrics(groups)))
    underflow, saturation, sqnr = STATISTICS
    no_layers = "No run has observations of quantized layers (full precision has none)."

    def section(id: str, title: str, plots: Sequence[tuple[Sequence[Group], Plot | None]], nothing: str) -> Section:
        of = _with_network if len(parts) > 1 else lambda plot, part: plot
        return Section(id, title, tuple(of(plot, part) for part, plot in plots if plot is not None), nothing)

    found = [
        section(
            "metric",
            names[:1].upper() + names[1:],
            [(part, final_result(part, m)) for part, m in judged],
            "No run has been evaluated yet.",
        ),
        section(
            "curves",
            "Training curves",
            [(part, draw(part, m)) for part, m in judged for draw in (training_curves, curves_beside_reference)],
            "No run has logged a step yet.",
        ),
        section(
            "gradscale",
            "Gradient scales",
            [(part, grad_scales(part)) for part in parts],
            "No run has recorded scales of GradScale.",
        ),
        section(
            "loss",
            "Underflow and saturation",
            [
                (part, plot)
                for part in parts
                for plot in (slot_map(part, underflow), slot_map(part, saturation), slot_lines(part))
            ],
            no_layers,
        ),
        section(
            "gradients",
            "Gradients on the 4-bit grid",
            [([group], gradient_histograms(group, i)) for i, group in enumerate(groups)],
            "No run has recorded histograms of gradients.",
        ),
        section(
            "alpha",
            "Clip values of activations",
            [(part, clip_values(part)) for part in parts],
            "No run has recorded learned clip values.",
        ),
        section("sqnr", "Quantization noise", [(part, slot_map(part, sqnr)) for part in parts], no_layers),
    ]
    return [replace(s, plots=tuple(_numbered(s.plots))) for s in found]


def _with_network(plot: Plot, part: Sequence[Group]) -> Plot:
    """The figure with its network in its title."""
    said = f"{title(part)}: {plot.title[:1].lower()}{plot.title[1:]}"
    plot.figure.suptitle(said, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return replace(plot, title=said)


def _numbered(plots: Sequence[Plot]) -> Iterator[Plot]:
    """From the second figure of a name on, the name gets a number."""
    counts: Counter[str] = Counter()
    for plot in plots:
        counts[plot.name] += 1
        yield replace(plot, name=f"{plot.name}-{counts[plot.name]}") if counts[plot.name] > 1 else plot
