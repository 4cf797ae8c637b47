"""What a chain remembers of its steps: `Link`, for autograd's nodes, and the content of the tensors between them."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fourbit.chains._norm import NO_ACTIVATION, NORM_APPLY, Activation, Norm, Normalized, NormApply
from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.ops import Finish, LayerState, Mailbox, Pending, ResultHandover, finish
from fourbit.quantizers import Quantized, Request

Kind = Literal["product", "norm", "sum", "act"]


def hooks_now() -> Any:
    """What is called with the tensors that autograd saves; None: nothing."""
    found = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
    return None if found is None else found[0]


class Link:
    """A step of a chain, as its node in autograd's graph and the steps behind it know it. It holds no tensor of the graph.

    Attributes:
        kind: which step.
        before, node: the step before and its node in autograd's graph; None for the first, or without a gradient.
        act: of an activation.
        norm: of a normalization, while somebody watches.
        result, state: of a product: what the layer left (None: a finished result), and the layer.
        owner: the tensor that stands for the result.
        hooks: of autograd's saved tensors, as they were when the chain began; a step under others is none.
        is_shared: whether somebody else than the step behind has used the result.
        passing: where the gradient passes an activation that computes its own.
        gradients, d_residual: what the end of the chain has computed for a normalization, for a sum.
    """

    __slots__ = (
        *("kind", "before", "node", "act", "norm", "result", "state", "owner", "hooks", "is_shared", "passing"),
        *("gradients", "d_residual"),
    )

    def __init__(self, kind: Kind, before: Link | None = None, node: Any = None, act: Activation = NO_ACTIVATION):
        self.kind, self.before, self.node, self.act = kind, before, node, act
        self.norm: Norm | None = None
        self.result: ResultHandover | None = None
        self.state: LayerState | None = None
        self.owner: weakref.ref[Pending] | None = None
        self.hooks = hooks_now() if before is None else before.hooks
        self.is_shared = False
        self.passing: Tensor | None = None
        if kind == "norm":
            self.gradients = Mailbox()
        elif kind == "sum":
            self.d_residual = Mailbox()

    def is_visible(self) -> bool:
        """Whether somebody else than the step behind may see the result or its gradient: it was used, or is still held."""
        return self.is_shared or (self.owner is not None and self.owner() is not None)

    def fill(self, w: Pending) -> None:
        """Compute the numbers of `w`, whose place in autograd's graph stays: every step then computes its own gradient."""
        content = w.content
        out = content.compute()
        if not w.is_taken:
            self.is_shared = True
            if not w.is_passed and self.kind == "act":
                self.passing = ~((out <= 0) | (out >= self.act.cap)) if math.isfinite(self.act.cap) else ~(out <= 0)
        w.content = out


@dataclass(slots=True, eq=False)
class Unfinished:
    """A layer's product, not scaled and rounded yet; or a finished result `y`."""

    result: ResultHandover | None = None
    y: Tensor | None = None

    def compute(self) -> Tensor:
        """The result as a tensor."""
        if self.result is None:
            assert self.y is not None
            return self.y.detach()
        raw, scale, output = self.result.raw, self.result.scale, self.result.output
        if raw.y.dtype == torch.int16:
            return Kept(raw.y, output).compute()
        what = Finish(torch.tensor(scale, dtype=torch.float32), output, False, None, torch.float32)
        self.result.raw = raw._replace(y=torch.empty(0))
        return finish(raw._replace(unit=1.0), what)[0]


@dataclass(slots=True, eq=False)
class Affine:
    """act(slope v + offset + residual).

    `version` is the residual's when it was added: until the sum is computed nobody may change it.
    """

    normalized: Normalized
    act: Activation = NO_ACTIVATION
    residual: Tensor | None = None
    version: int = 0

    def apply(
        self, request: Request | None, want_out: bool
    ) -> tuple[Tensor | None, Quantized | None, Tensor | None, bool]:
        """The result, its codes, the bits where the activation passes, and whether what it caps is clipped as well."""
        residual = self.residual
        if residual is not None:
            if residual._version != self.version:
                raise UserError(
                    "a tensor was added to the result of a batch normalization, and changed in place before the sum was used: "
                    "change a copy of it, or convert the model with fuse=False"
                )
            residual = residual.resolve_neg().contiguous(memory_format=torch.channels_last)
        found = NORM_APPLY(NormApply(self.normalized, residual, self.act, request, want_out))
        if found is None:
            raise UserError("the kernels were switched off inside a fused chain: switch them off around the whole step")
        return found

    def compute(self) -> Tensor:
        """The result as a tensor."""
        out = self.apply(None, True)[0]
        assert out is not None
        return out


@dataclass(slots=True, eq=False)
class Kept:
    """v itself, in float32 or in 16-bit codes of `format`."""

    v: Tensor
    format: Format | None

    def compute(self) -> Tensor:
        """v as a tensor of its own."""
        moments = torch.zeros(4, self.v.shape[1], dtype=torch.float32)
        moments[2] = 1.0
        return Affine(Normalized(self.v, self.format, moments)).compute()
