"""`Counter`: which random words a layer draws.

A word is a function of (seed, layer, step, slot, use). So words replay after a resume, and in a forward pass that is recomputed
for a backward pass; the uses of a shared layer draw different words for its gradients, the same for its forward operands.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fourbit.ops._contraction import Which
from fourbit.ops._spec import OPERANDS, SLOTS
from fourbit.quantizers import stream_key

_STREAMS = {slot: number for number, slot in enumerate(SLOTS)}
_SUMS = {which: len(SLOTS) + number for number, which in enumerate(OPERANDS)}
_ROTATIONS = {which: len(SLOTS) + len(OPERANDS) + number for number, which in enumerate(OPERANDS)}
_ROWS = {which: len(SLOTS) + 2 * len(OPERANDS) + number for number, which in enumerate(OPERANDS)}


class Counter:
    """Backward passes, in the buffer `step` of the layer: [those seen before, whether one is pending]; and the uses within one.

    Args:
        seed, index: coordinates of the layer.
        layer: has the buffer, if its spec draws words.
    """

    def __init__(self, seed: int, index: int, layer: nn.Module):
        self.seed, self.index = seed, index
        self._buffers = layer._buffers  # not the layer, which would be a circle
        self._known: tuple[int, int] | None = None  # the buffer's: reading it from a GPU would wait for the GPU
        self.uses = 0
        self.piece = 0

    @property
    def _step(self) -> Tensor | None:
        return self._buffers.get("step")

    def begin(self) -> None:
        """A forward pass begins that is no recomputation."""
        self.uses = 0
        step = self._step
        if step is not None:
            step[0] += step[1]
            step[1] = 0
            if self._known is not None:
                self._known = sum(self._known), 0

    def use(self) -> None:
        """One more use in this backward pass."""
        self.uses += 1
        step = self._step
        if step is not None:
            step[1] = 1
            if self._known is not None:
                self._known = self._known[0], 1

    def key(self, slot: str) -> int | None:
        """The key of an operand's words; None where the layer draws none."""
        if self._step is None:
            return None
        return stream_key(self.seed, self.index, self._passes(), _STREAMS[slot], self._use(slot.startswith("g_")))

    def sum_key(self, which: Which) -> int | None:
        """That of a product, for an accumulation that draws words."""
        if self._step is None:
            return None
        return stream_key(self.seed, self.index, self._passes(), _SUMS[which], self._use(which != "fprop"))

    def row_key(self, which: Which) -> int:
        """That of the rows of a gradient that a product is computed with."""
        return stream_key(self.seed, self.index, self._passes(), _ROWS[which], self._use(True))

    def rotation_key(self, which: Which) -> int | None:
        """That of the signs of a product's rotation; the same forward and backward in one step."""
        return None if self._step is None else stream_key(self.seed, self.index, self._passes(), _ROTATIONS[which])

    def reload(self) -> None:
        """The buffer is another now."""
        self._known = None

    def snapshot(self) -> Callable[[], None]:
        """What is known besides the buffer; a call of the result brings it back."""
        before = dict(self.__dict__)
        return lambda: self.__dict__.update(before)

    def _use(self, backward: bool) -> int:
        return self.uses if backward else self.piece

    def _passes(self) -> int:
        if self._known is None:
            step = self._step
            assert step is not None
            passes, pending = step.tolist()
            self._known = passes, pending
        return self._known[0]
