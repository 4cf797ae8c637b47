"""Quantizers over tensors of 2^12 to 2^26 elements: this library, its reference, torch.compile of it, other libraries, and a
copy that moves as many bytes as the limit.

    python -m benchmarks.quantizers --sizes 12,16,20,24,26 --compile

Each operation is what one operand of a layer costs: the numbers in their carrier, and what is saved of them for backward.
Entrants that are not ours compute the nearest thing that they have, and need not pack, mask or find the largest magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import _plots
from benchmarks._harness import (
    Call,
    Entrant,
    Skip,
    described,
    fastest,
    header,
    markdown,
    parser,
    race,
    ratio,
    say,
    start,
    time_of,
    write,
)
from benchmarks._operations import OPERATIONS, Operation
from benchmarks._peers import require_compiler
from fourbit import backends

FOUR_BIT = ("pact", "sawb", "pair", "luq", "mxfp4", "nvfp4")


def entrants(operation: Operation, x: torch.Tensor, compiled: bool) -> list[Entrant]:
    """All that take part in one operation on one tensor."""

    def copy() -> Call:
        half = max(1, int(x.numel() * operation.bytes_moved) // 2 // 4)  # read once, written once, in float32
        source, target = torch.zeros(half), torch.zeros(half)
        return lambda: target.copy_(source)

    def ours() -> Call:
        return operation.ours(x)

    def reference() -> Call:
        return _without_kernels(operation.ours(x))

    def compiled_reference() -> Call:
        require_compiler()
        if operation.plain is None:
            raise Skip("not written as a plain function")
        torch._dynamo.reset()
        function = torch.compile(operation.plain(x), dynamic=False)
        return lambda: function(x)

    found = [Entrant("copy of as many bytes", "limit", copy), Entrant("ours", "ours", ours)]
    found.append(Entrant("reference, eager", "reference", reference))
    if compiled:
        found.append(Entrant("reference, compiled", "compiled", compiled_reference))
    for name, (_, build) in operation.others.items():
        found.append(Entrant(name, "peer", lambda build=build: build(x)))
    return found


def _without_kernels(call: Callable[[], Any]) -> Call:
    def run() -> object:
        with backends.without():
            return call()

    return run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns what it writes."""
    options = parser(__doc__)
    options.add_argument("--sizes", help="log2 of the numbers of elements (default 12,14,...,26; --short: 12,16,20,24)")
    options.add_argument("--operations", help=f"comma-separated (default all: {','.join(OPERATIONS)})")
    options.add_argument("--turn", type=float, default=0.01, help="seconds that a turn lasts at least")
    options.add_argument("--budget", type=float, default=10.0, help="seconds after which an entrant has 5 turns only")
    arguments = options.parse_args(argv)
    start(arguments)
    default = "12,16,20,24" if arguments.short else "12,14,16,18,20,22,24,26"
    sizes = [int(size) for size in (arguments.sizes or default).split(",")]
    names = arguments.operations.split(",") if arguments.operations else list(OPERATIONS)
    data = header("quantizers", arguments, argv) | {"operations": {}}
    for name in names:
        operation = OPERATIONS[name]
        by_size = {}
        for size in sizes:
            say(f"{operation.title}: 2^{size}")
            x = operation.data(1 << size)
            found = entrants(operation, x, arguments.compile)
            with torch.no_grad():
                by_size[str(size)] = race(found, arguments.rounds, least_s=arguments.turn, budget_s=arguments.budget)
        data["operations"][name] = {
            "title": operation.title,
            "reads": operation.reads,
            "writes": operation.writes,
            "others": {library: what for library, (what, _) in operation.others.items()},
            "sizes": by_size,
        }
        write(arguments.out, data, tables(data), figures(data))
    print("\n\n".join(tables(data).values()))
    say(f"\nwritten: quantizers.json, quantizers.md and a plot in {arguments.out}")
    return data


