"""Every product of a forward pass, as torch's operators see it: its size, where it ran, and which parameters it multiplied.

A product is an operator that multiplies matrices or vectors: matmul, einsum, convolutions, attention, torch's own recurrent
layers. Sums of elementwise products (`(a * b).sum()`, distances, outer products by broadcasting) are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourbit.ops import Convolution, LinearMap, Matmul, ProductSize


class Operands(NamedTuple):
    """A product as an operator computes it: its size, and the tensors on both sides."""

    size: ProductSize
    x: tuple[Tensor, ...]
    w: tuple[Tensor, ...]


def _matrices(x: Tensor, w: Tensor) -> list[Operands]:
    """[.., m, k] by [.., k, n]; vectors are matrices of one row or column."""
    y = (*x.shape[:-1], *(w.shape[-1:] if w.dim() > 1 else ()))
    return [Operands(Matmul().size(x.shape, w.shape, y), (x,), (w,))]


def _outer(x: Tensor, w: Tensor) -> list[Operands]:
    return [Operands(ProductSize(1, x.numel(), w.numel(), 1, x.numel(), w.numel()), (x,), (w,))]


def _grouped(x: Tensor, w: Tensor) -> list[Operands]:
    """Rows, columns or terms of one of the two are divided among the groups, unless both have an axis of groups."""
    count = x.shape[0] if x.dim() == w.dim() == 3 else 1
    return [Operands(ProductSize(count, x.shape[-2], w.shape[-1], x.shape[-1], x.numel(), w.numel()), (x,), (w,))]


def _convolution(x: Tensor, w: Tensor, y: Tensor, transposed: bool, groups: int) -> list[Operands]:
    convolution = Convolution((), (), (), groups, transposed)  # of which the size asks nothing else
    return [Operands(convolution.size(x.shape, w.shape, y.shape), (x,), (w,))]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> list[Operands]:
    """Scores and values, of every head; masks leave nothing out, as torch's own count has it."""
    products = (*q.shape[:-1], k.shape[-2])
    scores = Matmul().size(q.shape, k.mT.shape, products)
    values = Matmul().size(products, v.shape, (*q.shape[:-1], v.shape[-1]))
    return [Operands(scores, (q,), (k,)), Operands(values, (q, k), (v,))]


def _recurrent(x: Tensor, weights: Sequence[Tensor]) -> list[Operands]:
    """All steps of a layer: every row of the input, or of the states, by every weight."""
    rows = x.shape[:-1].numel()
    return [
        Operands(LinearMap().size((rows, w.shape[1]), w.shape, (rows, w.shape[0])), (x,), (w,))
        for w in weights
        if w.dim() == 2
    ]


def _bilinear(x: Tensor, w: Tensor, z: Tensor) -> list[Operands]:
    """The outer product of both inputs by the weight [n, k1, k2]; `w` lies between them in torch's operator."""
    weight = max((x, w, z), key=lambda t: t.numel() if t.dim() > 2 else -1)
    rows, n, k = x.shape[0], weight.shape[-3], weight.shape[-2] * weight.shape[-1]
    return [Operands(ProductSize(1, rows, n, k, x.numel() + z.numel(), weight.numel()), (x, z), (w,))]


Formula = Callable[[Sequence[Any], Any], list[Operands]]
_FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm"), lambda a, y: _matrices(a[0], a[1])),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm", "_addmm_activation"), lambda a, y: _matrices(a[1], a[2])),
    "ger": lambda a, y: _outer(a[0], a[1]),
    "addr": lambda a, y: _outer(a[1], a[2]),
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm"), lambda a, y: _grouped(a[0], a[1])),
    **dict.fromkeys(("convolution", "_convolution"), lambda a, y: _convolution(a[0], a[1], y, a[6], a[8])),
    "conv_tbc": lambda a, y: [
        Operands(ProductSize(1, y.numel() // y.shape[-1], y.shape[-1], a[1][..., 0].numel(), a[0].numel(), a[1].numel()),
                 (a[0],), (a[1],))
    ],
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
            "flex_attention",
        ),
        lambda a, y: _attention(a[0], a[1], a[2]),
    ),
    "mkldnn_rnn_layer": lambda a, y: _recurrent(a[0], a[1:3]),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), lambda a, y: _recurrent(a[0], a[1])),
    "_trilinear": lambda a, y: _bilinear(a[0], a[1], a[2]),
}  # fmt: skip
"""What an operator of torch multiplies, from its arguments and its result."""

_LOOKUPS = ("embedding", "_embedding_bag", "embedding_bag")
"""Their results are activations, although they come out of parameters alone."""


