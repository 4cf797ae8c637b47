"""How time and memory of a training step grow with the batch size and with the width, on log axes, with the slope.

    python -m benchmarks.growth --rounds 5

Times are races as everywhere; the peak of memory is what training adds to a process of its own. The slope is that of a
straight line through the three largest sizes on log axes: 1 means in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import _networks, _plots, _ways
from benchmarks._harness import (
    Skip,
    described,
    header,
    in_fresh_process,
    markdown,
    parser,
    race,
    say,
    start,
    time_of,
    write,
)


@dataclass(frozen=True)
class Series:
    """A network and the sizes that it is measured at; the batch is the network's own where the width grows."""

    network: str
    grows: str
    sizes: tuple[int, ...]
    short: tuple[int, ...]
    batch: int | None = None

    def case(self, size: int) -> tuple[_networks.Network, int, int | None]:
        """Network, batch size and width of one point."""
        width = size if self.grows == "width" else None
        network = _networks.get(self.network, width)
        return network, size if self.grows == "batch" else self.batch or network.batch, width


SERIES = {
    "resnet20-batch": Series("resnet20", "batch", (16, 32, 64, 128, 256, 512), (16, 32, 64)),
    "resnet20-width": Series("resnet20", "width", (8, 16, 32, 64, 128), (8, 16, 32), 32),
    "mlp-batch": Series("mlp", "batch", (32, 64, 128, 256, 512, 1024), (64, 128, 256)),
    "mlp-width": Series("mlp", "width", (512, 1024, 2048, 4096, 8192), (512, 1024, 2048)),
}


def measure(series: Series, sizes: Sequence[int], ways: Sequence[str], arguments: Any) -> dict[str, Any]:
    """Times and peaks at every size."""
    points = {}
    for size in sizes:
        network, batch, width = series.case(size)
        say(f"{network.title}, batch {batch}: steps")
        entrants = _ways.entrants(network, batch, ways)
        times = race(entrants, arguments.rounds, least_s=0.05, budget_s=20)
        peaks = {}
        for entrant in entrants if not arguments.no_memory else ():
            job = {"do": "peak_memory", "network": series.network, "way": entrant.name, "batch": batch, "width": width}
            try:
                peaks[entrant.name] = in_fresh_process(job | {"steps": 2})["peak_bytes"]
            except Skip as reason:
                say(f"  {entrant.name}: {reason}")
        points[str(size)] = {"times": times, "peak_bytes": peaks}
    network, batch, _ = series.case(sizes[-1])
    title = f"{series.network}: {series.grows}" + (f", batch {batch}" if series.grows == "width" else "")
    return {"title": title, "grows": series.grows, "points": points}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns what it writes."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--series", help=f"comma-separated (default all: {','.join(SERIES)})")
    options.add_argument("--sizes", help="comma-separated sizes instead of the usual ones")
    options.add_argument("--ways", help="names separated by semicolons", default=";".join(_ways.MAIN))
    options.add_argument("--no-memory", action="store_true", help="no peaks of memory (one process each)")
    arguments = options.parse_args(argv)
    start(arguments)
    data = header("growth", arguments, argv) | {"series": {}}
    for name in arguments.series.split(",") if arguments.series else SERIES:
        series = SERIES[name]
        sizes = series.short if arguments.short else series.sizes
        if arguments.sizes:
            sizes = tuple(int(size) for size in arguments.sizes.split(","))
        data["series"][name] = measure(series, sizes, arguments.ways.split(";"), arguments)
        write(arguments.out, data, tables(data), figures(data))
    print("\n\n".join(tables(data).values()))
    say(f"\nwritten: growth.json, growth.md and a plot in {arguments.out}")
    return data


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of the least-squares line through the three points of largest x on log axes; None below two points.

    >>> slope([(1, 5.0), (2, 6.0), (4, 12.0), (8, 24.0)])
    1.0
    """
    found = [(math.log2(x), math.log2(y)) for x, y in sorted(points)[-3:] if y > 0]
    if len(found) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(found) for axis in zip(*found, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in found)
    return round(above / sum((x - mean_x) ** 2 for x, _ in found), 3)


def curves(series: dict[str, Any]) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """(size, milliseconds) and (size, MiB) of each way."""
    times: dict[str, list[tuple[int, float]]] = {}
    peaks: dict[str, list[tuple[int, float]]] = {}
    for size, point in series["points"].items():
        for way in point["times"]:
            seconds = time_of(point["times"], way)
            if seconds:
                times.setdefault(way, []).append((int(size), seconds.median * 1e3))
            if point["peak_bytes"].get(way, 0) > 0:
                peaks.setdefault(way, []).append((int(size), point["peak_bytes"][way] / 2**20))
    return times, peaks


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Markdown by name: milliseconds and MiB at each size, and the slopes."""
    parts = []
    for series in data["series"].values():
        sizes = [int(size) for size in series["points"]]
        rows = []
        for unit, found in zip(("ms", "MiB"), curves(series), strict=True):
            for way, points in found.items():
                by_size, steepness = dict(points), slope(points)
                cells = [f"{by_size[size]:.4g}" if size in by_size else "" for size in sizes]
                rows.append([way, unit, *cells, "" if steepness is None else f"{steepness:.2f}"])
        parts.append(f"**{series['title']}**\n\n{markdown(['way', 'of', *map(str, sizes), 'slope'], rows, 2)}")
    return {"machine": described(data["machine"]), "growth": "\n\n".join(parts)}


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """Time above, memory below, one column per series."""
    rows: list[dict[str, dict[str, _plots.Line]]] = [{}, {}]
    for series in data["series"].values():
        for panels, found in zip(rows, curves(series), strict=True):
            panels[series["title"] + " " * (panels is rows[1])] = {  # keys of both rows must differ
                way: ([x for x, _ in points], [y for _, y in points], _ways.WAYS[way].kind)
                for way, points in found.items()
            }
    labels = ["ms", "peak memory, MiB"]
    if not any(rows[1].values()):
        rows, labels = rows[:1], labels[:1]
    panels = {title: panel for row in rows for title, panel in row.items()}
    return {"growth": _plots.lines(panels, "How a training step grows", "batch size or width", labels)}


if __name__ == "__main__":
    main()
