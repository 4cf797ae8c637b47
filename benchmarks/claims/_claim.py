"""What a claim is, and the rule by which its verdict follows from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from fourbit.reproduce._statistics import ERROR, Paired, holm

if TYPE_CHECKING:
    from benchmarks.claims._read import Runs


class Verdict(StrEnum):
    """What the numbers say about a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "cannot tell"


class Group(StrEnum):
    """The parts of the index, in their order."""

    PAPER = "The paper's tables"
    QUESTIONS = "The open questions of its reviewers"
    FIGURES = "The paper's figures and arguments"
    DEBATES = "Where later papers contradict one another"
    HARDWARE = "Hardware"
    SPEED = "Speed and memory"
    CONFORMANCE = "Conformance of other libraries"


def judge(low: float | None, high: float | None, least: float | None, most: float | None) -> Verdict:
    """A claim says that a quantity lies above `least` and below `most`; its interval goes from `low` to `high`.

    It holds if the whole interval lies there, it does not hold if the whole interval lies elsewhere, and otherwise, or where
    there is no interval (one seed), the numbers cannot tell.

    >>> judge(0.6, 1.8, 0.0, None), judge(-5.6, -3.8, -1.0, None), judge(-1.8, 0.4, -1.0, None), judge(None, None, 0.0, None)
    (<Verdict.HOLDS: 'holds'>, <Verdict.FAILS: 'does not hold'>, <Verdict.OPEN: 'cannot tell'>, <Verdict.OPEN: 'cannot tell'>)
    """
    if low is None or high is None:
        return Verdict.OPEN
    if (least is None or low > least) and (most is None or high < most):
        return Verdict.HOLDS
    if (least is not None and high < least) or (most is not None and low > most):
        return Verdict.FAILS
    return Verdict.OPEN


@dataclass(frozen=True)
class Part:
    """A quantity with its interval, and the bounds that a claim sets it.

    Args:
        what: the quantity in words.
        value, low, high: of it; no interval: None.
        unit: "" of counts.
        basis: what the interval is of, as in "3 seeds".
        least, most: the claim says that it is above and below; both None: it is shown beside, and decides nothing.
        paired: of differences between seeds, for the tests of several together.
        figure: the number in words, where it is not `value` with its interval.
        counted: it is a count of those for which something is so, and the claim needs all.
    """

    what: str
    value: float
    low: float | None
    high: float | None
    unit: str
    basis: str
    least: float | None = None
    most: float | None = None
    paired: Paired | None = None
    figure: str = ""
    counted: bool = False

    @property
    def verdict(self) -> Verdict:
        """By `judge`."""
        return judge(self.low, self.high, self.least, self.most)

    @property
    def said(self) -> str:
        """The number with its interval and what that is of."""
        if self.figure:
            return self.figure
        unit = f" {self.unit}" if self.unit else ""
        if self.paired is not None:
            half = "" if self.paired.half is None else f" ±{self.paired.half:.2f}"
            return f"{self.value:+.2f}{half}{unit} ({self.basis})"
        between = (
            ""
            if self.low is None or self.high is None or self.low == self.high
            else f", {self.low:.2f} to {self.high:.2f}"
        )
        return f"{self.value:.2f}{unit} ({self.basis}{between})"

    @property
    def bound(self) -> str:
        """What the claim needs, in words; "" where there is none."""
        if self.counted:
            return "all of them"
        sign = "+" if self.paired is not None else ""
        words = []
        if self.least is not None:
            words.append(f"more than {self.least:{sign if self.least else ''}g}")
        if self.most is not None:
            words.append(f"less than {self.most:{sign if self.most else ''}g}")
        return " and ".join(words)

    @property
    def p(self) -> float | None:
        """Of the test against the bound, two-sided: of a difference as far from it by chance alone; None without seeds."""
        if self.paired is None or self.paired.half is None:
            return None
        bounds = [b for b in (self.least, self.most) if b is not None]
        found = [replace(self.paired, mean=self.paired.mean - bound).p for bound in bounds or [0.0]]
        return max(p for p in found if p is not None)


def seeds(what: str, found: Paired, unit: str, least: float | None = None, most: float | None = None) -> Part:
    """A mean difference between runs of the same seeds, with its 95 % interval by Student's t."""
    half = found.half
    low, high = (None, None) if half is None else (found.mean - half, found.mean + half)
    basis = "one seed" if found.n == 1 else f"{found.n} seeds"
    return Part(what, found.mean, low, high, unit, basis, least, most, found)


