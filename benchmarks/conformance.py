"""Holds the quantizers of other libraries against their formats, and rewrites the tables of docs/conformance.md.

    python -m benchmarks.conformance

Libraries that are not installed keep the results that are stored in docs/results/conformance, a file for each quantizer as
`fourbit conform NAME --out FILE` writes it. A table stands in a region of its name (`benchmarks._regions`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import _regions
from benchmarks._harness import ROOT, markdown
from fourbit.conform import PEERS

RESULTS = ROOT / "docs/results/conformance"
PAGE = ROOT / "docs/conformance.md"


def run(name: str, path: Path) -> None:
    """One quantizer, in a process of its own; nothing is written where its library is not installed."""
    command = [sys.executable, "-m", "fourbit", "conform", name, "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{name}: {(done.stdout or done.stderr).strip().splitlines()[-2 if done.stdout else -1]}", flush=True)


def overview(reports: list[dict[str, Any]]) -> str:
    """A line per quantizer: what it claims, and which checks it fails and refuses."""
    rows = []
    for report in reports:
        by_status = {
            status: [r["name"] for r in report["results"] if r["status"] == status] for status in ("fail", "refuses")
        }
        arithmetic = f", {report['arithmetic']}" if report["arithmetic"] else ""
        rows.append(
            [
                f"`{report['quantizer']}`",
                f"{report['format']}{', stochastic' if report['rounding'] == 'stochastic' else arithmetic}",
                str(len(report["results"])),
                ", ".join(by_status["fail"]) or "none",
                ", ".join(by_status["refuses"]) or "nothing",
            ]
        )
    return markdown(["quantizer", "held against", "checks", "fails", "refuses"], rows, 5)


def failures(reports: list[dict[str, Any]]) -> str:
    """A line per failed check."""
    rows = []
    for report in reports:
        for result in report["results"]:
            if result["status"] == "fail":
                counts = (
                    f"{result['wrong']} of {result['compared']}" if result["compared"] > 1 < result["wrong"] else "-"
                )
                rows.append([f"`{report['quantizer']}`", result["name"], counts, result["detail"]])
    return markdown(["quantizer", "check", "wrong", "found"], rows, 4)


def versions(reports: list[dict[str, Any]]) -> str:
    """The libraries that took part."""
    found = {library: version for report in reports for library, version in report["versions"].items()}
    return ", ".join(f"{library} {version}" for library, version in found.items()) + "."


def paths() -> dict[str, Path]:
    """Where the results of each quantizer lie."""
    return {name: RESULTS / f"{name.replace(':', '-')}.json" for name in PEERS}


def filled(page: str) -> str:
    """The page with the tables of the results that lie there."""
    reports = [json.loads(path.read_text()) for path in paths().values() if path.exists()]
    return _regions.fill(page, {table.__name__: table(reports) for table in (overview, failures, versions)})


def main() -> None:
    """Run what is installed, and write the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not arguments.tables_only:
        for name, path in paths().items():
            run(name, path)
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
