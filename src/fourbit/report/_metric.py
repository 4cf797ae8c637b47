"""The number by which runs are judged, known by its title as the trainer writes it: "accuracy %", "perplexity".

Values are those that are shown: 84.45 where the title ends in %. Numbers of different metrics are never averaged or compared.
"""

from __future__ import annotations

ACCURACY = "accuracy %"
"""The metric of runs that do not name theirs: older ones."""

LOWER_IS_BETTER = ("perplexity", "word error rate %")


def name(metric: str) -> str:
    """The title without its unit.

    >>> name("word error rate %"), name("BLEU")
    ('word error rate', 'BLEU')
    """
    return metric.removesuffix("%").rstrip()


def unit(metric: str) -> str:
    """What stands behind a value: " %", or nothing."""
    return " %" if metric.endswith("%") else ""


def heading(metric: str) -> str:
    """The metric above a column and beside an axis.

    >>> heading("accuracy %"), heading("perplexity")
    ('test accuracy (%)', 'test perplexity')
    """
    return f"test {name(metric)}{' (%)' if unit(metric) else ''}"


def sign(metric: str) -> int:
    """1 where higher is better, -1 where lower is: what values are multiplied with to be ranked."""
    return -1 if metric in LOWER_IS_BETTER else 1


def decimal(value: float, places: int = 2, *, signed: bool = False) -> str:
    """A value to so many decimals, as published tables have it; the perplexity of a run that collapsed in powers of ten.

    >>> decimal(92.714), decimal(-0.271, signed=True), decimal(4.85e8)
    ('92.71', '−0.27', '4.85e+08')
    """
    number = f"{value:{'+' if signed else ''}.{places}{'f' if abs(value) < 1e6 else 'e'}}"
    return number.replace("-", "\N{MINUS SIGN}")
