"""Whether 1, 2 and 4 workers compute the same: losses and scales of one training, step by step, with one global batch.

    python -m benchmarks.workers
    python -m benchmarks.workers --workers 1,2 --recipes ibm2020 --ways "ddp;fsdp" --steps 3

A row of the table is a network, a recipe and a way to train in several processes; its numbers are how far the loss of the
global batch is from that of one process, relative, over the steps, and whether clip values, their forms and exponents are the
same (exponents of n workers lie log2 n lower: the loss of a worker is the mean over its part). Networks are small and
random, in float32, with gloo on one machine.

    cnn         convolutions, normalized by statistics of each worker's part of the batch
    cnn, whole  the same, normalized by statistics of the whole batch, as torch's SyncBatchNorm does on GPUs
    gpt         a Transformer that predicts random tokens

    ddp         DistributedDataParallel, each worker with scales of its part, which `synchronize` lets agree
    ddp, whole  with `share_batch`
    fsdp        `fully_shard` of every block and of the whole, with `synchronize`; "fsdp, whole" likewise
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import fourbit as fb
from fourbit import models

BATCH = 64
NETWORKS, RECIPES = ("cnn", "cnn, whole", "gpt"), ("fp32", "ibm2020", "fourbit", "nvfp4")
WAYS = ("ddp", "ddp, whole", "fsdp, whole")
Found = dict[str, Any]


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' parts, which are of one size; torch's own takes no CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not (distributed.is_initialized() and self.training):
            return super().forward(x)
        means = torch.stack((x.mean((0, 2, 3)), x.square().mean((0, 2, 3))))
        mean, square = all_reduce(means) / distributed.get_world_size()
        scale = self.weight * (square - mean.square() + self.eps).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - mean * scale).view(-1, 1, 1)


def cnn(norm: type[nn.Module]) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()]

    layers = [*block(3, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


class RowsFirst(nn.Module):
    """A language model of `fourbit.models`, its batch along the first axis."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens.t())[0].transpose(0, 1)


def build(network: str) -> nn.Module:
    if network == "gpt":
        return RowsFirst(models.build("gpt?width=64&depth=4&heads=2&context=16", num_classes=64))
    return cnn(WholeBatchNorm if network.endswith("whole") else nn.BatchNorm2d)


def batch(network: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if network == "gpt":
        tokens = torch.randint(64, (BATCH, 17), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    strengths = torch.linspace(0.5, 2, BATCH).view(-1, 1, 1, 1)  # parts that differ
    return strengths * torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(
        10, (BATCH,), generator=generator
    )


def scales_of(model: nn.Module, world: int) -> dict[str, float]:
    """Clip values, forms and exponents; exponents as one worker would have them."""
    found = {}
    for name, t in model.state_dict().items():
        kind = name.rsplit("_", 1)[-1]
        if kind in ("alpha", "form", "exponent"):
            whole = t.full_tensor() if hasattr(t, "full_tensor") else t
            shift = world.bit_length() - 1 if kind == "exponent" else 0
            found[name] = (whole.detach().double().flatten() + shift).tolist()
    return found


def wrapped(model: nn.Module, way: str, world: int) -> nn.Module:
    if way.startswith("fsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for module in model.modules():
            if isinstance(module, nn.ModuleList | nn.Sequential) and module is not model:
                for block in module:
                    fully_shard(block, mesh=mesh)
        model = fully_shard(model, mesh=mesh)
    elif world > 1:
        model = DistributedDataParallel(model)
    return model


def trained(rank: int, world: int, network: str, recipe: str, way: str, steps: int) -> Found:
    torch.manual_seed(0)
    model = fb.convert(build(network), recipe).train()
    outer = wrapped(model, way, world)
    if way.endswith("whole"):
        fb.share_batch(model)
    optimizer = torch.optim.SGD(fb.param_groups(model, 1e-4), 0.05, momentum=0.9)
    mine, losses, scales = slice(rank * BATCH // world, (rank + 1) * BATCH // world), [], []
    for step in range(steps):
        x, y = batch(network, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(outer(x[mine]).flatten(0, -2), y[mine].flatten())
        loss.backward()
        fb.synchronize(model)
        optimizer.step()
        total = loss.detach() / world
        distributed.all_reduce(total)
        losses.append(float(total))
        scales.append(scales_of(model, world))
    return {"losses": losses, "scales": scales}


def work(rank: int, folder: str, world: int, cases: Sequence[tuple[str, str, str]], steps: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = {case: trained(rank, world, *case, steps) for case in cases}
    if rank == 0:
        torch.save(found, f"{folder}/{world}.pt")
    distributed.destroy_process_group()


def measured(worlds: Sequence[int], cases: Sequence[tuple[str, str, str]], steps: int) -> dict[int, dict[Any, Found]]:
    """Losses and scales of every case with each number of workers."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            multiprocessing.spawn(work, (folder, world, cases, steps), nprocs=world)
            found[world] = torch.load(Path(folder) / f"{world}.pt", weights_only=False)
    return found


def off(one: Found, other: Found) -> list[float]:
    """How far the losses are from those of one worker, relative, by step."""
    return [abs(a / b - 1) for a, b in zip(other["losses"], one["losses"], strict=True)]


def same_scales(one: Found, other: Found) -> str:
    """At how many of the steps all scales are the same, clip values to 1e-5; a dash where nothing is remembered."""
    if not one["scales"][0]:
        return "-"
    agree = 0
    for mine, theirs in zip(one["scales"], other["scales"], strict=True):
        pairs = [(a, b) for name in mine for a, b in zip(mine[name], theirs[name], strict=True)]
        agree += all(abs(a - b) <= 1e-5 * abs(a) for a, b in pairs)
    return f"{agree} of {len(one['scales'])}"


def table(found: dict[int, dict[Any, Found]]) -> list[str]:
    one, *others = found
    heads = [f"{n} workers: first step | all steps | scales" for n in others]
    lines = [f"| network | recipe | way | loss of one, last step | {' | '.join(heads)} |"]
    lines.append("|---|---|---|---:|" + "---:|---:|---|" * len(others))
    for case, alone in found[one].items():
        cells = []
        for n in others:
            differences = off(alone, found[n][case])
            cells.append(f"{differences[0]:.0e} | {max(differences):.0e} | {same_scales(alone, found[n][case])}")
        lines.append(f"| {' | '.join(case)} | {alone['losses'][-1]:.5f} | {' | '.join(cells)} |".replace("0e+00", "0"))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--networks", default=";".join(NETWORKS))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--ways", default=";".join(WAYS))
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args(arguments)
    cases = [
        (n, r, w) for n in chosen.networks.split(";") for r in chosen.recipes.split(",") for w in chosen.ways.split(";")
    ]
    print("\n".join(table(measured([int(n) for n in chosen.workers.split(",")], cases, chosen.steps))))


if __name__ == "__main__":
    main()
