"""What the layers of several processes have to agree on, each of which sees only its share of a batch."""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.nn._base import quantized_layers
from fourbit.nn._layers import Linear
from fourbit.nn._out_control import Channels
from fourbit.nn._parts import Composed
from fourbit.ops import SLOTS, LayerSpec, Matmul
from fourbit.quantizers import BlockScale, QuantSpec, Share, Sharing, StepSize

_OF_SAMPLES = {"x_fprop": (0, 1), "x_wgrad": (0, 3), "g_dgrad": (0, 1), "g_wgrad": (0, 3)}
_OF_GROUPS: dict[str, tuple[int, int]] = dict.fromkeys(SLOTS, (0, 0))
"""Where samples are in an operand: rows, or summed over; of a product of two activations, its groups."""


def synchronize(model: nn.Module) -> None:
    """Give the quantized layers of all processes one state. Call it in every process after each backward pass; with one
    process, or outside of torch.distributed, it does nothing. `fourbit train` does so itself.

        PACT         clip values that the first batch decided: those of the first process, or, if any process saw a negative
                     number, signed and those of the first that did; later they move by their gradients, which
                     DistributedDataParallel averages
        GradScale    first exponents: the smallest. Then the votes of all processes are summed: the layer keeps the largest
                     gradient of those that voted as the sum says, -1 (no vote) if none did
        loss scale   the largest gradient of all

    DistributedDataParallel alone copies the buffers of the first process to the others, whose votes are then lost. Behind
    `share_batch`, the first batch has decided for all processes already, and the vote is that of the largest gradient of all.

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


def share_batch(model: nn.Module, group: distributed.ProcessGroup | None = None) -> None:
    """Compute in several processes what one would with the whole batch, up to the order of sums. Call it in every process,
    behind `convert`; `synchronize` stays behind each backward pass.

    In training passes, and of activations and gradients,

        largest magnitudes, means   are those of the whole batch: an exchange of a few numbers per operand scaled by them
        first batch                 decides clip values, their form and exponents as a whole
        GradScale                   moves by the vote of the largest gradient of all processes
        random words                are those that an element has in the whole batch

    The batch lies in the processes as its consecutive parts, of one size, samples along the first axis, whose number is a
    multiple of the blocks in which wgrad sums over samples. A process's loss is the mean over its part: its gradients are then,
    for n processes, n times what they are in one, and exponents log2(n) lower, which the mean over processes takes back. A loss
    scale and a fixed scale of gradients do not follow that factor.

    A layer cannot see which axis of its input has the samples. Linear layers of [tokens, samples, features] compute other
    numbers than one process, wherever random words, blocks or rotations go by the place of a sample: they are refused in a
    model that has a module with batch_first=False, and in a forward of your own they are yours to avoid.

    Without it each process scales its part by itself, which needs no exchange in the pass.

    Args:
        model: with the same layers in every process, which run in the same order.
        group: the processes that share the batch; None: all.

    Raises:
        UserError: before `init_process_group`, or a layer whose operands depend on the batch in another way.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise UserError("no processes share the batch yet: call torch.distributed.init_process_group first")
    layers = quantized_layers(model)
    composed = [m for m in model.modules() if isinstance(m, Composed)]
    attentions = {part for m in composed if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    in_pieces = {part for m in composed if not isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    sequences_first = next((name for name, m in model.named_modules() if getattr(m, "batch_first", None) is False), "")
    for name, layer in layers.items():
        objection = "runs its products in pieces" if layer in in_pieces else _objection(layer.spec)
        if layer in attentions and _has_places(layer.spec):
            objection = "has tokens before samples, and scales or random words by their place"
        elif sequences_first and isinstance(layer, Linear) and _has_places(layer.spec):
            objection = (
                f"may have tokens before samples, as {sequences_first} has (batch_first=False), and scales or random words by "
                "their place. Build the model with batch_first=True"
            )
        objection = objection or ("has channels of its own" if _has_channels(layer.quant) else "")
        if objection:
            raise UserError(
                f"{name or type(layer).__name__} cannot share a batch: it {objection}. Or train without share_batch, each "
                "process with scales of its part"
            )
    share = Share(group)
    for layer in layers.values():
        layer.quant.sharing = Sharing(share, _OF_GROUPS if isinstance(layer.contraction(), Matmul) else _OF_SAMPLES)


def _has_channels(quant: nn.Module) -> bool:
    return any(isinstance(m, Channels) for m in quant.children())


def _objection(spec: LayerSpec) -> str:
    """What of a spec depends on the batch beyond largest magnitudes and means; "" where nothing does."""
    if spec.compensates:
        return "restores what rounding has lost of a gradient"
    if spec.accumulation is not None and spec.accumulation.stochastic:
        return "draws random words for its sums"
    for slot in SLOTS:
        operand = spec.resolved(slot)
        if slot[0] == "w" or not isinstance(operand, QuantSpec):
            continue
        scaling = operand.scaling
        if isinstance(scaling, StepSize):
            return f"learns the step size of {slot[0]} from the number of its elements"
        if isinstance(scaling, BlockScale) and (scaling.corrected or scaling.draws):
            return f"corrects the scales of {slot[0]}"
        if operand.outliers is not None or operand.leverage is not None:
            return f"parts {slot[0]} by its quantiles or leverage"
    return ""


def _has_places(spec: LayerSpec) -> bool:
    """Whether it matters where a sample lies: random words, and tiles or rotations along samples."""
    for slot in SLOTS:
        operand = getattr(spec, slot)
        if slot[0] == "w" or not isinstance(operand, QuantSpec):  # what is reused lies as it did
            continue
        over_samples = slot.endswith("wgrad")
        size = spec.tile(slot).sums if over_samples else spec.tile(slot).rows
        if operand.stochastic or size not in (None, 1) or (over_samples and operand.transform is not None):
            return True
    return False