def every(what: str, flags: Sequence[bool], noun: str) -> Part:
    """The claim says that something is so in every one; what was counted has no scatter, so one exception refutes it."""
    k = sum(flags)
    return Part(what, k, k, k, "", "", least=len(flags) - 0.5, figure=f"{k} of {len(flags)} {noun}", counted=True)


@dataclass(frozen=True)
class Table:
    """Rows of cells under a heading; the first `words` columns are text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True)
class Lines:
    """A picture of curves: {name: values} over the places of `ticks`."""

    title: str
    ticks: tuple[str, ...]
    curves: dict[str, tuple[float, ...]]
    axis: str


@dataclass(frozen=True)
class Claim:
    """A claim, and everything that its page says.

    Args:
        title: the claim, as a sentence.
        parts: what decides it: it holds if all of them do.
        asked: whose claim it is, and what its words mean.
        beside: other comparisons, which are shown and decide nothing.
        runs: the runs that are shown, with their recipes.
        tables: other tables.
        picture: (path from docs/results, words) of one that exists; curves to draw; None: the parts are drawn.
        why: the reason, as far as it is known.
        method: how it was measured, beyond what the runs' folders say.
        limits: what it cannot tell.
        commands: that repeat it, beside those of `runs`.
    """

    title: str
    parts: tuple[Part, ...]
    asked: str
    limits: tuple[str, ...]
    beside: tuple[Part, ...] = ()
    runs: tuple[tuple[Runs, tuple[str, ...]], ...] = ()
    tables: tuple[Table, ...] = ()
    picture: tuple[str, str] | Lines | None = None
    why: tuple[str, ...] = ()
    method: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    name: str = ""
    group: Group = Group.PAPER

    @property
    def verdict(self) -> Verdict:
        """Holds if every part does. Does not hold if one does not, where with several seeds' tests that one has to
        stand when their number is taken into account (Holm)."""
        verdicts = [part.verdict for part in self.parts]
        if all(v is Verdict.HOLDS for v in verdicts):
            return Verdict.HOLDS
        return Verdict.FAILS if self._refuted else Verdict.OPEN

    @property
    def decides(self) -> Part:
        """The part whose figure the index shows: the first that refutes the claim, or leaves it open, or is there."""
        if self.verdict is Verdict.FAILS:
            return self._refuted[0]
        return next((part for part in self.parts if part.verdict is not Verdict.HOLDS), self.parts[0])

    @property
    def p(self) -> float | None:
        """Of the verdict: of the weakest part where it holds or is open, of the strongest refutation times the number of parts
        where it does not hold; None of what no seeds decide."""
        ps = [part.p for part in self.parts if part.p is not None]
        if not ps:
            return None
        return min(1.0, min(ps) * len(ps)) if self.verdict is Verdict.FAILS else max(ps)

    @property
    def _refuted(self) -> list[Part]:
        ps = [part.p for part in self.parts]
        adjusted = iter(holm([p for p in ps if p is not None]))
        stands = [p is None or next(adjusted) < ERROR for p in ps]
        return [part for part, ok in zip(self.parts, stands, strict=True) if ok and part.verdict is Verdict.FAILS]


CLAIMS: dict[str, tuple[Group, Callable[[], Claim]]] = {}
"""By the name of their page, in the order of the index within each group."""


def claim(group: Group) -> Callable[[Callable[[], Claim]], Callable[[], Claim]]:
    """Enter a claim under the name of the function that makes it."""

    def enter(make: Callable[[], Claim]) -> Callable[[], Claim]:
        CLAIMS[make.__name__.replace("_", "-")] = group, make
        return make

    return enter


def together(claims: Sequence[Claim]) -> dict[str, bool]:
    """{name: whether its verdict stays when all claims with seeds are looked at together, with an error of 5 % for all}."""
    tested = [(c.name, p) for c in claims if (p := c.p) is not None]
    adjusted = holm([p for _, p in tested])
    decided = {c.name: c.verdict is not Verdict.OPEN for c in claims}
    return {name: p < ERROR and decided[name] for (name, _), p in zip(tested, adjusted, strict=True)}
