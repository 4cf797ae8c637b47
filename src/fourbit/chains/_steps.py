"""The steps of a chain, in the order in which a model takes them; see the package."""

from __future__ import annotations

import math
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import saved_tensors_hooks

from fourbit.chains._link import Affine, Kept, Link, Unfinished, hooks_now
from fourbit.chains._nodes import Activated, Call, End, Finished, Normalization, Opened, Sum, normalization_of
from fourbit.chains._norm import NORM_STATISTICS, RELU, Activation, Norm, NormStatistics
from fourbit.chains._watch import chain_ended, is_watched
from fourbit.ops import (
    LOCK,
    NORM_SUPPORTED,
    STEPS,
    LayerState,
    Layout,
    OperandHandover,
    Pending,
    ResultHandover,
    computing,
    node_of,
    operand_request,
    plain_tensors_only,
    settle_all,
)

_WHO = "normalization, fused"


class Step(Link):
    """A link whose tensor can be computed, or followed by another step."""

    __slots__ = ()

    def settle(self, w: Pending, why: str) -> None:
        """See `Pending`."""
        settle(w, why)

    def begin_anew(self) -> Step:
        """See `Pending`."""
        return Step("product")


def can_defer(x: Tensor, state: LayerState) -> bool:
    """Whether a layer may leave its product of `x` unfinished: in training, in eager mode, on plain float32 tensors of a
    device with kernels, and where nothing is in force that wants to see each operation."""
    return (
        state.fuse
        and state.training
        and (state.spec.x_fprop is None or state.spec.x_fprop.outliers is None)
        and (isinstance(x, Pending) or _is_image(x))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._is_torch_function_enabled()
        and _is_eager()
    )


def _is_eager() -> bool:
    """Whether nothing is in force that wants to see each operation."""
    return not (
        torch.is_inference_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
    )


def _is_image(x: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.dim() == 4
        and x.numel() > 0
        and x.is_cpu
        and plain_tensors_only((x,))
        and NORM_SUPPORTED(x, None) is not None
    )


def begin(w: Tensor, result: ResultHandover, state: LayerState) -> Tensor:
    """Make `w`, which the node of a layer's product returned for its `result`, the start of a chain."""
    assert isinstance(w, Pending)
    link = Step("product")
    link.result, link.state = result, state
    _stand(w, link, Unfinished(result))
    return w


def begin_with(y: Tensor, state: LayerState) -> Tensor:
    """The finished result of a layer as the start of a chain."""
    if y.dim() != 4 or not y.is_contiguous(memory_format=torch.channels_last):
        return y
    w, link = Opened.apply(y), Step("product")
    link.state = state
    _stand(w, link, Unfinished(y=y))
    return w


def _stand(w: Pending, link: Link, content: Any) -> None:
    link.owner = weakref.ref(w)
    w.link, w.content, w.node = link, content, node_of(w)


def _is_open(w: Pending, content: type, inplace: bool = False) -> bool:
    """Whether the next step may follow: nobody has used w, no other node has taken its place in autograd's graph, and the
    step is one that autograd sees as it saw those before."""
    return (
        type(w.content) is content
        and not w.is_passed
        and not w.is_taken
        and node_of(w) is w.node
        and _is_eager()
        and (not inplace or w.node is None or torch.is_grad_enabled())
    )


def _next(w: Pending, function: Any, link: Link, content: Affine, inplace: bool, *more: Any) -> Pending:
    """The tensor behind a step: w itself, where the step works in place."""
    if inplace:
        w.link.owner = None
    else:
        w.is_passed = True
    out = function.apply(w, link, inplace, *more)
    _stand(out, link, content)
    return out


