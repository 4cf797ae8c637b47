"""Whether the quantizers of libraries equal the definition of the format that they name."""

from __future__ import annotations

from benchmarks.claims._claim import Claim, Group, Table, claim, every
from benchmarks.claims._read import conform_reports

LIMITS = (
    "The versions below, on a CPU, one machine. Kernels for GPUs of the same libraries were not run.",
    "A failure is a difference from the format's definition. Whether it matters in training is another question.",
)


def _library(title: str, library: str, why: tuple[str, ...]) -> Claim:
    reports = conform_reports(library)
    failing = [[r["name"] for r in report["results"] if r["status"] == "fail"] for report in reports]
    versions = {name: version for report in reports for name, version in report["versions"].items()}
    rows = tuple(
        (
            f"`{report['quantizer']}`",
            report["format"] + (", stochastic" if report["rounding"] == "stochastic" else ""),
            f"{len(report['results']) - len(failed)} of {len(report['results'])}",
            ", ".join(failed) or "none",
        )
        for report, failed in zip(reports, failing, strict=True)
    )
    parts = (every(f"quantizers of {library} that pass every check", [not f for f in failing], "quantizers"),)
    beside = tuple(
        every(f"{report['quantizer']}: checks passed", [r["status"] != "fail" for r in report["results"]], "checks")
        for report in reports
    )
    return Claim(
        title,
        parts,
        "`fourbit conform` holds a quantizer against the exact definition of its format, in [some twenty "
        "checks](../../conformance.md#what-is-checked): ties, scales, saturation, zeros, NaN, layouts. An error that is "
        "raised on unusual input counts as no failure.",
        LIMITS,
        beside=beside,
        tables=(Table("", ("quantizer", "held against", "checks passed", "fails"), rows, words=4),),
        why=why,
        method=(
            ", ".join(f"{name} {version}" for name, version in versions.items())
            + ". [Every failure](../../conformance.md#what-was-found).",
        ),
        commands=tuple(f"fourbit conform {report['quantizer']}" for report in reports),
    )


@claim(Group.CONFORMANCE)
def torchao() -> Claim:
    return _library(
        "torchao's quantizers equal the formats that they name.",
        "torchao",
        (
            "MX formats: elements are divided by a scale of at least 2^-126 and multiplied by one of 2^-127, so blocks "
            "with the smallest scale come out halved. `RCEIL` takes the exponent from a float32 logarithm, which misses "
            "maxima just above a power of two. NVFP4: a tensor of zeros gives NaN when its scale is computed by "
            "`per_tensor_amax_to_scale`.",
        ),
    )


@claim(Group.CONFORMANCE)
def microxcaling() -> Claim:
    return _library(
        "microxcaling's quantizers equal the formats that they name.",
        "microxcaling",
        (
            "Exponents come from a float32 logarithm, so that maxima just below a power of two get twice the scale. With "
            'bfloat16 inputs the logarithm is bfloat16. Ties go away from zero unless told `round="even"`.',
        ),
    )


@claim(Group.CONFORMANCE)
def four_over_six() -> Claim:
    return _library(
        "four over six's quantizers equal the formats that they name.",
        "fouroversix",
        (
            "NVFP4: elements that a rounded-down subnormal scale takes beyond 7 are rounded to 8, whose code wraps "
            "around to -0. MXFP4: blocks of zeros become -1.5 * 2^-127, and NaN becomes a number.",
        ),
    )


@claim(Group.CONFORMANCE)
def fp4_trainkit() -> Claim:
    return _library(
        "fp4-trainkit's quantizers equal the formats that they name.",
        "fp4-trainkit",
        (
            "Mantissas are rounded to the grid of one binade and cut at 1.5; the noise of stochastic rounding is as "
            "wide as two steps; the linear layer leaves its bias out.",
        ),
    )


@claim(Group.CONFORMANCE)
def our_quantizers() -> Claim:
    return _library(
        "fourbit's own quantizers equal the formats that they name.",
        "fourbit",
        (
            "The definition is pure Python with float32 operations; the quantizers are held against it in eager mode "
            "and with the kernels of the machine.",
        ),
    )
