"""What a check found, and all of them together: the report that is printed, written and judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["pass", "fail", "refuses", "open"]


@dataclass(frozen=True)
class Result:
    """One check.

    Args:
        name: what was checked.
        status: "pass"; "fail"; "refuses": the quantizer raised an error where the input is unusual, and gave no wrong number;
            "open": the format leaves this open, and `detail` says what the quantizer does.
        detail: in words, with an example of what is wrong.
        compared: numbers that were compared.
        wrong: how many of them were wrong.
    """

    name: str
    status: Status
    detail: str = ""
    compared: int = 0
    wrong: int = 0


@dataclass(frozen=True)
class Report:
    """All checks of one quantizer.

    Args:
        quantizer: its name.
        format: the block format that it was held against.
        rounding: "nearest" or "stochastic".
        arithmetic: the published order of float32 operations that its numbers follow; empty where there is one only, or none
            fits.
        versions: of the libraries that took part.
        results: in the order in which they were found.
    """

    quantizer: str
    format: str
    rounding: str
    arithmetic: str
    versions: dict[str, str]
    results: tuple[Result, ...]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __getitem__(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.status != "fail" for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}
