"""The parity report: every kernel of this machine, on every instruction set, against what defines its numbers.

    python -m benchmarks.kernel_parity --out docs/results/performance

Runs the tests of the kernels and counts them by kernel. Exit code 1 where one failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks._harness import ROOT, described, machine, markdown

TESTS = ("tests/kernels", "tests/chains", "tests/ops")

CRITERIA = {
    "moments": "means to 1e-12, the maximum exactly",
    "round_one": "every bit of the reference's, codes, packed codes and masks",
    "round_pair": "the same",
    "unpack": "every bit",
    "gemm": "equal to float64 where the sums fit 24 bits; else float32 sums; rounded to bfloat16 where it says so",
    "epilogue": "every bit of the reference's; sums of what was clipped to 1e-5 of their terms",
    "product": "every bit of product and epilogue one after the other where the sums fit 24 bits; else one rounding",
    "accumulate": "every bit of a scalar model",
}
_KERNEL = re.compile(r"(cpu|cuda)-(\w+?)-(portable|avx2|avx_vnni|avx512_vnni|avx512|dot_product)")


def collect(path: Path) -> tuple[dict[tuple[str, str], Counter[str]], dict[str, Counter[str]]]:
    """Outcomes by (kernel, instruction set), and by file for tests that name no kernel."""
    by_kernel: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found = _KERNEL.search(case.get("name", ""))
        if found:
            by_kernel[found[2], found[3]][outcome] += 1
        else:
            by_file[case.get("classname", "").replace(".", "/") + ".py"][outcome] += 1
    return by_kernel, by_file


def report(by_kernel: dict[tuple[str, str], Counter[str]], by_file: dict[str, Counter[str]]) -> str:
    """Both tables."""

    def cells(counts: Counter[str]) -> list[str]:
        return [str(counts[outcome]) for outcome in ("passed", "failed", "skipped")]

    kernels = [[name, isa, *cells(c), CRITERIA.get(name, "")] for (name, isa), c in sorted(by_kernel.items())]
    others = [[f"`{name}`", *cells(counts)] for name, counts in sorted(by_file.items())]
    return "\n\n".join(
        (
            f"{described(machine())}, `python -m benchmarks.kernel_parity`:",
            markdown(["kernel", "instruction set", "passed", "failed", "skipped", "has to be"], kernels, 2),
            "Convolutions, normalization chains, whole layers, bounds, sanitizers and accumulation, by file:",
            markdown(["tests", "passed", "failed", "skipped"], others, 1),
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for parity.md")
    arguments = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={found}", *TESTS]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not found.exists():
            print("kernel_parity: the tests did not run: see above", file=sys.stderr)
            return code or 1
        text = report(*collect(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "parity.md").write_text(text + "\n")
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
