"""What the layers of several processes have to agree on, each of which sees only its share of a batch."""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fourbit.nn._base import quantized_layers


def synchronize(model: nn.Module) -> None:
    """Give the quantized layers of all processes one state. Call it in every process after each backward pass; with one
    process, or outside of torch.distributed, it does nothing. `fourbit train` does so itself.

        PACT         clip values that the first batch decided: those of the first process, or, if any process saw a negative
                     number, signed and those of the first that did; later they move by their gradients, which
                     DistributedDataParallel averages
        GradScale    first exponents: the smallest. Then the votes of all processes are summed: the layer keeps the largest
                     gradient of those that voted as the sum says, -1 (no vote) if none did
        loss scale   the largest gradient of all

    DistributedDataParallel alone copies the buffers of the first process to the others, whose votes are then lost.

    Args:
        model: with the same layers in every process.

    Source: Sun et al., NeurIPS 2020, Fig. 3a (the sum of the workers' votes); the rest is our choice.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    states = [layer.quant for layer in quantized_layers(model).values()]
    with torch.no_grad():
        mine = [state.shared() for state in states]
        if any(each.numel() for each in mine):
            everywhere = _everywhere(torch.cat(mine)).split([each.numel() for each in mine], 1)
            for state, part in zip(states, everywhere, strict=True):
                state.agree(part)


def _everywhere(t: Tensor) -> Tensor:
    """[process, ...]"""
    found = [torch.empty_like(t) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, t.contiguous())
    return torch.stack(found)
