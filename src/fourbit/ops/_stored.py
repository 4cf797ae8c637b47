"""`StoredState`: the tensors that a quantized layer remembers, their names in checkpoints, and how processes agree on them.

It is the child named `quant` of each converted layer, so its tensors appear in the state_dict as `<layer>.quant.*`:

    x_alpha, w_alpha    PACT clip values (Parameters), with x_signed, w_signed: -1 not yet known, 0 unsigned, 1 signed
    g_exponent          log2 of GradScale's multiplier (int32), UNSET before the first gradient
    g_amax              largest scaled gradient since the exponent or the loss scale last moved; -1 where there was none
    step                [backward passes seen, whether one is pending]: the counter of the random words; the uses of a
                        shared layer draw different words for its gradients, the same for its forward operands

One vote per backward pass: backward only records the largest gradient, over all uses of the layer; the exponent moves at
the next training forward outside a backward pass. So every use of a shared layer sees one scale, and recomputation under
gradient checkpointing changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fourbit.ops._product import Products
from fourbit.ops._spec import LayerSpec
from fourbit.quantizers import UNSET, ClipValue, GradScale, QTensor


class Observer(Protocol):
    """Something that watches operands; it must not change them."""

    def record(self, slot: str, x: Tensor, quantized: QTensor) -> None:
        """Called after `x` became `quantized` in `slot`."""
        ...


class StoredState(nn.Module):
    """The tensors of one layer; `LayerState` says what is done with them.

    Args:
        spec, num_channels, seed, index, products: as in `LayerState`.
    """

    products: Products
    x_alpha: nn.Parameter | None
    w_alpha: nn.Parameter | None
    step: Tensor | None
    x_signed: Tensor | None
    w_signed: Tensor | None
    g_exponent: Tensor | None
    g_amax: Tensor | None
    nonfinite: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        num_channels: int,
        seed: int,
        index: int,
        products: Products,
    ):
        super().__init__()
        self.spec, self.seed, self.index = spec, seed, index
        self.products: Products = products
        self.observer: Observer | None = None
        self._signed: dict[str, bool] = {}
        self._undecided = False  # whether the forward pass that awaits its backward decided the form of x
        self._uses = 0
        self._piece = 0
        self._known = False  # whether every exponent is set; a cache, so that it need not be read from memory
        self._count: list[int] | None = None  # `step`, likewise: reading it from a GPU would wait for the GPU
        self._agreed = False  # whether the clip values and exponents of the first batch are those of all processes
        for operand in ("x", "w"):
            operand_spec = getattr(spec, f"{operand}_fprop")
            alpha, signed = None, None
            if operand_spec is not None and operand_spec.scaling.stored_kind == "alpha":
                clip: ClipValue = operand_spec.scaling
                alpha = nn.Parameter(torch.tensor(clip.init or 1.0), requires_grad=clip.learned)
                decided = clip.init is not None and (clip.signed_format is None or operand_spec.format.signed)
                signed = torch.tensor(int(operand_spec.format.signed) if decided else -1, dtype=torch.int8)
            self.register_parameter(f"{operand}_alpha", alpha)
            self.register_buffer(f"{operand}_signed", signed)
        exponent = amax = None
        g_spec = spec.g_scaling
        if g_spec is not None:
            shape = (num_channels,) if g_spec.granularity == "channel" else ()
            amax = torch.full(shape, -1.0)
            if isinstance(g_spec.scaling, GradScale):
                init = g_spec.scaling.init
                exponent = torch.full(shape, UNSET if init is None else init, dtype=torch.int32)
        self.register_buffer("g_exponent", exponent)
        self.register_buffer("g_amax", amax)
        self.register_buffer("step", torch.zeros(2, dtype=torch.int64) if spec.stochastic else None)
        self.register_buffer("nonfinite", torch.zeros(3, dtype=torch.int64), persistent=False)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Whatever the layer does in the block, its state is afterwards what it was."""
        restore = self.snapshot()
        try:
            yield
        finally:
            restore()

    def snapshot(self) -> Callable[[], None]:
        """What the layer remembers now; a call of the result brings it back."""
        tensors = [(t, t.detach().clone()) for t in (*self.parameters(), *self.buffers())]
        signed, undecided, uses, known = dict(self._signed), self._undecided, self._uses, self._known
        count, agreed = None if self._count is None else list(self._count), self._agreed

        def restore() -> None:
            with torch.no_grad():
                for tensor, before in tensors:
                    tensor.copy_(before)
            self._signed, self._undecided, self._uses, self._known = dict(signed), undecided, uses, known
            self._count, self._agreed = None if count is None else list(count), agreed

        return restore

    def shared(self) -> Tensor:
        """What this process tells the others of the layer after a backward pass: see `fourbit.nn.synchronize`.

        float64, flat: `g_amax`; and until all processes have the first batch's decisions, those, as `_decisions` lists them.
        """
        known = [] if self._agreed else self._decisions()
        parts = [t.detach().flatten().double() for t in (self.g_amax, *known) if t is not None]
        return torch.cat(parts) if parts else self.nonfinite.new_empty(0, dtype=torch.float64)

    def agree(self, everywhere: Tensor) -> None:
        """Take over what all processes together decide.

        Args:
            everywhere: `shared()` of each, along a first axis.
        """
        wanted = [self.g_amax, *([] if self._agreed else self._decisions())]
        wanted = [t for t in wanted if t is not None]
        parts = everywhere.split([t.numel() for t in wanted], 1)
        told = [part.reshape(-1, *t.shape).to(t.dtype) for t, part in zip(wanted, parts, strict=True)]
        if self.g_amax is not None:
            self._agree_on_vote(told.pop(0))
        if not self._agreed:
            self._agree_on_first_batch(told)

    def _decisions(self) -> list[Tensor]:
        """What the first batch decides: of x and of w, where they have a clip value, its form and itself; the exponents."""
        found = (self.x_signed, self.x_alpha, self.w_signed, self.w_alpha, self.g_exponent)
        return [t for t in found if t is not None]

    def _agree_on_vote(self, everywhere: Tensor) -> None:
        """The largest gradient of the processes that voted as the sum of the votes says; -1 (no vote) if none did."""
        amax, g_spec = self.g_amax, self.spec.g_scaling
        assert amax is not None and g_spec is not None
        if isinstance(g_spec.scaling, GradScale):
            votes = g_spec.scaling.vote(everywhere)
            everywhere = torch.where(votes == votes.sum(0).sign(), everywhere, -1.0)
        amax.copy_(everywhere.amax(0))

    def _agree_on_first_batch(self, everywhere: list[Tensor]) -> None:
        """Signed if any process saw a negative number, the clip value of the first that says so; the smallest exponents."""
        decided = []
        for operand in ("x", "w"):
            alpha, signed = getattr(self, f"{operand}_alpha"), getattr(self, f"{operand}_signed")
            if alpha is None:
                continue
            forms, values = everywhere.pop(0), everywhere.pop(0)
            form = int(forms.max())
            signed.fill_(form)
            alpha.copy_(values[int((forms == form).to(torch.int8).argmax())])
            if form >= 0:
                self._signed[operand] = bool(form)
            decided.append(form >= 0)
        if self.g_exponent is not None:
            exponents = everywhere.pop(0)
            smallest = torch.where(exponents == UNSET, torch.iinfo(torch.int32).max, exponents).amin(0)
            self.g_exponent.copy_(torch.where((exponents == UNSET).all(0), UNSET, smallest))
            self._known = not bool((self.g_exponent == UNSET).any())
            decided.append(self._known)
        self._agreed = all(decided)

    def _form_known(self, operand: str) -> bool:
        """Whether a batch has decided between PACT's two forms; read from the buffer once, as after a resume."""
        signed: Tensor = getattr(self, f"{operand}_signed")
        if operand not in self._signed and int(signed) >= 0:
            self._signed[operand] = bool(signed)
        return operand in self._signed

    def _exponents_known(self) -> bool:
        """Whether every exponent is set, likewise."""
        if not self._known and self.g_exponent is not None:
            self._known = not bool((self.g_exponent == UNSET).any())
        return self._known

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float checkpoint has none of these tensors: then the state stays as it is, and nothing counts as missing."""
        self._signed.clear()
        self._undecided = self._known = self._agreed = False
        self._count = None
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredState:
        """Moves between devices, but keeps float32: scales span more than half precision's range."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)
