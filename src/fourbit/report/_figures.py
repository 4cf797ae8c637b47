"""The figures of a page, in the order in which a reader needs them, arranged in sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fourbit.report._curves import curves_beside_reference, final_result, training_curves
from fourbit.report._groups import Group, metrics
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
    """Every figure that the runs have data for; those of results once for each metric."""
    judged = metrics(groups)
    names = ", ".join(map(name, judged))
    underflow, saturation, sqnr = STATISTICS
    no_layers = "No run has observations of quantized layers (full precision has none)."
    return [
        _section(
            "metric",
            names[:1].upper() + names[1:],
            [final_result(groups, m) for m in judged],
            "No run has been evaluated yet.",
        ),
        _section(
            "curves",
            "Training curves",
            [draw(groups, m) for m in judged for draw in (training_curves, curves_beside_reference)],
            "No run has logged a step yet.",
        ),
        _section("gradscale", "Gradient scales", [grad_scales(groups)], "No run has a recipe with GradScale."),
        _section(
            "loss",
            "Underflow and saturation",
            [slot_map(groups, underflow), slot_map(groups, saturation), slot_lines(groups)],
            no_layers,
        ),
        _section(
            "gradients",
            "Gradients on the 4-bit grid",
            [gradient_histograms(group, i) for i, group in enumerate(groups)],
            "No run has recorded histograms of gradients.",
        ),
        _section("alpha", "Clip values of activations", [clip_values(groups)], "No run has a learned clip value."),
        _section("sqnr", "Quantization noise", [slot_map(groups, sqnr)], no_layers),
    ]


def _section(id: str, title: str, plots: Sequence[Plot | None], nothing: str) -> Section:
    return Section(id, title, tuple(p for p in plots if p is not None), nothing)
