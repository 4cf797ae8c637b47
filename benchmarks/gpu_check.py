"""The GPU's parity suite and benchmark, in one run of less than eight minutes.

    make gpu-check
    PYTHONPATH=src python benchmarks/gpu_check.py [--out FILE] [--only parity,layers] [--seconds 460]

From a bare checkout, without network: needs torch with CUDA and its Triton, nothing else. Every section runs in a process
of its own with a limit of time, so that one that fails or hangs leaves the others their turn. Writes JSON and prints Markdown.
Exit codes: 0 all parity checks passed, 1 one failed or did not run to its end, 2 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "kernels_cuda"), str(HERE.parent / "src")]

SECTIONS = {"parity": 190, "layers": 90, "quantizers": 70, "products": 40, "transformer": 80, "resnet50": 80}
"""Sections in order, and the seconds that each may take at most."""

PARITY = ("parity", "layers")


def run_section(name: str, seconds: float) -> dict[str, Any]:
    """What a section finds: {"checks": {name: result}} or {"rows": [row]}."""
    if name == "parity":
        import parity

        return {"checks": parity.run("cuda", "full", quiet=True, seconds=seconds - 20)}
    if name == "layers":
        import parity_layers

        return {"checks": parity_layers.run("cuda", small=False, quiet=True, seconds=seconds - 15)}
    import gpu_networks
    import gpu_speed

    return {"rows": getattr(gpu_speed if hasattr(gpu_speed, name) else gpu_networks, name)()}


def in_own_process(name: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--section", name, "--seconds", str(seconds), "--out", str(out)]
        start = time.monotonic()
        try:
            done = subprocess.run(command, timeout=seconds + 5, capture_output=True, text=True)
            problem = (
                "" if done.returncode == 0 else f"exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}"
            )
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s"
        found = json.loads(out.read_text()) if out.exists() else {}
        if not found and not problem:
            problem = "nothing was written"
        if problem and "error" not in found:
            found["error"] = problem
        return found | {"seconds": round(time.monotonic() - start, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; rows with the same keys share a table."""

    def cell(value: Any) -> str:
        return (
            f"{value:.3g}"
            if isinstance(value, float) and abs(value) < 1000
            else f"{value:.0f}"
            if isinstance(value, float)
            else str(value)
        )

    lines: list[str] = []
    head: list[str] = []
    for row in rows:
        if not head or not set(row) <= set(head):
            head = list(dict.fromkeys(k for r in rows if next(iter(r)) == next(iter(row)) for k in r))
            lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines.append("| " + " | ".join(cell(row[k]) if k in row else "" for k in head) + " |")
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    """The Markdown report of all sections."""
    lines = [f"# {found['device']}, torch {found['torch']}, Triton {found['triton']}"]
    for name, section in found["sections"].items():
        lines += ["", f"## {name} ({section['seconds']} s)"]
        if "error" in section:
            lines += ["", f"**{section['error']}**"]
        checks = section.get("checks", {})
        if checks:
            wrong = {k: v for k, v in checks.items() if v not in ("ok", "not run")}
            left = sum(v == "not run" for v in checks.values())
            lines += ["", f"{len(checks)} checks, {len(wrong)} wrong, {left} not run"]
            lines += [f"* {k}: {v}" for k, v in list(wrong.items())[:40]]
        if section.get("rows"):
            lines.append(table(section["rows"]))
    return "\n".join(lines)


def failed(sections: dict[str, Any]) -> bool:
    """Whether a parity check failed, or a section of them broke off."""
    return any(
        "error" in section or any(v not in ("ok", "not run") for v in section.get("checks", {}).values())
        for name, section in sections.items()
        if name in PARITY
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=460.0, help="limit for everything")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none here: run it on a machine with an NVIDIA GPU.")
        return 2
    if arguments.section:
        try:
            found = run_section(arguments.section, arguments.seconds)
        except Exception:
            found = {"error": traceback.format_exc(limit=-4)}
        arguments.out.write_text(json.dumps(found))
        return 0
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "missing"
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
        "sections": {},
    }
    end = time.monotonic() + arguments.seconds
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        seconds = min(SECTIONS[name], end - time.monotonic() - 5)
        if seconds < 20:
            found["sections"][name] = {"error": "not run: no time left", "seconds": 0.0}
        else:
            found["sections"][name] = in_own_process(name, seconds)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {found['sections'][name]['seconds']} s", file=sys.stderr, flush=True)
    print(report(found))
    print(f"\nwritten: {arguments.out}")
    return int(failed(found["sections"]))


if __name__ == "__main__":
    sys.exit(main())
