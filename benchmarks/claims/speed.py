"""What a training step costs in time and memory, from the results of the benchmarks."""

from __future__ import annotations

import re
from typing import Any

from benchmarks._harness import described, ratio
from benchmarks.claims._claim import Claim, Group, Part, Table, claim
from benchmarks.claims._read import benchmark

LIMITS = (
    "One machine of two cores. [Other processors](../../performance.md#figures-to-reach) differ.",
    "Runs minutes apart differ by up to a tenth.",
)
EMULATORS = ("naive fake-quant", "QPyTorch", "microxcaling MXFP4", "microxcaling INT4", "fp4-trainkit")


def _part(network: dict[str, Any], way: str, least: float | None = None, most: float | None = None) -> Part | None:
    found = ratio(network["times"], way, network["base"])
    if found is None:
        return None
    turns = len(network["times"][way]["seconds"])
    return Part(
        f"{way.removeprefix('ours ')}, {_short(network)}: a step over FP32's",
        found.median,
        found.low,
        found.high,
        "times",
        f"median and quartiles of {turns} turns",
        least,
        most,
    )


def _short(network: dict[str, Any]) -> str:
    return re.split("[, ]", network["title"])[0]


def _machine(data: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{described(data['machine'])}.",
        "All ways take turns in one process; a ratio is the median of those of one round each. "
        "[More](../../performance.md#how-it-is-measured).",
    )


@claim(Group.SPEED)
def step_time() -> Claim:
    data = benchmark("step")
    networks = data["networks"].values()
    return Claim(
        "A training step of the paper's recipe takes less time than FP32's, in every network measured.",
        tuple(p for n in networks if (p := _part(n, "ours ibm2020", most=1.0))),
        "The 4-bit numbers are multiplied as int8 and bfloat16, which hold them exactly. Nothing here uses 4-bit hardware.",
        LIMITS,
        beside=tuple(p for n in networks if (p := _part(n, "ours luq"))),
        picture=("performance/step.png", "Time of a step of each way"),
        why=(
            "MobileNetV2 has depthwise, first and last layers in FP16, which cost more than their share, and the chains "
            "around its many small products wait for memory. [Network by "
            "network](../../performance.md#figures-to-reach).",
        ),
        method=_machine(data),
        commands=(data["command"],),
    )


@claim(Group.SPEED)
def emulators() -> Claim:
    data = benchmark("step")
    networks = data["networks"].values()
    found = [(n, way) for n in networks for way in EMULATORS if _part(n, way)]
    parts = [p for n, way in found if (p := _part(n, way, least=2.0))]
    slowest = tuple(sorted(parts, key=lambda p: p.value))
    return Claim(
        "Emulating 4-bit training in float32 takes at least twice as long as FP32.",
        slowest,
        "Emulators round operands and multiply them in float32. 'naive fake-quant' is `ibm2020` as one would write it "
        "for an experiment; the others are libraries.",
        (
            *LIMITS,
            "Other libraries quantize other layers to other formats: [what is "
            "compared](../../performance.md#how-it-is-measured).",
        ),
        beside=tuple(p for n in networks if (p := _part(n, "ours ibm2020"))),
        why=("On networks of large matrix products the float32 product hides what is done around it.",),
        method=_machine(data),
        commands=(data["command"],),
    )


@claim(Group.SPEED)
def saved_memory() -> Claim:
    data = benchmark("step")
    parts, rows = [], []
    for network in data["networks"].values():
        saved, base = network["saved_bytes"], network["base"]
        share = saved["ours ibm2020"]["activations"] / saved[base]["activations"]
        parts.append(Part(f"{network['title']}, bytes of FP32's", share, share, share, "", "counted", most=0.17))
        peak = network["peak_bytes"]
        rows.append(
            (
                network["title"],
                f"{saved[base]['total'] / 2**20:.0f}",
                f"{saved['ours ibm2020']['total'] / 2**20:.0f}",
                f"{peak[base] / 2**20:.0f}",
                f"{peak['ours ibm2020'] / 2**20:.0f}",
            )
        )
    return Claim(
        "4-bit layers keep less than 0.17 of FP32's activations for the backward pass.",
        tuple(parts),
        "Between the forward and the backward pass autograd keeps activations. A 4-bit layer keeps 4 bits of code and 1 "
        "bit of mask per number: 5 of 32.",
        (
            "Other layers keep what they kept. Where weights dominate, the peak of memory lies above FP32's, because "
            "codes of the weights come on top.",
            "FP32 keeps an input of two layers once, as in ResNet-18's shortcuts; each 4-bit layer keeps it on a grid of its "
            "own. Gates and states of an LSTM are no operands of a product, and are not in 4 bits.",
        ),
        tables=(
            Table(
                "MiB of the whole network and step",
                ("network", "saved, FP32", "saved, `ibm2020`", "peak, FP32", "peak, `ibm2020`"),
                tuple(rows),
            ),
        ),
        method=_machine(data),
        commands=(data["command"],),
    )


def range_of_ratios(ways: tuple[str, ...]) -> tuple[tuple[float, str], tuple[float, str]]:
    """Least and largest ratio of a step to FP32's over the networks, each with its network."""
    found = [
        (p.value, _short(network))
        for network in benchmark("step")["networks"].values()
        for way in ways
        if (p := _part(network, way))
    ]
    return min(found), max(found)
