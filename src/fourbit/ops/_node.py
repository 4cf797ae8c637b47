"""`Node`: an autograd function whose call costs no more than it must."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead


class Node(torch.autograd.Function):
    """torch.autograd.Function, for callers that have made sure that no transform of torch.func is at work.

    Torch's own `apply` looks for transforms and builds what they would need, which takes longer than the node itself.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """What `forward` returns, with this node as its origin; tensors that have outlived a transform are plain ones."""
        plain = [unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]
        return super(torch.autograd.Function, cls).apply(*plain)  # type: ignore[misc]
