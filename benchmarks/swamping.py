"""What rounding every addition to FP16 1-6-9 does to a long sum, with and without chunks, and how fast the kernel is.

    python benchmarks/swamping.py

Writes docs/results/accumulation/swamping.png and table.md. Errors are medians over 64 vectors. Positive numbers: uniform in
[0, 2), error relative to the sum. Dot products: two vectors of standard normal numbers, error relative to the root of the
sum of the squared products, which is how large such a dot product typically is. Operands are numbers of FP16 1-6-9, and what
the sums are compared with is computed in float64.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import fourbit as fb
from fourbit import Accumulation, formats, round_to_format
from fourbit.ops import accumulate
from fourbit.quantizers import stream_key

LENGTHS = tuple(2**n for n in range(4, 19))
TRIALS = 64
METHODS = {
    "one chain": Accumulation(chunk=None),
    "chunks of 64": Accumulation(chunk=64),
    "one chain, stochastic rounding": Accumulation(chunk=None, rounding="stochastic"),
    "chunks of 64, stochastic rounding": Accumulation(chunk=64, rounding="stochastic"),
}
LOOKS = {
    "one chain": ("#D55E00", "o", "-"),
    "chunks of 64": ("#0072B2", "s", "-"),
    "one chain, stochastic rounding": ("#E69F00", "o", "--"),
    "chunks of 64, stochastic rounding": ("#56B4E9", "s", "--"),
}
Errors = dict[str, list[float]]


def positive(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Terms [length, TRIALS], and what their errors are relative to."""
    terms = round_to_format(2 * torch.rand(length, TRIALS, generator=generator), formats.FP16_169)
    return terms, terms.double().sum(0)


def products(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As `positive`, for the terms of dot products: exact in float32."""
    a, b = (round_to_format(torch.randn(length, TRIALS, generator=generator), formats.FP16_169) for _ in range(2))
    return a * b, (a * b).double().square().sum(0).sqrt()


def errors(make) -> Errors:
    found: Errors = {name: [] for name in METHODS}
    for length in LENGTHS:
        terms, size = make(length, torch.Generator().manual_seed(length))
        exact = terms.double().sum(0)
        for name, accumulation in METHODS.items():
            y = accumulate(torch.ones(1, 1, length), terms.unsqueeze(0), accumulation, stream_key(0, length))
            found[name].append(float(((y.view(-1).double() - exact).abs() / size).median()))
    return found


def draw(panels: dict[str, Errors], path: Path) -> None:
    figure = Figure(figsize=(10.5, 4.6), dpi=125, layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        for name, values in found.items():
            color, marker, dash = LOOKS[name]
            ax.plot(LENGTHS, values, dash, color=color, marker=marker, markersize=4, label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("number of terms K")
        ax.grid(color="#e4e4e4", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("median error / sum")
    axes[1].set_ylabel(r"median error / $\sqrt{\Sigma\,(a_i b_i)^2}$")
    figure.suptitle("Sums rounded to FP16 1-6-9 after every addition: error against float64", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)


def error_table(title: str, found: Errors) -> list[str]:
    lines = [f"{title}:", "", "| K |" + "".join(f" {name} |" for name in found), "|---:|" + "---:|" * len(found)]
    for i, length in enumerate(LENGTHS):
        if i % 2 == 0:
            lines.append(f"| {length} |" + "".join(f" {values[i]:.1e} |" for values in found.values()))
    return [*lines, ""]


def calls(M: int, K: int, N: int) -> tuple[Callable[[], Tensor], ...]:
    """The products whose speeds are compared, on operands of their kind."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (1, M, K), generator=generator).float()
    powers = round_to_format(torch.randn(1, K, N, generator=generator) * 16, formats.FP4_R4_EVEN)
    a, b = (round_to_format(torch.randn(s, generator=generator), formats.FP16_169) for s in ((1, M, K), (1, K, N)))
    chunks, stochastic = METHODS["chunks of 64"], METHODS["chunks of 64, stochastic rounding"]
    return (
        lambda: a @ b,
        lambda: accumulate(codes, powers, chunks),
        lambda: accumulate(a, b, chunks),
        lambda: accumulate(codes, powers, stochastic, 1),
    )


def speeds(rounds: int = 7) -> list[str]:
    """GFLOP/s of products [M, K] x [K, N], two operations per term; medians of alternating turns."""
    kernels = ", ".join(f"{s.name}: {s.detail}" for s in fb.backends.statuses() if s.available) or "reference"
    lines = [
        f"GFLOP/s of a product [M, K] [K, N], {torch.get_num_threads()} threads ({kernels}):",
        "",
        "| M, K, N | float32 matmul | 4-bit operands, chunks of 64 | FP16 operands, chunks of 64 | 4-bit, stochastic |",
        "|---|---:|---:|---:|---:|",
    ]
    for sizes in ((8192, 144, 32), (32, 8192, 144), (256, 1024, 1024)):
        compared = calls(*sizes)
        times: list[list[float]] = [[] for _ in compared]
        for turn in range(rounds + 1):
            for call, measured in zip(compared, times, strict=True):
                start = time.perf_counter()
                call()
                if turn:
                    measured.append(time.perf_counter() - start)
        rates = (2e-9 * math.prod(sizes) / statistics.median(t) for t in times)
        lines.append(f"| {', '.join(map(str, sizes))} |" + "".join(f" {rate:.1f} |" for rate in rates))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "docs" / "results" / "accumulation"
    parser.add_argument("--out", type=Path, default=default)
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    panels = {"Sums of positive numbers": errors(positive), "Dot products of normal vectors": errors(products)}
    draw(panels, folder / "swamping.png")
    lines = [line for title, found in panels.items() for line in error_table(title, found)]
    text = "\n".join([*lines, *speeds()]) + "\n"
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
