"""Sums that are rounded to FP16 after every addition."""

from __future__ import annotations

import math

from benchmarks.claims._claim import Claim, Group, Part, Table, claim, every
from benchmarks.claims._read import markdown_rows
from fourbit._statistics import T_975


@claim(Group.FIGURES)
def swamping() -> Claim:
    rows = [[float(x) for x in row] for row in markdown_rows("accumulation/table.md", "K")]
    long = [row for row in rows if 4096 <= row[0] <= 65536]
    return Claim(
        "Summing in chunks of 64 keeps an FP16 sum exact to 1 % up to 2^16 terms, where one chain loses half.",
        (
            every(
                "lengths from 2^12 to 2^16 at which chunks are within 1 %", [row[2] < 0.01 for row in long], "lengths"
            ),
            every(
                "lengths from 2^12 to 2^16 at which one chain loses half", [row[1] >= 0.5 for row in long], "lengths"
            ),
        ),
        "The paper adds in FP16 1-6-9 (9 bits of mantissa), in chunks of 64. Each addition is rounded. A sum of "
        "positive numbers stands still once its terms are below half the gap of its grid: that is swamping.",
        (
            "Positive terms around 1 are the worst case. Terms of a dot product of random vectors cancel, and do not "
            "stand still up to 2^18.",
        ),
        picture=("accumulation/swamping.png", "Error of sums in FP16 1-6-9 against the number of terms"),
        tables=(
            Table(
                "Relative error of sums of positive numbers ([more](../accumulation/table.md))",
                ("terms", "one chain", "chunks of 64", "one chain, stochastic", "chunks, stochastic"),
                tuple(tuple(cells) for cells in markdown_rows("accumulation/table.md", "K")),
            ),
        ),
        why=(
            "Numbers around 1 add up to about 1024 and no further. Chunks keep the error near one rounding (2^-10), and "
            "at 2^18 terms the sums of the chunks swamp among themselves. Stochastic rounding never stands still, "
            "because its errors cancel on average, but each is larger.",
        ),
        commands=("python benchmarks/swamping.py",),
    )


@claim(Group.FIGURES)
def rounded_sums() -> Claim:
    rows = {row[0]: row for row in markdown_rows("accumulation/digits.md", "recipe")}
    n = int(rows["fp32"][3])

    def part(recipe: str, least: float | None = None) -> Part:
        mean, std = float(rows[recipe][4]), float(rows[recipe][5])
        half = T_975[n - 2] * std / math.sqrt(n)
        return Part(
            f"`{recipe}` - FP32, digits, 8 epochs",
            mean,
            mean - half,
            mean + half,
            "points",
            f"{n} seeds, 95 %",
            least,
        )

    return Claim(
        "With sums rounded to FP16 after every addition, the paper's recipe is less than one point behind FP32 on digits.",
        (part("ibm2020-acc", -1.0),),
        "`ibm2020-acc` rounds after every addition, in chunks of 64; `ibm2020-acc-nochunk` without chunks; `ibm2020` "
        "adds in float32.",
        (
            "The longest sums of this network, those of wgrad, have 8192 terms of both signs, most of them zero. A "
            "network with longer sums may differ.",
            "Three seeds; the runs are not kept, their means and standard deviations are.",
        ),
        beside=(part("ibm2020"), part("ibm2020-acc-nochunk")),
        tables=(
            Table(
                "Digits, 8 epochs",
                ("recipe", "test accuracy %", "std", "seeds", "to FP32", "std", "training loss"),
                tuple((f"`{r}`", *row[1:7]) for r, row in rows.items()),
            ),
        ),
        why=(
            "An epoch with rounded sums takes several times as long: half of it in the kernel, the rest in writing "
            "convolutions out as products of matrices ([speed of the kernel](../accumulation/table.md)).",
        ),
        commands=(
            "fourbit compare --model digits_cnn --data digits --epochs 8 --seeds 0,1,2 --threads 1 \\\n"
            "        --recipes fp32,ibm2020,ibm2020-acc,ibm2020-acc-nochunk --out runs/accumulation",
        ),
    )
