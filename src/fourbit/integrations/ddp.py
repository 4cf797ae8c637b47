"""Gradients of several processes, exchanged in 4 or 8 bits.

    model = DistributedDataParallel(fourbit.convert(net, "ibm2020"))
    exchange = compress_gradients(model, "int4_sym")           # in every process, before the first backward pass
    ...
    exchange.sent_bytes, exchange.plain_bytes                  # what this process has sent, and what float32 would have taken

DistributedDataParallel's mean of gradients takes two exchanges, each of them in `format`, with one scale for 256 numbers:

    1. every process sends each other one the part of the gradients that this one is to sum (all-to-all)
    2. every process sends the mean of its part to all (all-gather)

What rounding has lost is added to the gradients of the next step (error feedback), in both exchanges, so that the sum over
steps of what the processes have got differs from the exact sum by one step's rounding.

Sources: Seide et al., 1-bit stochastic gradient descent, Interspeech 2014 (error feedback); Wang et al., ZeRO++, arXiv
2306.10209 (two quantized exchanges). Which bits go where is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fourbit import formats
from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.quantizers import round_to_format

BLOCK = 256
"""Numbers that share a scale, max|x| / format.max in float32."""


class CompressedExchange:
    """What `compress_gradients` gives.

    Attributes:
        sent_bytes: what this process has sent so far.
        plain_bytes: what it would have sent for the same in float32, by the same two exchanges.
    """

    def __init__(self, format: Format, error_feedback: bool, names: Mapping[nn.Parameter, str]):
        self.format, self.error_feedback = format, error_feedback
        self.sent_bytes = self.plain_bytes = 0
        self._names = names
        self._residuals: dict[str, Tensor] = {}
        self._grid = torch.tensor(format.grid, dtype=torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """What waits to be added to this process's gradients of the next step, by parameter: an exact resume needs it."""
        return dict(self._residuals)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._residuals = {name: t.clone() for name, t in state.items()}

    def mean(self, bucket: Any, group: dist.ProcessGroup) -> Tensor:
        """The mean over all processes of a `GradBucket`, flat; the same in all of them."""
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        gradients = bucket.buffer()
        parts = [(self._names[p], g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        n = gradients.numel()
        share = -(-n // (world * BLOCK)) * BLOCK
        mine = gradients.new_zeros(world * share, dtype=torch.float32)
        mine[:n] = gradients
        places, start = [], 0
        for name, g in parts:  # a bucket's gradients lie one behind the other
            places.append((name, slice(start, start + g.numel())))
            start += g.numel()
        if self.error_feedback:
            for name, place in places:
                if name in self._residuals:
                    mine[place] += self._residuals[name]
        codes, scales = self._encode(mine)
        lost = mine - self._decode(codes, scales)
        theirs = self._decode(*(self._all_to_all(t.view(world, -1), group) for t in (codes, scales)))
        mean = theirs.view(world, share).sum(0) / world
        codes, scales = self._encode(mean)
        lost[rank * share : (rank + 1) * share] += world * (mean - self._decode(codes, scales))
        if self.error_feedback:
            for name, place in places:
                self._residuals[name] = lost[place].clone()
        whole = self._decode(*(self._all_gather(t, group) for t in (codes, scales)))
        self.plain_bytes += 2 * (world - 1) * share * 4
        return whole[:n].to(gradients.dtype)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, uint8, two to a byte where they have 4 bits; scales, float32. NaN or infinity make their block's scale NaN."""
        blocks = x.view(-1, BLOCK)
        amax = blocks.abs().amax(1)
        scales = (amax / self.format.max).clamp_min(torch.finfo(torch.float32).tiny) + amax * 0
        grid = self._grid.to(x.device)
        rounded = round_to_format((blocks / scales.unsqueeze(1)).nan_to_num(0.0), self.format)
        codes = torch.bucketize(rounded, grid).to(torch.uint8).view(-1)
        return (codes[0::2] | codes[1::2] << 4 if self.format.bits <= 4 else codes), scales

    def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        codes = codes.view(-1)
        if self.format.bits <= 4:
            codes = torch.stack((codes & 15, codes >> 4), 1).view(-1)
        numbers = self._grid.to(codes.device)[codes.to(torch.int64)]
        return (numbers.view(-1, BLOCK) * scales.view(-1, 1)).view(-1)

    def _all_to_all(self, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        """`t` [world, ...], a row for each process -> the rows that they have for this one."""
        out = torch.empty_like(t)
        dist.all_to_all_single(out, t.contiguous(), group=group)
        self.sent_bytes += (len(t) - 1) * t[0].numel() * t.element_size()
        return out

    def _all_gather(self, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        """`t`, flat, of all processes, one behind the other."""
        world = dist.get_world_size(group)
        out = t.new_empty(world * t.numel())
        dist.all_gather_into_tensor(out, t.contiguous(), group=group)
        self.sent_bytes += (world - 1) * t.numel() * t.element_size()
        return out


def compress_gradients(
    model: DistributedDataParallel, format: str | Format = "fp8_152", *, error_feedback: bool = True
) -> CompressedExchange:
    """Exchange the gradients of a DistributedDataParallel in few bits from now on.

    Args:
        model: before its first backward pass, in every process.
        format: of at most 8 bits, symmetric, with zero: "fp8_152", "int4_sym".
        error_feedback: add what rounding has lost to the gradients of the next step.

    Raises:
        UserError: the model is no DistributedDataParallel, or a format that this is not for.
    """
    if not isinstance(model, DistributedDataParallel):
        raise UserError(
            f"gradients are exchanged by a DistributedDataParallel, not by a {type(model).__name__}: wrap the model first"
        )
    found = formats.get(format)
    if found.bits > 8 or 0.0 not in found.grid or found.min != -found.max:
        raise UserError(
            f"gradients are exchanged in a symmetric format with zero of at most 8 bits, not in {found.name}: choose fp8_152 "
            "or int4_sym"
        )
    names = {p: name for name, p in model.module.named_parameters()}
    exchange = CompressedExchange(found, error_feedback, names)

    def hook(group, bucket):  # torch looks at annotations, and takes no strings
        done = torch.futures.Future()
        done.set_result(exchange.mean(bucket, group))
        return done

    model.register_comm_hook(model.process_group, hook)
    return exchange
