"""What the networks of all other libraries need: the library itself, its errors in a line, and a trial."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fourbit.errors import UserError


def reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def import_library(library: str) -> Any:
    """The package of a prefix. Raises UserError if it cannot be imported."""
    package = "transformers" if library == "hf" else library
    try:
        return importlib.import_module(package)
    except Exception as error:  # a build that does not fit torch raises all sorts of errors
        raise UserError(
            f"{library}: names need the package {package}, which cannot be imported ({reason(error)}): "
            f"pip install {package}."
        ) from error


@torch.no_grad()
def tried(model: nn.Module, run: Callable[[], Any]) -> Any:
    """What `run()` gives while the network is in evaluation mode."""
    training = model.training
    model.eval()
    found = run()
    model.train(training)
    return found