def normalize(w: Tensor, norm: Norm) -> Pending | None:
    """batch_norm(w) in training, which moves the running statistics on; None where that is no step of a chain."""
    if not isinstance(w, Pending) or not _is_open(w, Unfinished) or hooks_now() is not w.link.hooks:
        return None
    channels, numel = w.sizes[1], w.sizes.numel()
    vectors = [t for t in (norm.gamma, norm.beta, norm.running_mean, norm.running_var) if t is not None]
    if not norm.eps > 0 or numel < 2 * channels or (norm.running_mean is None) != (norm.running_var is None):
        return None
    if not plain_tensors_only(vectors):
        return None
    if any(
        t.shape != (channels,) or t.dtype is not torch.float32 or not (t.is_cpu and t.is_contiguous()) for t in vectors
    ):
        return None
    result, y = w.content.result, w.content.y
    if result is None:
        statistics = NormStatistics(y.detach(), 1.0, None, norm, own=False)
    else:
        output = None if result.raw.rounded and result.raw.y.dtype != torch.int16 else result.output
        statistics = NormStatistics(result.raw.y, result.scale, output, norm, own=True)
    with computing(_WHO, numel):
        normalized = NORM_STATISTICS(statistics)
        if normalized is None:
            return None
        if result is not None:
            result.raw = result.raw._replace(y=torch.empty(0))
        w.content = Kept(normalized.v, normalized.format)  # should somebody ask for the product
        link = Step("norm", w.link, w.node)
        link.norm = norm if is_watched() else None
        return _next(w, Normalization, link, Affine(normalized), False, norm.gamma, norm.beta, normalized)


def add(w: Tensor, other: Any, inplace: bool) -> Pending | None:
    """w + other; None where that is no step of a chain."""
    if not isinstance(w, Pending) or not isinstance(other, Tensor) or other is w:
        return None
    if not _is_open(w, Affine, inplace) or hooks_now() is not w.link.hooks:
        return None
    shape = other.sizes if isinstance(other, Pending) else other.shape
    if w.content.residual is not None or w.content.act.clips or shape != w.sizes:
        return None
    settle_all((other,), "a sum")
    residual = other.content if isinstance(other, Pending) else other
    if residual.dtype != torch.float32 or not residual.is_cpu or residual.is_inference():
        return None
    if not plain_tensors_only((residual,)) or residual.layout is not torch.strided:
        return None
    residual = residual.detach()
    content = Affine(w.content.normalized, w.content.act, residual, residual._version)
    return _next(w, Sum, Step("sum", w.link, w.node), content, inplace, other)


def activate(w: Tensor, cap: float, inplace: bool) -> Pending | None:
    """min(max(w, 0), cap); None where that is no step of a chain."""
    if not isinstance(w, Pending) or not _is_open(w, Affine, inplace) or w.content.act.clips or not cap > 0:
        return None
    if hooks_now() is not w.link.hooks:
        return None
    act = RELU if cap == math.inf else Activation(True, cap)
    content, link = w.content, Step("act", w.link, w.node, act)
    content = Affine(content.normalized, act, content.residual, content.version)
    return _next(w, Activated, link, content, inplace)


def take(w: Tensor, behind: LayerState) -> OperandHandover | None:
    """The operand of the layer `behind`, quantized; None where it must quantize the tensor, plain from now on, itself."""
    if not isinstance(w, Pending):
        return None
    with LOCK:
        found = _take(w, behind) if isinstance(w, Pending) else None
    if found is None:
        settle_all((w,), "a layer that quantizes it itself")
    return found


def _take(w: Pending, behind: LayerState) -> OperandHandover | None:
    if not _is_open(w, Affine):
        return None
    alpha, wants_grad = behind.parameter("x"), w.node is not None
    if wants_grad != torch.is_grad_enabled() and (wants_grad or (alpha is not None and alpha.requires_grad)):
        return None
    if wants_grad and normalization_of(w.link, w.node) is None:
        return None
    layout = Layout.of(w.content.normalized.v)
    request = operand_request(behind, w.content.normalized.v)
    if request is None:
        return None
    want_out = w.content.residual is not None or behind.wants_float or behind.observer is not None
    call = Call(w.link, w.node, w.content, behind, request, want_out)
    with (
        torch._C.DisableTorchFunctionSubclass(),
        computing(_WHO, layout.shape.numel()),
        _saving_as(w.link),
        _unsafe_preserve_version_counter(w),
    ):
        End.apply(w, alpha, call)
    assert call.quantized is not None and call.back is not None
    w.is_taken, w.taker, w.node = True, behind, node_of(w)
    if call.out is not None:
        w.content = call.out
    chain_ended(w.link, behind)
    is_bounded = w.link.act.clips and not call.cap_clips
    return OperandHandover(layout, call.quantized, w.link, call.back, is_bounded)


