"""`ScalingState`: what a scaling remembers of one operand of a layer, from one batch to the next.

A scaling that remembers something is two classes in one file: the frozen description, with `state_class`, and what a layer
keeps for it. Its tensors are parameters and buffers of the layer's state, named `<operand>_<name>` ("x_alpha", "g_exponent"):
checkpoints, `.to`, optimizers and FSDP find them there, and this class finds them by `Stored`.

    forward     begin -> use (x: format and what `Scaling.of` gets as `stored`) -> saw
    backward    see (max|g|), or, where `is_known`, one read of g -> saw
    processes   votes (of each backward pass), decisions (of the first batch) -> agree
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fourbit.formats import Format
from fourbit.quantizers._share import Share


class Pass(Protocol):
    """The pass in which an operand is met."""

    training: bool
    """Of the layer."""
    with_gradients: bool
    """Whether the forward pass records for a backward pass: only such passes decide something for good."""

    def share_of(self, operand: str) -> Share | None:
        """The process's share in an operand, if what is decided is decided by the whole batch."""
        ...


class Stored:
    """A tensor of a ScalingState: where the layer has it now."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, state: ScalingState, owner: type | None = None) -> Any:
        tensors, key = state.places[self.name]
        return tensors[key]


class ScalingState:
    """Base class; of most methods what is here suits a state that needs none of them.

    Args:
        scaling, format: as in the operand's QuantSpec.
        shape: () for one number per tensor, (channels,) where output channels have their own.
        layer: gets the tensors.
        operand: "x", "w" or "g".

    Attributes:
        scaling: as above; `LayerState.respec` may set another one of its class.
        parameter: what the optimizer trains, if anything; its gradient is `Scaling`'s to define.
    """

    def __init__(self, scaling: Any, format: Format, shape: tuple[int, ...], layer: nn.Module, operand: str):
        self.scaling, self.shape, self.operand = scaling, shape, operand
        self.places: dict[str, tuple[MutableMapping[str, Any], str]] = {}  # without the layer: that would be a circle
        self._trained: tuple[MutableMapping[str, Any], str] | None = None
        for name, tensor in self.tensors(format).items():
            trained, key = isinstance(tensor, nn.Parameter), f"{operand}_{name}"
            home = layer._parameters if trained else layer._buffers
            if key not in home:  # another state of the operand may have it already
                (layer.register_parameter if trained else layer.register_buffer)(key, tensor)  # type: ignore[arg-type]
            self.places[name] = home, key
            if trained:
                self._trained = home, key

    def tensors(self, format: Format) -> dict[str, Tensor]:
        """Name and first value of each tensor, at most one of them a Parameter. An empty one takes the shape that a
        checkpoint has."""
        return {}

    @property
    def parameter(self) -> nn.Parameter | None:
        """The trained tensor."""
        if self._trained is None:
            return None
        tensors, key = self._trained
        return tensors[key]

    # ---- in a step ----

    def begin(self, now: Pass) -> None:
        """A forward pass begins (not one that is recomputed for a backward pass): apply what the last step has left."""

    def use(self, x: Tensor, format: Format, now: Pass) -> tuple[Format, Tensor | None]:
        """Of x or w, met in full precision: the format to use, and `stored` for the scaling. May decide what is still open."""
        return format, None

    def see(self, amax: Tensor, now: Pass) -> Tensor | None:
        """Of g: `stored`, from the largest magnitude of a gradient, which is taken note of."""
        return None

    def saw(self, amax: Tensor | float, now: Pass) -> None:
        """An operand that was quantized with `stored` had this largest magnitude. Recomputed passes say so, too."""

    @property
    def stored(self) -> Tensor | None:
        """What the scaling gets, where it is known."""
        return None

    @property
    def is_known(self) -> bool:
        """Of g: whether `stored` is known before the gradient is, so that one read of it does."""
        return False

    def awaits(self, now: Pass) -> bool:
        """Whether something is to be decided by the first training batch, and is not yet."""
        return False

    def clip_ahead(self, format: Format, now: Pass) -> tuple[Format, Tensor] | None:
        """Format and clip value, where a node before the layer may clip and round by them; None where it may not."""
        return None

    def settle(self) -> None:
        """No backward pass will come for the forward pass that decided something."""

    @property
    def is_fresh(self) -> bool:
        """Whether a forward pass whose backward pass is to come has just decided something."""
        return False

    def format_of(self, format: Format, now: Pass) -> Format:
        """The format that the operand has, where the spec says `format`."""
        return format

    def fullness(self) -> float:
        """Largest gradient over the largest number of the format since the last call, for a loss scale; 0 without any."""
        return 0.0

    # ---- between processes, in files, on pages ----

    def votes(self) -> list[Tensor]:
        """What every process tells the others after each backward pass."""
        return []

    def decisions(self) -> list[Tensor]:
        """What it tells them until all have decided: the first batch's."""
        return []

    def agree(self, votes: list[Tensor], decisions: list[Tensor] | None) -> bool:
        """Take over what all processes together decide, [process, ...] each; whether the first batch's is settled now.

        Args:
            decisions: None: that is settled long since.
        """
        return True

    def reload(self) -> None:
        """The tensors are others now: forget what was concluded from them."""

    @classmethod
    def upgrade(cls, tensors: MutableMapping[str, Any], prefix: str) -> None:
        """Give the operand's part of an earlier version's state_dict, under `prefix`, today's form."""

    def numbers(self) -> dict[str, float | int | None]:
        """What a run records of it, by name; None where it is not known yet."""
        return {}

    def __str__(self) -> str:
        return ""

    # ---- for subclasses ----

    def snapshot(self) -> Callable[[], None]:
        """What is concluded from the tensors; a call of the result brings it back. (Attributes are not changed in place.)"""
        before = dict(self.__dict__)
        return lambda: self.__dict__.update(before)

    def write(self, value: Tensor) -> None:
        """Set the trained tensor; of a sharded one the part that this process has."""
        parameter = self.parameter
        assert parameter is not None
        target = parameter.detach()
        if is_shard(target):
            value, target = _own_part(value, target), target.to_local()  # type: ignore[attr-defined]
        if target.numel():
            target.copy_(value)

    def reshard(self, whole: Tensor, shards: Any) -> None:
        """FSDP has put shards in the place of the trained tensor. What a forward pass has set in the whole (a first value, one
        in the place of a negative one) would be lost with it: here the shard gets it. Values not above 0 are none."""
        shard = shards.detach().to_local()
        if shard.numel():
            shard.copy_(torch.where(shard <= 0, _own_part(whole.detach(), shards), shard))


def is_shard(t: Tensor) -> bool:
    """Whether it is a tensor that several processes share (a DTensor)."""
    return hasattr(t, "to_local")


def in_backward() -> bool:
    """Whether a backward pass is running: then a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _own_part(whole: Tensor, shards: Any) -> Tensor:
    """This process's part of a tensor that all have whole."""
    if whole.numel() == 1:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, shards.device_mesh, shards.placements, src_data_rank=None).to_local()
