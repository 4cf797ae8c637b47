"""`Pending`: a tensor whose numbers are not computed yet, for code that is written for tensors.

It has shape, strides, dtype and device, and a place in autograd's graph, as the tensor that it stands for would have them.
Python's functions of torch meet it in `__torch_function__`: those that are steps of a chain (`STEPS`) go on with it, all
others have it computed first, and it becomes a plain torch.Tensor on the spot, the same Python object. What reaches it
below Python, in C++, meets `__torch_dispatch__`, which computes with its numbers; then it cannot change its nature, and
stays a `Pending` with a tensor as its content.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fourbit.ops._uncompiled import as_written


class Settles(Protocol):
    """What knows how a Pending tensor is computed."""

    def settle(self, w: Pending, why: str) -> None:
        """Make `w` a plain tensor, or its content a tensor."""
        ...

    def fill(self, w: Pending) -> None:
        """Make the content of `w` a tensor."""
        ...

    def begin_anew(self) -> Settles:
        """For another tensor, that nothing follows from."""
        ...


LOCK = threading.RLock()
"""Held while a Pending tensor becomes another."""

STEPS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Functions of torch that may go on with a Pending tensor, and what does it; that returns None for a call which is no step."""


class Pending(Tensor):
    """See above.

    Attributes:
        sizes, strides: its shape and order of axes, for those who need not ask torch.
        content: how to compute it; its numbers, once they are there.
        link: the step of the chain that it is the result of.
        node: its node in autograd's graph, as that step made it.
        is_passed: whether a further step goes on from here.
        is_taken: whether a layer has taken its codes.
        taker: that layer's state.
    """

    sizes: torch.Size
    strides: tuple[int, ...]
    content: Any = None
    link: Any = None
    node: Any = None
    is_passed = False
    is_taken = False
    taker: Any = None

    @staticmethod
    def make(shape: torch.Size, stride: tuple[int, ...]) -> Pending:
        """A float32 tensor on the CPU, without numbers."""
        w = Tensor._make_wrapper_subclass(Pending, shape, strides=stride, dtype=torch.float32)  # type: ignore[attr-defined]
        w.sizes, w.strides = shape, stride
        return w

    @staticmethod
    def like(x: Pending) -> Pending:
        """Another one of that shape and order of axes."""
        return Pending.make(x.sizes, x.strides)

    def become(self, plain: Tensor) -> bool:
        """Exchange the numbers and the place in autograd's graph for those of `plain`; the Python object stays.

        Returns:
            False, and nothing changes, where something below Python has hold of it, weakly too: torch's profiler, with shapes,
            of all that went into an operation.
        """
        try:
            torch._C._swap_tensor_impl(self, plain)
        except RuntimeError:
            return False
        for name in _OWN:
            vars(self).pop(name, None)
        object.__setattr__(self, "__class__", Tensor)
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        others = not _PLAIN.issuperset(types)
        step = None if others else STEPS.get(func)
        if step is not None:
            with LOCK:
                result = step(*args, **kwargs)
            if result is not None:
                return result
        if func == _GRAD_FN and isinstance(args[0], Pending) and node_of(args[0]) is not args[0].node:
            return node_of(args[0])  # not of a chain's making: it stays
        if _is_autograds_own(func, args):
            return _alias(args[0])
        leaves = tree_leaves((args, kwargs))
        settle_all(leaves, getattr(func, "__name__", str(func)))
        left = [w for w in leaves if isinstance(w, Pending)]
        if others:  # a class with operations of its own
            return NotImplemented if left else func(*args, **kwargs)
        if func == _SET_DATA and left:
            left[0].content = args[1].detach()
            return None
        if func in _OBSERVING:
            for w in left:
                w.link.is_shared = True
        if func in _NEEDS_MEMORY:
            args = tree_map_only(Pending, _plain, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found: list[tuple[Pending, Tensor]] = []

        def numbers(w: Pending) -> Tensor:
            if not isinstance(w.content, Tensor):
                w.link.fill(w)
            found.append((w, w.content))
            return w.content

        args, kwargs = tree_map_only(Pending, numbers, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return next((w for w, content in found if result is content), result)  # an operation in place returns its input


as_written(Pending.__torch_function__.__func__)  # type: ignore[attr-defined]
as_written(Pending.__torch_dispatch__.__func__)  # type: ignore[attr-defined]


def settle_all(values: Iterable[Any], why: str) -> None:
    """Compute the Pending tensors among them."""
    for value in values:
        if isinstance(value, Pending):
            with LOCK:  # two threads may come for one
                if isinstance(value, Pending) and not isinstance(value.content, Tensor):
                    value.link.settle(value, why)


def numbers_of(x: Tensor) -> Tensor:
    """The tensor with the numbers of `x`, detached, if it is a Pending one that has some; otherwise x."""
    return x.content if isinstance(x, Pending) and isinstance(x.content, Tensor) else x


def node_of(w: Tensor) -> Any:
    """The node of autograd's graph that a tensor is the result of now."""
    with torch._C.DisableTorchFunctionSubclass():
        return w.grad_fn


def plain_tensors_only(tensors: Iterable[Tensor]) -> bool:
    """Whether none is of a class that may mean something else by its operations."""
    return all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)


@dataclass
class _Alias:
    """The content of a tensor that autograd has made of another one, which it returned as it was."""

    of: Pending

    def compute(self) -> Tensor:
        """A copy: what is done to it in place is not done to the other."""
        if not isinstance(self.of.content, Tensor):
            self.of.link.fill(self.of)
        return self.of.content.clone()


def _is_autograds_own(func: Any, args: Any) -> bool:
    """Whether autograd tells the input of a function, which returned it as it is, from its output: it has hold of it then."""
    if getattr(func, "__name__", "") != "view_as" or len(args) != 2 or args[0] is not args[1]:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return args[0]._use_count() > 1


def _alias(of: Pending) -> Pending:
    w = Pending.like(of)
    w.link, w.content = of.link.begin_anew(), _Alias(of)
    return w


class _Plain(torch.autograd.Function):
    """A plain tensor with the numbers of a Pending one, for what cannot take a tensor without memory of its own."""

    @staticmethod
    def forward(ctx: Any, w: Pending, content: list[Tensor]) -> Tensor:
        return content[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _plain(w: Pending) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return _Plain.apply(w, [w.content.detach()])


_OWN = ("sizes", "strides", "content", "link", "node", "is_passed", "is_taken", "taker")
"""Attributes of a Pending tensor, which a plain one has not."""

_PLAIN = frozenset({Pending, Tensor, torch.nn.Parameter})
"""Classes that mean nothing else by their operations."""

_SET_DATA = Tensor.data.__set__  # type: ignore[union-attr]
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]

_METADATA = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "itemsize", "nbytes"),
                *("is_cpu", "is_cuda", "is_meta", "is_mkldnn", "is_mps", "is_nested", "is_quantized", "is_sparse"),
                *(
                    "is_sparse_csr",
                    "is_vulkan",
                    "is_xla",
                    "is_xpu",
                    "is_mtia",
                    "is_ipu",
                    "is_maia",
                    "names",
                    "_version",
                ),
            )
            if hasattr(Tensor, name)
        ),
        Tensor._backward_hooks.__set__,  # type: ignore[union-attr]  # autograd empties it for what a node changes in place
        *(
            getattr(Tensor, name)
            for name in (
                "size",
                "stride",
                "dim",
                "ndimension",
                "numel",
                "nelement",
                "element_size",
                "is_contiguous",
                "__len__",
            )
        ),
        *(
            getattr(Tensor, name)
            for name in ("is_floating_point", "is_complex", "is_signed", "is_inference", "get_device")
        ),
        *(getattr(torch, name) for name in ("is_floating_point", "is_complex", "is_inference", "numel", "is_signed")),
    }
)
"""What is known without the numbers."""

_OBSERVING = frozenset({_GRAD_FN, Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook})
"""By which a gradient can be seen after the tensor is gone."""

_NEEDS_MEMORY = frozenset(
    getattr(Tensor, name)
    for name in (
        *("numpy", "__array__", "data_ptr", "storage", "untyped_storage", "tolist", "share_memory_", "pin_memory"),
        *("__deepcopy__", "__reduce_ex__", "__dlpack__", "__repr__", "__format__", "is_shared", "is_pinned"),
    )
)
"""Methods that read a tensor's memory themselves."""
