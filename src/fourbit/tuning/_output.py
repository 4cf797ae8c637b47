"""What is left of tuning for people: a recipe file with reasons, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from fourbit.recipes import GEMMS, Recipe, recipe_text
from fourbit.report import DPI, PALETTE, REFERENCE_COLOR, panels, style
from fourbit.report._style import short
from fourbit.train._folder import replace_file
from fourbit.tuning._candidates import Candidate, Candidates
from fourbit.tuning._choose import Step

SHOWN = 30
"""Layers at most in the picture: those with the greatest gain."""


def recipe_file(recipe: Recipe, comments: Sequence[Sequence[str]]) -> str:
    """The recipe as TOML, with lines of comments before each of its first rules."""
    head, *rules = recipe_text(recipe).split("\n[[rules]]\n")
    parts = [head]
    for number, rule in enumerate(rules):
        reasons = comments[number] if number < len(comments) else ()
        parts.append("".join(f"\n# {line}" for line in reasons) + f"\n[[rules]]\n{rule}")
    return "".join(parts)


def write_picture(
    path: Path,
    steps: Sequence[Step],
    single: Sequence[tuple[Candidate, float]],
    base: float,
    candidates: Candidates,
) -> None:
    """Left: how far the objective falls with the share of multiply-accumulates in 8 bits; right: what each GEMM would gain by
    itself, those chosen in full colour."""
    from matplotlib.ticker import PercentFormatter

    chosen = {step.candidate for step in steps}
    gains = {c: base - error for c, error in single} if single else {s.candidate: s.gain for s in steps}
    layers = list(dict.fromkeys(c.layer for c in sorted(gains, key=lambda c: -gains[c])))[:SHOWN]
    layers = [layer for layer in dict.fromkeys(c.layer for c in candidates.all) if layer in layers]
    with style():
        figure, (left, right) = panels(
            2, "Products in 8 bits", columns=2, height=max(2.5, 0.22 * len(layers)), sharey=False
        )
        taken: list[Candidate] = []
        shares, values = [0.0], [steps[0].before if steps else base]
        for step in steps:
            taken.append(step.candidate)
            shares.append(candidates.share(taken))
            values.append(step.after)
        left.step(shares, values, where="post", color=REFERENCE_COLOR)
        left.plot(shares, values, "o", color=REFERENCE_COLOR, markersize=3)
        left.xaxis.set_major_formatter(PercentFormatter(1.0))
        left.set_xlabel("share of multiply-accumulates")
        left.set_ylabel("gradient error" if single else "test loss")
        for offset, (gemm, color) in enumerate(zip(GEMMS, PALETTE, strict=False)):
            for place, layer in enumerate(layers):
                c = Candidate(layer, gemm)
                if c in gains:
                    right.barh(
                        place + 0.27 * (offset - 1), gains[c], 0.25, color=color, alpha=1.0 if c in chosen else 0.3
                    )
            right.barh([0], [0], color=color, label=gemm)
        right.set_yticks(range(len(layers)), [short(layer, 24) for layer in layers], fontsize=6)
        right.invert_yaxis()
        right.set_xlabel("gain by itself (pale: not chosen)")
        right.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    replace_file(path, buffer.getvalue())
