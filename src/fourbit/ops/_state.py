"""`LayerState`: what one quantized layer remembers, and when.

It is the child named `quant` of each converted layer. What a scaling remembers of x, w or g is a `ScalingState` of that
scaling's own; its tensors are the layer's, so that they appear in the state_dict as `<layer>.quant.*`:

    x_alpha, x_form, x_floor    PACT (`fourbit.quantizers.ClipState`); likewise w_*
    g_exponent, g_amax          GradScale (`ExponentState`); g_amax alone: a loss scale (`LargestGradient`)
    step                        [backward passes seen, whether one is pending]: the counter of the random words (`Counter`)

Its children, if any, are what the recipe looks after from step to step (`fourbit.nn.Upkeep`).
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fourbit.backends import Plans
from fourbit.errors import UserError
from fourbit.ops._counter import Counter
from fourbit.ops._product import Products
from fourbit.ops._spec import LayerSpec
from fourbit.quantizers import QTensor, QuantSpec, ScalingState, Share, Sharing, Slice, in_backward, is_shard


class Observer(Protocol):
    """Something that watches operands; it must not change them."""

    def record(self, slot: str, x: Tensor, quantized: QTensor) -> None:
        """Called after `x` became `quantized` in `slot`."""
        ...


_states: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
_next_handle = itertools.count()


def _enter(state: LayerState) -> int:
    handle = next(_next_handle)
    _states[handle] = state
    return handle


def state_of(handle: int) -> LayerState:
    """The living state with that handle."""
    return _states[handle]


class LayerState(nn.Module):
    """State of one layer.

    Args:
        spec: the layer's six slots.
        num_channels: output channels, for per-channel GradScale.
        seed, index: coordinates of the layer's random words.
        products: how backends may multiply, "fast" or "exact" (see `fourbit.ops.Products`).

    Attributes:
        scalings: what is remembered of "x", "w" and "g"; without those of which nothing ever was.
        counter: of the random words.
        nonfinite: tensors of x, w and g with NaN or infinity, counted; not in checkpoints.
        plans: what kernels have said to its products.
        with_gradients: whether this forward pass records for a backward pass: only such passes decide something for good.
        fuse: whether the layer may leave its product to the normalization behind it (`fourbit.chains`).
        is_identity: whether nothing is quantized: the layer then runs torch's own code.
        awaits_scheduler: whether its recipe has phases that no `Scheduler` has carried out so far.
        sharing: of which operands this process has parts, if scales are those of the whole (`fourbit.share_batch`).
        wants_float: whether its input was needed as a tensor, too, when it came as codes; then both come out of one pass.
    """

    nonfinite: Tensor
    fuse = True
    awaits_scheduler = False
    wants_float = False
    sharing: Sharing | None = None

    def __init__(
        self,
        spec: LayerSpec,
        num_channels: int = 1,
        seed: int = 0,
        index: int = 0,
        products: Products = "fast",
    ):
        super().__init__()
        self.products: Products = products
        self.plans = Plans()
        self.observer: Observer | None = None
        self.with_gradients = True
        self.scalings: dict[str, ScalingState] = {}
        self.counter = Counter(seed, index, self)
        self._num_channels, self._is_frozen = num_channels, False
        self._agreed = False  # whether what the first batch decided is the same in all processes
        self._made: list[ScalingState] = []
        self._prepare(spec, "cpu")
        self.register_buffer("nonfinite", torch.zeros(3, dtype=torch.int64), persistent=False)
        self._take(spec)

    # ---- the spec ----

    def prepare(self, spec: LayerSpec) -> None:
        """Make the tensors that another spec will need, for `respec` later. Call it before the optimizer is made, which is to
        train the clip values among them.

        Raises:
            UserError: a scale per channel in place of one per tensor, or the other way round.
        """
        self._prepare(spec, self.nonfinite.device)

    def respec(self, spec: LayerSpec) -> None:
        """Another spec from the next forward pass on. What the layer remembers stays, also where the new spec does not use it;
        what it has not remembered so far starts afresh, as after `convert`. A checkpoint then has its tensors, too.

        Raises:
            UserError: the spec needs a trained tensor of which no optimizer can know yet (see `prepare`), or as there.
        """
        if spec == self.spec:
            return
        for operand, wanted in spec.remembering().items():
            state = None if self._found(operand, wanted) else self._new(operand, wanted, nn.Module())
            trained = None if state is None or self._is_frozen else state.parameter
            if trained is not None and trained.requires_grad:
                raise UserError(
                    f"{wanted.scaling} of {operand} is trained, and no optimizer knows of it: call layer.quant.prepare(spec) "
                    "for the later spec before the optimizer is made"
                )
        self.prepare(spec)
        self._take(spec)

    def _prepare(self, spec: LayerSpec, device: torch.device | str) -> None:
        for operand, wanted in spec.remembering().items():
            if not self._found(operand, wanted):
                self._made.append(self._new(operand, wanted, self))
        if spec.stochastic and self._buffers.get("step") is None:
            self.register_buffer("step", torch.zeros(2, dtype=torch.int64))
        if torch.device(device).type != "cpu":
            self.to(device)
        if self._is_frozen:
            self.freeze()

    def _take(self, spec: LayerSpec) -> None:
        for operand, wanted in spec.remembering().items():
            state = self._found(operand, wanted)
            assert state is not None
            if self.scalings.get(operand) not in (None, state):
                state.reload()  # others have used the tensors that both have
                self._agreed = False
            state.scaling = wanted.scaling
            self.scalings[operand] = state
        self._active = [self.scalings[operand] for operand in spec.remembering()]  # of this spec
        self.spec, self.is_identity = spec, spec.is_identity
        self.handle = _enter(self)  # a compiled graph holds for one spec
        if self.sharing is not None and self.sharing.in_evaluation:
            self.sharing = None  # whether parts of a layer do for a spec is looked at anew

    def _found(self, operand: str, wanted: QuantSpec) -> ScalingState | None:
        for state in self._made:
            if state.operand == operand and type(state) is wanted.scaling.state_class:
                if state.shape != self._shape(wanted):
                    raise UserError(
                        f"{operand} would have its scales per {wanted.granularity}, where the layer remembers others: convert "
                        "again"
                    )
                return state
        return None

    def _shape(self, wanted: QuantSpec) -> tuple[int, ...]:
        return (self._num_channels,) if wanted.in_tiles else ()

    def _new(self, operand: str, wanted: QuantSpec, home: nn.Module) -> ScalingState:
        assert wanted.scaling.state_class is not None
        return wanted.scaling.state_class(wanted.scaling, wanted.format, self._shape(wanted), home, operand)

    def parameter(self, operand: str) -> nn.Parameter | None:
        """What is trained of the scale of "x" or "w": PACT's clip value; None without one."""
        state = self.scalings.get(operand)
        return None if state is None else state.parameter

    def freeze(self) -> None:
        """The layer's weight is not trained: neither are its clip values, unless somebody says so."""
        self._is_frozen = True
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    # ---- in a step ----

    def begin(self, has_x: bool = False) -> None:
        """Start of a forward pass: apply what the last backward pass has left.

        Args:
            has_x: the node before, which has quantized x, has begun for it.
        """
        counter = self.counter
        counter.piece = 0
        if in_backward():
            return  # recomputation
        if self.training and counter.uses:
            if self.awaits_scheduler:
                raise UserError(
                    "this recipe has phases: make scheduler = fourbit.scheduler(model, recipe, total_steps) once, and call "
                    "scheduler.at(step) before the forward pass of each step"
                )
            for upkeep in self._modules.values():
                upkeep.require()  # type: ignore[union-attr,operator]
        counter.begin()
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._begin(has_x)
        else:  # as in every node of autograd
            self._begin(has_x)

    def _begin(self, has_x: bool) -> None:
        for state in self._active:
            if not (has_x and state.operand == "x"):
                state.begin(self)

    @property
    def toward(self) -> Tensor | None:
        """The running average to whose side the weight is rounded, in the shape in which fprop has it, where there is one."""
        average, channels = (self._modules.get(name) for name in ("average", "channels"))
        mean = None if average is None else average.toward()  # type: ignore[operator]
        parts = None if channels is None or mean is None else channels.parts()  # type: ignore[operator]
        return mean if parts is None or mean is None else mean.index_select(1, parts[0])

    def settle(self) -> None:
        """No backward pass will come for the forward pass that decided something: the next one may use it in full."""
        for state in self.scalings.values():
            state.settle()

    def count_nonfinite(self, slot: str, t: Tensor | float) -> None:
        """Count NaN or infinity in an operand, of which `t` is the largest magnitude (or largest magnitudes)."""
        if isinstance(t, Tensor):
            self.nonfinite["xwg".index(slot[0])] += (~t.isfinite()).any()
        elif not math.isfinite(t):
            self.nonfinite["xwg".index(slot[0])] += 1

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Whatever the layer does in the block, its state is afterwards what it was."""
        bring_back = self.snapshot()
        try:
            yield
        finally:
            bring_back()

    def snapshot(self) -> Callable[[], None]:
        """What the layer remembers now; a call of the result brings it back."""
        tensors = [(t, t.detach().clone()) for t in (*self.parameters(), *self.buffers())]
        inner = [m for m in self.modules() if m is not self and isinstance(m, LayerState)]
        conclusions, agreed = [state.snapshot() for state in (*self._made, self.counter, *inner)], self._agreed

        def bring_back() -> None:
            with torch.no_grad():
                for tensor, before in tensors:
                    tensor.copy_(before)
            for conclude in conclusions:
                conclude()
            self._agreed = agreed

        return bring_back

    # ---- several processes ----

    def share_of(self, operand: str) -> Share | None:
        """This process's share in "x", "w" or "g", where it has but a part of it and scales are those of the whole."""
        part = self.part("g_dgrad" if operand == "g" else f"{operand}_fprop", False)
        return None if part is None else part.share

    def part(self, slot: str, is_oriented: bool) -> Slice | None:
        """Where an operand lies in the whole: as it is, or as [groups, rows, spots, sums]."""
        sharing = self.sharing
        if sharing is None or slot not in sharing.axes or not (self.training or sharing.in_evaluation):
            return None
        return Slice(sharing.share, sharing.axes[slot][is_oriented])

    def shared(self) -> Tensor:
        """What this process tells the others of the layer after a backward pass: see `fourbit.nn.synchronize`.

        float64, flat, for each of x, w and g: its votes, and until all processes have what the first batch decided, that.
        """
        parts = [t.detach().flatten().double() for votes, decisions in self._told() for t in (*votes, *decisions)]
        return torch.cat(parts) if parts else self.nonfinite.new_empty(0, dtype=torch.float64)

    def agree(self, everywhere: Tensor) -> None:
        """Take over what all processes together decide.

        Args:
            everywhere: `shared()` of each, along a first axis.
        """
        start, settled = 0, []

        def of_all(mine: list[Tensor]) -> list[Tensor]:
            nonlocal start
            found = []
            for t in mine:
                part = everywhere[:, start : start + t.numel()]
                found.append(part.reshape(-1, *t.shape).to(t.dtype))
                start += t.numel()
            return found

        for state, (votes, decisions) in zip(self.scalings.values(), self._told(), strict=True):
            cast = of_all(votes)
            if self.sharing is not None:  # what one process would have noted of the whole batch
                cast = [t.amax(0, keepdim=True).expand_as(t) for t in cast]
            settled.append(state.agree(cast, None if self._agreed else of_all(decisions)))
        self._agreed = self._agreed or all(settled)

    def _told(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The votes of each of `scalings`, and its decisions, until all processes have the same."""
        return [(state.votes(), [] if self._agreed else state.decisions()) for state in self.scalings.values()]

    # ---- as a module ----

    def upgrade(self, tensors: MutableMapping[str, Any], prefix: str) -> None:
        """Give the layer's part of a state_dict of an earlier version, under `prefix`, today's form."""
        for state in self._made:
            state.upgrade(tensors, f"{prefix}{state.operand}_")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float checkpoint has none of these tensors: then the state stays as it is, and nothing counts as missing."""
        self.upgrade(state_dict, prefix)
        for state in (*self._made, self.counter):
            state.reload()
        self._agreed = False
        for name, t in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if t is not None and t.numel() == 0 and stored is not None:  # its size is not known before the first batch
                self._buffers[name] = t.new_empty(stored.shape)
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerState:
        """Moves between devices, but keeps float32: scales span more than half precision's range."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def __getattr__(self, name: str) -> Any:
        """As torch's. What divides a linear layer looks for its weight in all of its children."""
        if name == "weight":
            raise AttributeError(
                "a layer's quant has no weight: torch's parallelize_module divides layers before they are quantized, so call "
                "it first, and convert behind it"
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """FSDP puts a parameter's shard in the place of the whole by an assignment."""
        if name == "with_gradients":  # every pass sets it; nn.Module would take a while to see that it is no parameter
            self.__dict__[name] = value
            return
        whole = self.__dict__.get("_parameters", {}).get(name)
        super().__setattr__(name, value)
        if whole is not None and is_shard(value) and not is_shard(whole):
            for state in self._made:
                if state.parameter is value:
                    state.reshard(whole, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles get a handle and plans of their own."""
        super().__setstate__({"plans": Plans(), "is_identity": state["spec"].is_identity} | state)
        self.handle = _enter(self)
        if self.sharing is not None and self.sharing.share is None:  # out of a file
            self.sharing = None

    def _replicate_for_data_parallel(self) -> LayerState:
        raise UserError(
            "torch.nn.DataParallel would lose what the layers remember: use DistributedDataParallel and fourbit.synchronize"
        )
