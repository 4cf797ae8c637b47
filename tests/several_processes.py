"""Several processes that train together, started once torch has been imported: that takes longer than all that they do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.multiprocessing

PRELOADED = ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint.state_dict")


def together(work: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `work(rank, world, *arguments)` returns in each of `world` processes, which gloo connects.

    Args:
        folder: an empty one.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [*PRELOADED, "fourbit.recipes", "several_processes"]
    )
    torch.multiprocessing.start_processes(
        _work, (str(folder), world, work, arguments), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, folder: str, world: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(work(rank, world, *arguments), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
