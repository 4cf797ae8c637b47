"""The input that a model is looked at with: a batch, its shape, or the arguments by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fourbit.errors import UserError

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Arguments of a model: one tensor, several arguments of any kind (with a tensor somewhere in them), or by name."""
Input = Batch | tuple[int, ...]
"""A batch, or its shape."""


def batch_for(model: nn.Module, input: Input) -> Batch:
    """The batch itself, or random numbers of that shape, where the model is.

    Raises:
        UserError: `model` is not a module, `input` no batch and no shape, or no memory holds it.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {_what(model)}, but must be a torch.nn.Module.")
    if isinstance(input, Tensor):
        return input
    if isinstance(input, Mapping) and input and all(isinstance(key, str) for key in input):
        return dict(input)
    found = tuple(input) if isinstance(input, tuple | list) else ()
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(found)):
        return found
    sizes = tuple(n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0)
    if not sizes or len(sizes) != len(found):
        raise UserError(f"the input is {_what(input)}, but must be a batch, or the shape of one: (128, 3, 32, 32).")
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    try:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(device)
    except RuntimeError as error:
        raise UserError(
            f"a batch of shape {sizes} cannot be made ({first_line(error)}): take a smaller one."
        ) from error


def run_on(model: nn.Module, batch: Batch) -> Any:
    """A forward pass, for what can be seen of it, and what it returns.

    Raises:
        UserError: the model does not take such a batch.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        shapes = ", ".join(_shapes(batch))
        raise UserError(f"the model does not run on an input of shape {shapes}: {first_line(error)}") from error


def _shapes(batch: Batch) -> Iterator[str]:
    if isinstance(batch, Mapping):
        yield from (f"{name}={_shown(value)}" for name, value in batch.items())
    else:
        yield from map(_shown, batch if isinstance(batch, tuple) else (batch,))


def _shown(argument: Any) -> str:
    """The shapes in it."""
    return str(tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, argument))


def first_line(error: Exception) -> str:
    """What an error of torch says, without the stack of C++ calls that may follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _what(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float | tuple | list | None) else type(value).__name__
