"""`StoredState`: the tensors that a quantized layer remembers, their names in checkpoints, and how processes agree on them.

It is the child named `quant` of each converted layer, so its tensors appear in the state_dict as `<layer>.quant.*`:

    x_alpha, w_alpha    PACT clip values (Parameters of one element, which FSDP can shard); 0 until a batch decides
    x_form, w_form      [unsigned, signed]: 1 for the form that the first batch decided, both 0 before. In an average of
                        state_dicts that began earlier, form and clip value are too small by one factor: their quotient counts
    x_floor, w_floor    half the clip value of the last training pass: what replaces one that an optimizer took to 0 or below
    g_exponent          log2 of GradScale's multiplier, UNSET before the first gradient; a number that is no exponent, as an
                        average with UNSET, counts as UNSET
    g_amax              largest scaled gradient since the exponent or the loss scale last moved; -1 where there was none
    step                [backward passes seen, whether one is pending]: the counter of the random words; the uses of a
                        shared layer draw different words for its gradients, the same for its forward operands

One vote per backward pass: backward only records the largest gradient, over all uses of the layer; the exponent moves at
the next training forward outside a backward pass. So every use of a shared layer sees one scale, and recomputation under
gradient checkpointing changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fourbit.ops._product import Products
from fourbit.ops._spec import LayerSpec
from fourbit.quantizers import UNSET, ClipValue, GradScale, QTensor, is_exponent


class Observer(Protocol):
    """Something that watches operands; it must not change them."""

    def record(self, slot: str, x: Tensor, quantized: QTensor) -> None:
        """Called after `x` became `quantized` in `slot`."""
        ...


_PLAIN = frozenset(("with_gradients", "_undecided", "_uses", "_piece", "_known"))
"""Attributes that every pass writes; nn.Module would take a while to see that they are no parameters."""


class StoredState(nn.Module):
    """The tensors of one layer; `LayerState` says what is done with them.

    Args:
        spec, num_channels, seed, index, products: as in `LayerState`.
    """

    products: Products
    x_alpha: nn.Parameter | None
    w_alpha: nn.Parameter | None
    step: Tensor | None
    x_form: Tensor | None
    w_form: Tensor | None
    x_floor: Tensor | None
    w_floor: Tensor | None
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
        self.with_gradients = True  # whether this forward pass records for a backward pass: only such passes decide
        self._signed: dict[str, bool] = {}
        self._trial: dict[str, tuple[bool, float]] = {}  # form and clip value of the first pass without gradients
        self._undecided = False  # whether the forward pass that awaits its backward decided the form of x
        self._uses = 0
        self._piece = 0
        self._known = False  # whether every exponent is set; a cache, so that it need not be read from memory
        self._count: list[int] | None = None  # `step`, likewise: reading it from a GPU would wait for the GPU
        self._clipped: list[str] = []
        self._agreed = False  # whether the clip values and exponents of the first batch are those of all processes
        for operand in ("x", "w"):
            operand_spec = getattr(spec, f"{operand}_fprop")
            alpha = form = floor = None
            if operand_spec is not None and operand_spec.scaling.stored_kind == "alpha":
                clip: ClipValue = operand_spec.scaling
                signed = operand_spec.format.signed
                decided = clip.init is not None and (clip.signed_format is None or signed)
                form = torch.tensor([decided and not signed, decided and signed], dtype=torch.float32)
                alpha = nn.Parameter(form.sum(0, keepdim=True) * (clip.init or 0.0), requires_grad=clip.learned)
                floor = alpha.detach() / 2
                self._clipped.append(operand)
            self.register_parameter(f"{operand}_alpha", alpha)
            self.register_buffer(f"{operand}_form", form)
            self.register_buffer(f"{operand}_floor", floor)
        exponent = amax = None
        g_spec = spec.g_scaling
        if g_spec is not None:
            shape = (num_channels,) if g_spec.in_tiles else ()
            amax = torch.full(shape, -1.0, dtype=torch.float32)
            if isinstance(g_spec.scaling, GradScale):
                init = g_spec.scaling.init
                exponent = torch.full(shape, UNSET if init is None else init, dtype=torch.float32)
        self.register_buffer("g_exponent", exponent)
        self.register_buffer("g_amax", amax)
        self.register_buffer("step", torch.zeros(2, dtype=torch.int64) if spec.stochastic else None)
        self.register_buffer("nonfinite", torch.zeros(3, dtype=torch.int64), persistent=False)

    @property
    def x_signed(self) -> Tensor | None:
        """The form of x, int8: -1 not yet known, 0 unsigned, 1 signed; None without a clip value."""
        return _signed(self.x_form)

    @property
    def w_signed(self) -> Tensor | None:
        """Likewise of w."""
        return _signed(self.w_form)

    def freeze(self) -> None:
        """The layer's weight is not trained: neither are its clip values, unless somebody says so."""
        for alpha in self.parameters():
            alpha.requires_grad_(False)

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
        trial = dict(self._trial)
        inner = [m.snapshot() for m in self.modules() if m is not self and isinstance(m, StoredState)]

        def restore() -> None:
            for back in inner:
                back()
            with torch.no_grad():
                for tensor, before in tensors:
                    tensor.copy_(before)
            self._signed, self._undecided, self._uses, self._known = dict(signed), undecided, uses, known
            self._count, self._agreed = None if count is None else list(count), agreed
            self._trial = dict(trial)

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
            amax = told.pop(0)
            if not self._agreed and self.g_exponent is not None:
                amax = _rescaled(amax, told[-1])
            self._agree_on_vote(amax)
        if not self._agreed:
            self._agree_on_first_batch(told)

    def _decisions(self) -> list[Tensor]:
        """What the first batch decides: of x and of w, where they have a clip value, its form and itself; the exponents."""
        found: list[Tensor | None] = []
        for operand in self._clipped:
            alpha, floor = getattr(self, f"{operand}_alpha"), getattr(self, f"{operand}_floor")
            found += [getattr(self, f"{operand}_form"), 2 * floor if is_shard(alpha) else alpha]
        return [t for t in (*found, self.g_exponent) if t is not None]

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
        for operand in self._clipped:
            forms, values = everywhere.pop(0), everywhere.pop(0)
            known, signed = forms.sum(1) > 0, bool((forms[:, 1] > 0).any())
            says_so = known & ((forms[:, 1] > 0) == signed)
            if says_so.any():
                self._decide(operand, signed, float(values[int(says_so.to(torch.int8).argmax())]))
            decided.append(bool(says_so.any()))
        if self.g_exponent is not None:
            self.g_exponent.copy_(_smallest(everywhere.pop(0)))
            self._known = not bool((self.g_exponent == UNSET).any())
            decided.append(self._known)
        self._agreed = all(decided)

    def _decide(self, operand: str, signed: bool, value: float) -> None:
        """Form and clip value of an operand, once for all."""
        form, floor = getattr(self, f"{operand}_form"), getattr(self, f"{operand}_floor")
        with torch.no_grad():
            form[0], form[1] = float(not signed), float(signed)
            floor.fill_(value / 2)
        self._write(operand, torch.full_like(floor, value))
        self._signed[operand] = signed
        self._trial.pop(operand, None)

    def _write(self, operand: str, value: Tensor) -> None:
        """Set a clip value; of a sharded one, the process that has it."""
        alpha: Tensor = getattr(self, f"{operand}_alpha").detach()
        alpha = alpha.to_local() if is_shard(alpha) else alpha  # type: ignore[attr-defined]
        if alpha.numel():
            alpha.copy_(value)

    def __setattr__(self, name: str, value: Any) -> None:
        """FSDP puts a parameter's shard in the place of the whole by an assignment. What a forward pass has set (a first clip
        value, one in the place of a negative one) would be lost with the whole: here the shard gets it."""
        if name in _PLAIN:
            self.__dict__[name] = value
            return
        whole = self._parameters.get(name) if name.endswith("_alpha") and "_parameters" in self.__dict__ else None
        super().__setattr__(name, value)
        if whole is not None and is_shard(value) and not is_shard(whole):
            shard = value.detach().to_local()
            if shard.numel():
                shard.copy_(torch.where(shard <= 0, whole.detach(), shard))

    def _form_of(self, operand: str) -> bool | None:
        """PACT's form, whether signed; None where no batch has decided yet. Read from the buffer once, as after a resume."""
        if operand not in self._signed:
            form: Tensor = getattr(self, f"{operand}_form")
            unsigned, signed = form.tolist()
            if not unsigned + signed > 0:
                return None
            if unsigned + signed != 1:
                if not self.training:
                    return signed >= unsigned
                alpha: Tensor = getattr(self, f"{operand}_alpha")
                self._decide(operand, signed >= unsigned, float(alpha.detach()) / (unsigned + signed))
            self._signed[operand] = signed >= unsigned
        return self._signed[operand]

    def _exponents_known(self) -> bool:
        """Whether every exponent is set, likewise; one that is none becomes UNSET."""
        exponent = self.g_exponent
        if not self._known and exponent is not None:
            with torch.no_grad():
                exponent.copy_(torch.where(is_exponent(exponent), exponent, UNSET))
            self._known = not bool((exponent == UNSET).any())
        return self._known

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float checkpoint has none of these tensors: then the state stays as it is, and nothing counts as missing."""
        upgrade(state_dict, prefix)
        self._signed.clear()
        self._trial.clear()
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


def upgrade(tensors: MutableMapping[str, Any], prefix: str) -> None:
    """Give a layer's part of a state_dict of an earlier version, under `prefix`, today's form: there clip values were 0-d, and
    `x_signed` was -1 where none was decided, 0 unsigned, 1 signed."""
    for operand in ("x", "w"):
        alpha, signed = (tensors.get(f"{prefix}{operand}_{name}") for name in ("alpha", "signed"))
        if alpha is not None and alpha.dim() == 0:
            tensors[f"{prefix}{operand}_alpha"] = alpha = alpha.detach().view(1)
        if alpha is not None and signed is not None:
            del tensors[f"{prefix}{operand}_signed"]
            form = torch.stack((signed == 0, signed == 1)).to(torch.float32)
            tensors[f"{prefix}{operand}_form"] = form
            tensors[f"{prefix}{operand}_alpha"] = alpha * form.sum()
            tensors[f"{prefix}{operand}_floor"] = (alpha * form.sum()).abs() / 2


def is_shard(t: Tensor) -> bool:
    """Whether it is a tensor that several processes share (a DTensor)."""
    return hasattr(t, "to_local")


def _signed(form: Tensor | None) -> Tensor | None:
    if form is None:
        return None
    signed = (form[1] >= form[0]).to(torch.int8)
    return torch.where(form.sum() > 0, signed, signed.new_tensor(-1))


def _smallest(exponents: Tensor) -> Tensor:
    """The smallest of several processes' exponents, along the first axis; UNSET where none has one."""
    unset = exponents == UNSET
    return torch.where(unset.all(0), UNSET, torch.where(unset, math.inf, exponents).amin(0))


def _rescaled(amax: Tensor, exponents: Tensor) -> Tensor:
    """Largest gradients of several processes, each scaled by its own exponent, as the one they agree on scales them."""
    known = (exponents != UNSET) & (amax > 0)
    return torch.where(known, amax * torch.exp2(torch.where(known, _smallest(exponents) - exponents, 0.0)), amax)