def headline(sizes: dict[str, Any]) -> str:
    """The size that tables and targets are about: 2^24 elements, or the largest there is."""
    return "24" if "24" in sizes else max(sizes, key=int)


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Markdown by name: one operation after the other at one size, and ours over sizes."""
    found = {"machine": described(data["machine"])}
    parts = []
    for operation in data["operations"].values():
        size = headline(operation["sizes"])
        moved = (
            f"reads {operation['reads']:g} bytes per element, writes {operation['writes']:g}: "
            f"{operation['reads'] + operation['writes']:g}"
        )
        parts.append(f"**{operation['title']}**, 2^{size} elements ({moved})\n\n{_one_size(operation, size)}")
    found["quantizers"] = "\n\n".join(parts)
    found["quantizers-sizes"] = _over_sizes(data["operations"])
    return found


def _one_size(operation: dict[str, Any], size: str) -> str:
    results, count = operation["sizes"][size], 2 ** int(size)
    moved = (operation["reads"] + operation["writes"]) * count
    rows = []
    for name, result in results.items():
        seconds, what = time_of(results, name), operation["others"].get(name)
        label = f"{name}: {what}" if what else name
        if seconds is None:
            rows.append([label, f"skipped: {result['skipped']}", "", "", "", ""])
            continue
        ratios = (ratio(results, name, other) for other in ("copy of as many bytes", "ours"))
        cells = [f"{r.median:.2f}" if r else "" for r in ratios]
        quartiles = f"{seconds.low * 1e3:.3g} - {seconds.high * 1e3:.3g}"
        rows.append([label, f"{seconds.median * 1e3:.3g}", quartiles, f"{moved / seconds.median / 1e9:.3g}", *cells])
    return markdown(["", "ms", "quartiles", "GB/s", "of the copy", "of ours"], rows)


def _over_sizes(operations: dict[str, Any]) -> str:
    sizes = list(dict.fromkeys(size for o in operations.values() for size in o["sizes"]))
    rows = []
    for operation in operations.values():
        cells = []
        for size in sizes:
            results = operation["sizes"].get(size, {})
            seconds, relative = time_of(results, "ours"), ratio(results, "ours", "copy of as many bytes")
            moved = (operation["reads"] + operation["writes"]) * 2 ** int(size)
            known = seconds and relative
            cells.append(f"{moved / seconds.median / 1e9:.3g} ({relative.median:.2f})" if known else "")  # type: ignore[union-attr]
        rows.append([operation["title"], *cells])
    return markdown(["ours: GB/s (time over that of the copy)", *(f"2^{size}" for size in sizes)], rows)


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """Time per element against size."""
    panels: dict[str, dict[str, _plots.Line]] = {}
    for operation in data["operations"].values():
        panel = panels[operation["title"]] = {}
        names = dict.fromkeys(n for results in operation["sizes"].values() for n in results)
        for name in names:
            points = [(2 ** int(size), time_of(r, name)) for size, r in operation["sizes"].items()]
            known = [(n, seconds.median * 1e9 / n) for n, seconds in points if seconds]
            if known:
                kind = next(r[name]["kind"] for r in operation["sizes"].values() if name in r)
                panel[name] = ([n for n, _ in known], [ns for _, ns in known], kind)
    title = "Quantizers: time per element"
    return {"quantizers": _plots.lines(panels, title, "elements", ["ns per element"])}


def fastest_four_bit_peer(data: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """{operation: (fastest peer, its time over ours)} for the 4-bit operations that peers took part in."""
    found = {}
    for key in FOUR_BIT:
        operation = data["operations"].get(key)
        if operation is None:
            continue
        results = operation["sizes"][headline(operation["sizes"])]
        peer = fastest(results, ("peer",))
        relative = ratio(results, peer, "ours") if peer else None
        if peer and relative:
            found[key] = peer, relative.median
    return found


if __name__ == "__main__":
    main()
