"""Which products need 8 bits: what `fourbit tune` finds, against choices made by hand, at an equal budget.

    python -m benchmarks.tune --network resnet29 --data-dir data/cifar10 --seeds 0,1,2 --out runs/tune
    python -m benchmarks.tune --network digits_cnn --seeds 0 --out /tmp/tune        # minutes: to see that it runs

Per network these recipes are trained by `fourbit compare`, from the same weights:

    fp32, ibm2020          the ends
    HAND                   the paper's own choice: FP8 gradients in the 1x1 convolutions that reduce channels
                           (ibm2020-bottom1x1fp8); not for networks without 1x1 convolutions
    ends.toml              gradients in FP8 in as many of the first and the last 4-bit layers as the budget has room for
    tuned.toml             what `fourbit tune` finds

The budget is the share of multiply-accumulates that HAND takes to 8 bits; without HAND it is 5 %. Gradients alone may be
raised in `ends.toml`, as HAND has it, while `fourbit tune` may raise any product. Started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fourbit import recipes
from fourbit.recipes._rule import LayerInfo
from fourbit.train import CompareConfig, TrainConfig, compare
from fourbit.train.tasks import make_task
from fourbit.tuning import tune
from fourbit.tuning._candidates import Candidate, Candidates, alternative
from fourbit.tuning._output import recipe_file

BASE, HAND = "ibm2020", "ibm2020-bottom1x1fp8"

CIFAR = {"data": "cifar10", "batch_size": 128, "lr": 0.1}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet29": {"model": "resnet29", **CIFAR, "epochs": 3, "warmup_steps": 200},
    "mobilenet_v2": {"model": "mobilenet_v2", **CIFAR, "epochs": 1},
    "transformer": {
        "model": "gpt?width=128&depth=4&heads=4&context=128&hidden=384&tied=false",
        "data": "tinyshakespeare",
        "optimizer": "adamw",
        "batch_size": 32,
        "epochs": 1,
        "max_steps": 800,
        "warmup_steps": 50,
        "schedule": "cosine",
    },
    "digits_cnn": {"model": "digits_cnn", "data": "digits", "batch_size": 64, "lr": 0.05, "epochs": 4},
}
BUDGET = 0.05


def candidates_of(settings: dict[str, Any], out: Path) -> Candidates:
    """All products of the network in 4 bits."""
    from fourbit.train._load import Trained
    from fourbit.tuning._tune import _input_of

    config = TrainConfig(**settings, recipe=BASE, out=out)
    task = make_task(config, torch.device("cpu"), 0, 1)
    model = task.build()
    input = _input_of(Trained(config, model, task))
    return Candidates(model, recipes.get(BASE), alternative(recipes.get("hfp8")), input, None, None)


def ends(found: Candidates, budget: float) -> list[Candidate]:
    """The gradients of the first and the last layers, by turns, as far as the budget goes."""
    layers = list(dict.fromkeys(c.layer for c in found.all))
    turns = [x for pair in zip(layers, reversed(layers), strict=True) for x in pair]
    chosen: list[Candidate] = []
    for layer in dict.fromkeys(turns):
        more = [*chosen, *(c for c in found.all if c.layer == layer and c.gemm != "fprop")]
        if found.share(more) > budget:
            break
        chosen = more
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=200, help="of the run that is measured")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    given = parser.parse_args()
    folder = given.out / given.network
    folder.mkdir(parents=True, exist_ok=True)
    settings = NETWORKS[given.network] | {"data_dir": given.data_dir, "threads": given.threads, "log_to": ()}
    found = candidates_of(settings, folder)
    hand = share_by_hand(found)
    budget = hand or BUDGET
    short = replace(TrainConfig(**settings, recipe=BASE), max_steps=given.steps, out=folder / "tune")
    tuned = tune(short, budget=budget)
    by_hand = found.recipe_with(ends(found, budget), "ends")
    for name, recipe in (("ends", by_hand), ("tuned", tuned.recipe)):
        (folder / f"{name}.toml").write_text(recipe_file(recipe, []))
    print(f"budget {budget:.2%}; tuned {tuned.share:.2%}; ends {found.share(ends(found, budget)):.2%}")
    names = ("fp32", BASE, *([HAND] if hand else []), *(str(folder / f"{name}.toml") for name in ("ends", "tuned")))
    seeds = tuple(map(int, given.seeds.split(",")))
    compare(CompareConfig(**settings, recipes=names, seeds=seeds, out=folder / "runs"))


def share_by_hand(found: Candidates) -> float:
    """What HAND takes to 8 bits: the gradients of the 1x1 convolutions that reduce channels."""
    where = {rule.label: rule.when for rule in recipes.get(HAND).rules}["FP8 gradients"]
    assert where is not None
    layers = {a.name for a in found.assignments if where(LayerInfo(a.name, a.module, 0, 1))}
    return found.share(c for c in found.all if c.layer in layers and c.gemm != "fprop")


if __name__ == "__main__":
    main()
