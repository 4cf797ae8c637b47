"""Time of a training step, recipe by recipe, as a ratio to FP32, in alternating turns on one machine.

    python benchmarks/step.py --model resnet20 --batch-size 128 --rounds 7

Writes benchmarks/results/step.json and prints a Markdown table. Medians of the rounds; trust the ratios, not the times.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fourbit as fb
from fourbit import models
from fourbit.train._environment import tune_malloc


def make_step(recipe: str, model: str, batch_size: int):
    torch.manual_seed(0)
    network = fb.convert(models.build(model, num_classes=10), recipe).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(fb.param_groups(network, 1e-4), lr=0.01, momentum=0.9)
    x = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch_size,))

    def step() -> float:
        start = time.perf_counter()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipes", default="fp32,int4-fwd,ibm2020,ibm2020-dw8,luq")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    arguments = parser.parse_args()
    tune_malloc()
    names = arguments.recipes.split(",")
    steps = {name: make_step(name, arguments.model, arguments.batch_size) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds + 2):
        for name in names:
            seconds = steps[name]()
            if turn >= 2:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians[names[0]]
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
    }
    print(f"{arguments.model}, batch {arguments.batch_size}, {machine['threads']} threads, torch {torch.__version__}\n")
    print(f"| recipe | median ms | min ms | max ms | ratio to {names[0]} |\n|---|---|---|---|---|")
    for name in names:
        low, high = min(times[name]), max(times[name])
        print(
            f"| {name} | {medians[name] * 1e3:.0f} | {low * 1e3:.0f} | {high * 1e3:.0f} | {medians[name] / base:.2f} |"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "seconds": times}, indent=1) + "\n")
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
