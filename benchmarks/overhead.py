"""What Python costs where the arithmetic is small: a linear layer, and ResNet-20 with one image, against FP32.

    python -m benchmarks.overhead --recipe ibm2020

CPU time of forward and backward (ResNet-20: of a whole step of SGD) in turns A B A, FP32 before and after; medians. And the
calls of Python's functions in one step, which do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import torch
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from benchmarks._harness import markdown
from benchmarks._networks import resnet20

Step = Callable[[], None]


def linear(recipe: str | None, rows: int = 32, features: int = 64) -> Step:
    """Forward and backward of the middle one of three layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(features, features) for _ in range(3)))
    if recipe is not None:
        fb.convert(model, recipe)
    layer, x = model[1], torch.randn(rows, features, requires_grad=True)
    g = torch.randn(rows, features)
    return lambda: layer(x).backward(g)


def network(recipe: str | None, batch: int = 1) -> Step:
    """A step of SGD of ResNet-20."""
    torch.manual_seed(0)
    found = resnet20()
    model = found.build()
    if recipe is not None:
        model = fb.convert(copy.deepcopy(model), recipe)
    x, y = found.data(batch)
    optimizer = torch.optim.SGD(fb.param_groups(model, 1e-4), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


CASES: dict[str, tuple[Callable[[str | None], Step], int]] = {
    "linear 32 x 64 x 64": (linear, 50),
    "ResNet-20, batch 1": (network, 4),
}
"""What is measured, and how often in one turn."""


def cpu_time(step: Step, count: int) -> float:
    """Milliseconds of this process per step."""
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count * 1e3


def num_calls(step: Step) -> int:
    """Calls of functions written in Python in one step; backward passes run in this thread for it."""
    count = 0

    def look(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    with torch.autograd.set_multithreading_enabled(False):
        step()
        sys.setprofile(look)
        try:
            step()
        finally:
            sys.setprofile(None)
    return count


def measure(make: Callable[[str | None], Step], recipe: str, count: int, rounds: int) -> list[str]:
    """FP32, the recipe, their ratio, and the calls of both."""
    plain, ours = make(None), make(recipe)
    for step in (plain, ours):
        for _ in range(3):
            step()
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        before, between, after = cpu_time(plain, count), cpu_time(ours, count), cpu_time(plain, count)
        times.append(((before + after) / 2, between))
    base, found = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    return [f"{base:.3f}", f"{found:.3f}", f"{ratio:.2f}", str(num_calls(plain)), str(num_calls(ours))]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="ibm2020")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each case")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [[name, *measure(make, arguments.recipe, count, arguments.rounds)] for name, (make, count) in CASES.items()]
    columns = [
        "case",
        "FP32, ms of CPU time",
        arguments.recipe,
        "ratio",
        "calls, FP32",
        f"calls, {arguments.recipe}",
    ]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