@dataclass(frozen=True)
class Call:
    """One product.

    Args:
        module: in whose forward it ran.
        operation: torch's name of it.
        x, w: whether the operands need gradients: of x is dgrad, of w is wgrad.
        bits: of an element of the wider operand.
        weights: parameters that the operands are made of, and of nothing else.
    """

    module: nn.Module
    operation: str
    size: ProductSize
    x: bool
    w: bool
    bits: int
    weights: tuple[str, ...]


@dataclass
class Counts:
    """What was found."""

    calls: list[Call] = field(default_factory=list)
    unknown: dict[tuple[nn.Module, str], None] = field(default_factory=dict)
    """Operators of other libraries that took parameters, by module: what they multiply is not known."""
    used: set[str] = field(default_factory=set)
    """Parameters that any operator has read."""


class _Counter(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, covered: set[nn.Module]):
        super().__init__()
        self.counts, self.stack = Counts(), [model]
        self._covered = covered
        self._dims = {name: p.dim() for name, p in model.named_parameters()}
        self._made_of = {_address(p): frozenset((name,)) for name, p in model.named_parameters()}
        self._neutral = {_address(b) for b in model.buffers()}
        self._kept: list[Tensor] = []  # an address in use is no other tensor's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_higher_order = isinstance(func, torch._ops.HigherOrderOperator)
        name = func.name() if is_higher_order else func._overloadpacket.__name__
        formula = _FORMULAS.get(name)
        if formula is None and not is_higher_order:
            with self:  # in inference mode, operators come here whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = frozenset().union(*(self._of(t) for t in tensors))
        self.counts.used |= sources
        if formula is not None:
            if not self._is_covered():
                self._count(name, formula(args, result))
        elif sources:
            if self._are_parameters(tensors) and name not in _LOOKUPS:
                self._remember(result, sources)
            namespace = "higher_order" if is_higher_order else func.namespace
            if namespace not in ("aten", "prims", "prim", "fourbit") and not self._is_covered():
                self.counts.unknown[self.stack[-1], f"{namespace}.{name}"] = None
        return result

    def _is_covered(self) -> bool:
        top = self.stack[-1]
        return not makes_weights(top) and any(module in self._covered for module in self.stack)

    def _count(self, name: str, products: list[Operands]) -> None:
        for size, x, w in products:
            of_x, of_w = (frozenset().union(*(self._of(t) for t in side)) for side in (x, w))
            bits = 8 * max(t.element_size() for t in (*x, *w))
            needs_x, needs_w = (any(t.requires_grad for t in side) for side in (x, w))
            if of_x and not of_w:  # W x: the weight is the left operand
                size = ProductSize(size.count, size.n, size.m, size.k, size.w, size.x)
                needs_x, needs_w = needs_w, needs_x
            if isinstance(
                self.stack[-1], torch.jit.ScriptModule
            ):  # it differentiates its code itself, and hides that it will
                needs_x, needs_w = True, True
            matrices = tuple(sorted(n for n in of_x | of_w if self._dims[n] > 1))
            operation = "scaled_dot_product_attention" if name.startswith("_scaled_dot") else name.strip("_")
            self.counts.calls.append(Call(self.stack[-1], operation, size, needs_x, needs_w, bits, matrices))

    def _of(self, t: Tensor) -> frozenset[str]:
        return self._made_of.get(_address(t), frozenset())

    def _are_parameters(self, tensors: list[Tensor]) -> bool:
        """Whether nothing in them is an activation: numbers, indices and buffers are not."""
        return all(
            self._of(t) or t.dim() == 0 or not t.is_floating_point() or _address(t) in self._neutral for t in tensors
        )

    def _remember(self, result: Any, sources: frozenset[str]) -> None:
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and _address(t) not in self._made_of:
                self._made_of[_address(t)] = sources
                self._kept.append(t)


def _address(t: Tensor) -> int:
    """Of the memory that a tensor lies in, also on the meta device; 0 for layouts without."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def makes_weights(module: nn.Module) -> bool:
    """Whether a module is one of those with which torch parametrizes weights."""
    return type(module).__module__.startswith("torch.nn.utils.parametriz")


@contextmanager
def counting(model: nn.Module, covered: set[nn.Module]) -> Iterator[Counts]:
    """Count the products that run in the block, but for those inside `covered` modules.

    Torch's fast path of encoder layers, one operator for all their products, and torch.compile are off in the block.
    """
    known = set(model.modules())
    counter = _Counter(model, covered)

    def enter(module: nn.Module, arguments: Any) -> None:
        if module in known:
            counter.stack.append(module)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        if module in known:
            counter.stack.pop()

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(counter)
        yield counter.counts
