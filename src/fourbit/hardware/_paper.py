"""The paper's estimate of training performance (Sun et al., NeurIPS 2020, Fig. 6c), from the speeds of its units.

The time of a step is the sum over the three GEMMs of their share of the multiply-accumulates, divided by the speed of the unit
that they run on. The paper gives 7.3 for INT4 x FP4 (4 ways in 0.55 of the area of an FP16 unit); INT4 x FP8 is not given,
but its other numbers allow 2.01 to 2.075 only. First and last layers count like all others.
"""

from __future__ import annotations

from dataclasses import dataclass

SPEEDS = {"fp16": 1.0, "fp8": 2.0, "int4_fp8": 2.05, "int4_fp4": 4 / 0.55, "int4": 4 / 0.55}
"""Relative to FP16, at equal area."""


@dataclass(frozen=True)
class Estimate:
    """A row of Fig. 6c.

    Args:
        title: of the row.
        paper: its number.
        ours: {choice where the paper leaves one open: our number}.
    """

    title: str
    paper: float
    ours: dict[str, float]


def resnet50(version: str) -> dict[str, int]:
    """Multiply-accumulates of ResNet-50 for one image of 224 pixels by kind of layer: "stem", "reduce", "3x3", "expand",
    "shortcut", "fc".

    Args:
        version: "v1" with the stride in the reducing 1x1 convolution (He et al. 2015), "v1.5" with it in the 3x3 one.
    """
    macs = {"stem": 112 * 112 * 64 * 3 * 49, "reduce": 0, "3x3": 0, "expand": 0, "shortcut": 0, "fc": 2048 * 1000}
    channels, size = 64, 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            inside = size // stride
            macs["reduce"] += (inside if version == "v1" else size) ** 2 * channels * width
            macs["3x3"] += inside**2 * width * width * 9
            macs["expand"] += inside**2 * width * 4 * width
            if not block:
                macs["shortcut"] += inside**2 * channels * 4 * width
            channels, size = 4 * width, inside
    return macs


def speedup(forward: str, dgrad: str, wgrad: str, speeds: dict[str, float] | None = None) -> float:
    """With one unit per GEMM, of three GEMMs of equal size."""
    s = speeds or SPEEDS
    return 3 / sum(1 / s[unit] for unit in (forward, dgrad, wgrad))


def mixed(share: float, speeds: dict[str, float] | None = None) -> float:
    """INT4 forward and FP4 gradients, but FP8 gradients in a share of the multiply-accumulates."""
    s = speeds or SPEEDS
    backward = share / s["int4_fp8"] + (1 - share) / s["int4_fp4"]
    return 3 / (1 / s["int4"] + 2 * backward)


def figure_6c(speeds: dict[str, float] | None = None) -> list[Estimate]:
    """All rows, with the paper's speeds or others of the same names."""

    def row(title: str, paper: float, forward: str, dgrad: str, wgrad: str) -> Estimate:
        return Estimate(title, paper, {"": speedup(forward, dgrad, wgrad, speeds)})

    shares: dict[str, dict[str, float]] = {}
    for version in ("v1", "v1.5"):
        macs = resnet50(version)
        whole = sum(macs.values())
        shares[version] = {kind: n / whole for kind, n in macs.items()}
    every = {
        f"ResNet-50 {version}": mixed(sum(found[k] for k in ("reduce", "expand", "shortcut")), speeds)
        for version, found in shares.items()
    }
    bottom = {
        f"ResNet-50 {version}, {kind} 1x1": mixed(found[kind], speeds)
        for version, found in shares.items()
        for kind in ("reduce", "expand")
    }
    return [
        row("FP16, FP16", 1.0, "fp16", "fp16", "fp16"),
        row("FP8, FP8", 2.0, "fp8", "fp8", "fp8"),
        row("INT4, FP16", 1.4, "int4", "fp16", "fp16"),
        row("INT4, FP8", 2.7, "int4", "int4_fp8", "int4_fp8"),
        row("INT4, FP4", 7.3, "int4", "int4_fp4", "int4_fp4"),
        row("INT4, dgrad FP4, wgrad FP8", 3.9, "int4", "int4_fp4", "int4_fp8"),
        Estimate("INT4, FP4, all 1x1 FP8", 4.0, every),
        Estimate("INT4, FP4, bottom 1x1 FP8", 5.2, bottom),
    ]