def settle(w: Pending, why: str) -> None:
    """Make w the tensor that it stands for: a plain tensor from now on, unless something else still needs it as it is.

    Args:
        why: what needs it, for those who ask why a chain ends here.
    """
    link = w.link
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
        if w.is_taken and w.taker is not None:
            w.taker.wants_float = True  # then the next time both come out of one pass
        if not (w.is_passed or w.is_taken):
            chain_ended(link, why)
        held = w._use_count() > 1  # type: ignore[attr-defined]
        if w.is_passed or w.is_taken or held or torch._C._are_functorch_transforms_active():
            link.fill(w)
            return
        is_ours = w.grad_fn is w.node
        with torch.set_grad_enabled(w.requires_grad):
            if is_ours and isinstance(w.content, Unfinished) and w.content.y is not None:
                plain = w.content.y
            elif is_ours and isinstance(w.content, Affine) and _is_whole(w):
                with computing(_WHO, w.sizes.numel()), _saving_as(link):
                    plain = End.apply(w, None, Call(link, w.node, w.content, None, None, True))
            else:
                link.fill(w)
                plain = Finished.apply(w, [w.content])
        if not w.become(plain):
            link.fill(w)


def _saving_as(link: Link) -> AbstractContextManager[Any]:
    """Save tensors where the chain is, and not where it is computed: a region with hooks of its own, which will be computed
    again without the chain, must not count them."""
    return _AS_IT_IS if hooks_now() is link.hooks else saved_tensors_hooks(_same, _same)


_AS_IT_IS = nullcontext()


def _same(t: Tensor) -> Tensor:
    return t


def _is_whole(w: Pending) -> bool:
    """Whether the gradient of w, if it has one, goes through its normalization."""
    return not w.requires_grad or normalization_of(w.link, w.node) is not None


# ---- torch's functions ----


def step(*functions: Any) -> Any:
    """Decorator: what a chain does where one of `functions` of torch is called."""

    def enter(ours: Any) -> Any:
        for function in functions:
            STEPS[function] = ours
        return ours

    return enter


@step(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Pending | None:
    if not training or torch.is_autocast_enabled("cpu"):
        return None
    return normalize(input, Norm(weight, bias, running_mean, running_var, momentum, eps))


@step(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input: Any, other: Any, *deprecated: Any, alpha: float = 1, out: Any = None) -> Pending | None:
    if deprecated or alpha != 1 or out is not None:
        return None
    found = add(input, other, False)
    if found is not None or not isinstance(input, Tensor) or not isinstance(other, Pending):
        return found
    # the result has the order of axes of the first
    return add(other, input, False) if input.is_contiguous(memory_format=torch.channels_last) else None


@step(Tensor.add_, Tensor.__iadd__)
def _add_(input: Any, other: Any, *deprecated: Any, alpha: float = 1) -> Pending | None:
    return add(input, other, True) if alpha == 1 and not deprecated else None


@step(F.relu)
def _relu(input: Tensor, inplace: bool = False) -> Pending | None:
    return activate(input, math.inf, inplace)


@step(torch.relu, Tensor.relu)
def _plain_relu(input: Tensor) -> Pending | None:
    return activate(input, math.inf, False)


@step(torch.relu_, Tensor.relu_)
def _relu_(input: Tensor) -> Pending | None:
    return activate(input, math.inf, True)


@step(F.relu6)
def _relu6(input: Tensor, inplace: bool = False) -> Pending | None:
    return activate(input, 6.0, inplace)


@step(F.hardtanh)
def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Pending | None:
    return activate(input, float(max_val), inplace) if min_val == 0 else None
