"""`fourbit doctor`: is this installation sound, and what does it run on?"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator

import torch

from fourbit import backends
from fourbit.formats import CATALOG, Format
from fourbit.quantizers import round_to_format
from fourbit.train._environment import describe, tune_malloc

PACKAGES = (
    "accelerate",
    "datasets",
    "jinja2",
    "matplotlib",
    "numpy",
    "rich",
    "safetensors",
    "scikit-learn",
    "tensorboard",
)


def examine() -> Iterator[tuple[str, bool]]:
    """Lines of the report, each with whether what it says is as it should be."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in describe(device).items():
        if name not in ("started", "kernels"):
            yield f"{name:12} {'-' if value is None else value}", True
    for package in PACKAGES:
        try:
            yield f"{package:12} {importlib.metadata.version(package)}", True
        except importlib.metadata.PackageNotFoundError:
            yield f"{package:12} missing: pip install 'fourbit[train]'", False
    yield f"{'malloc':12} {'glibc, can be tuned' if tune_malloc() else 'not glibc, stays as it is'}", True
    for backend in backends.statuses():
        yield f"{'kernels':12} {backend}", backend.available or not backend.needed
    for format in CATALOG.values():
        wrong = count_wrong(format, device)
        yield f"{'rounding':12} {format.name}: {f'{wrong} numbers wrong' if wrong else 'ok'}", wrong == 0


def count_wrong(format: Format, device: torch.device, most: int = 4096) -> int:
    """How many test numbers `round_to_format` rounds differently from `Format.round`, the definition.

    The numbers are the grid, the decision points and their float32 neighbours on both sides, at most about `most` of
    them spread over the range, and infinity and NaN.
    """
    points = [*format.grid, *format.decision_points]
    points = points[:: max(1, 3 * len(points) // most)]
    exact = torch.tensor(points, dtype=torch.float64).to(torch.float32)
    infinity = torch.tensor(math.inf)
    x = torch.cat(
        [
            exact,
            torch.nextafter(exact, infinity),
            torch.nextafter(exact, -infinity),
            torch.tensor([math.inf, -math.inf]),
        ]
    )
    rounded = round_to_format(x.to(device), format).cpu().tolist()
    expected = [format.round(value) for value in x.tolist()]
    wrong = sum(ours != theirs for ours, theirs in zip(rounded, expected, strict=True))
    return wrong + (not math.isnan(float(round_to_format(torch.tensor([math.nan]), format))))
