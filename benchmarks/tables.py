"""Rewrites the tables of docs/performance.md, and draws the plots again, from the JSON files of the benchmarks.

    python -m benchmarks.tables --results docs/results/performance

A table stands in a region (`benchmarks._regions`). Names: targets; machine; parity (the file parity.md of the
results folder, if there is one); commands; and those of the tables and figures of each benchmark. Results of a restricted
instruction set lie in a folder of its name inside, and their tables have that name behind theirs. What has no results stays.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _regions, cold_start, growth, quantizers, step
from benchmarks._harness import ROOT, described, markdown, write
from benchmarks._targets import TARGETS

BENCHMARKS = {"quantizers": quantizers, "step": step, "growth": growth, "cold_start": cold_start}


def load(results: Path) -> dict[str, dict[str, Any]]:
    """The results by benchmark, as far as there are any."""
    paths = {name: results / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def blocks(found: dict[str, dict[str, Any]], results: Path, relative: str, isa: str = "") -> dict[str, str]:
    """Everything that the document can show, by name; figures as links from where the document lies."""
    shown: dict[str, str] = {}
    if found:
        rows = [target.row(found.get(target.source)) for target in TARGETS[isa]]
        shown["targets"] = markdown(["what", "to reach", "reached", ""], rows, 4)
        lines = [f"- `{name}`: {described(data['machine'])}{_load(data)}" for name, data in found.items()]
        peers = {peer: version for data in found.values() for peer, version in data["peers"].items()}
        shown["machine"] = "\n".join(lines)
        if peers:
            shown["machine"] += "\n- other libraries: " + ", ".join(f"{name} {v}" for name, v in peers.items())
        shown["commands"] = "\n".join(f"    {data['command']}" for data in found.values())
    for name, data in found.items():
        module = BENCHMARKS[name]
        shown |= {key: text for key, text in module.tables(data).items() if key != "machine"}
        for figure in module.figures(data):
            shown[f"figure-{figure}"] = f"![{figure}]({relative}/{figure}.png)"
    parity = results / "parity.md"
    if parity.exists():
        shown["parity"] = parity.read_text().strip()
    for folder in (results / name for name in TARGETS if name and not isa):
        inside = blocks(load(folder), folder, f"{relative}/{folder.name}", folder.name) if folder.is_dir() else {}
        shown |= {f"{key}-{folder.name}": text for key, text in inside.items()}
    return shown


def _load(data: dict[str, Any]) -> str:
    load = data["settings"]["load_before"]
    return "" if load is None else f"; load average {load:.1f} at the start"


def filled(document: Path, results: Path) -> str:
    """The document with the tables of these results."""
    shown = blocks(load(results), results, os.path.relpath(results, document.parent))
    return _regions.fill(document.read_text(), shown)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "performance")
    options.add_argument("--document", type=Path, default=ROOT / "docs" / "performance.md")
    arguments = options.parse_args(argv)
    found = load(arguments.results)
    for name, data in found.items():
        write(arguments.results, data, BENCHMARKS[name].tables(data), BENCHMARKS[name].figures(data))
    arguments.document.write_text(filled(arguments.document, arguments.results))
    print(f"{arguments.document.name}: tables of {', '.join(found) or 'nothing'}")


if __name__ == "__main__":
    main()
