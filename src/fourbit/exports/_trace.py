"""A network as torch.fx sees it: one node for each layer."""

from __future__ import annotations

from torch import fx, nn

from fourbit.errors import UserError


def traced(model: nn.Module, wanted: str) -> fx.Graph:
    """The graph of a model's forward pass.

    Args:
        model: in the mode that is wanted.
        wanted: what it is for, as the sentence of the error names it: "--to onnx".

    Raises:
        UserError: forward looks at numbers or shapes.
    """
    try:
        return fx.symbolic_trace(model).graph
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{type(model).__name__} cannot be traced ({reason[:200]}): {wanted} is for feed-forward networks whose forward "
            "does not look at its numbers or shapes, such as ResNets, MobileNets and multilayer perceptrons."
        ) from error
