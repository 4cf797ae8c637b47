"""The quantizer under test: found by its name, called carefully.

A quantizer is a function from a float32 tensor [rows, K] to the tensor of the same shape that it stands for after quantization,
with blocks along the last axis. If it has a parameter `seed`, it gets another integer at every call. Its input lies on the CPU:
a quantizer for another device moves it there, and need not move the result back.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import UserError


class Refused(Exception):
    """The quantizer raised an error; the message is its first line."""


@dataclass
class Subject:
    """A quantizer with its name; notes whether it ever changed its input.

    Args:
        function: the quantizer.
        name: what it is called in reports.
    """

    function: Callable[..., Any]
    name: str
    changed_input: bool = False
    calls: int = 0
    _seeded: bool = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UserError(
                f"{self.name} is no function: name one that maps a tensor [rows, K] to its quantized numbers."
            )
        try:
            self._seeded = "seed" in inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # of some builtins
            self._seeded = False

    def __call__(self, x: Tensor) -> Tensor:
        """The quantizer's numbers for `x`, float32.

        Raises:
            Refused: it raised an error.
            UserError: what it returned is no floating-point tensor of the shape of `x`.
        """
        before = x.clone()
        self.calls += 1
        try:
            with torch.no_grad():
                y = self.function(x, **({"seed": self.calls} if self._seeded else {}))
        except Exception as error:
            text = " ".join(str(error).split()) or "no message"
            raise Refused(f"{type(error).__name__}: {text[:120]}") from error
        self.changed_input |= not torch.equal(before.nan_to_num(1.5), x.nan_to_num(1.5))
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
            found = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise UserError(
                f"{self.name} returned {found} for a {x.dtype} tensor {list(x.shape)}: "
                "return the dequantized numbers, a floating-point tensor of the same shape."
            )
        return y.detach().to("cpu", torch.float32)

    def probe(self, columns: int) -> None:
        """Call it once on ordinary numbers.

        Raises:
            UserError: it does not work even there.
        """
        try:
            self(torch.randn(4, columns, generator=torch.Generator().manual_seed(0)))
        except Refused as error:
            raise UserError(f"{self.name} failed on an ordinary float32 tensor [4, {columns}]: {error}.") from error


def load(name: str) -> Any:
    """What "module:attribute" names; modules are also looked for in the current folder.

    Raises:
        UserError: there is no such module, it does not load, or it has no such attribute.
    """
    module, separator, attribute = name.partition(":")
    if not separator or not module or not attribute:
        raise UserError(f"{name!r} does not name a function: write module:function, as in mymodule:quantize.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not (module + ".").startswith(error.name + "."):
            raise UserError(f"module {module} needs {error.name}, which is not installed: install it.") from error
        raise UserError(
            f"there is no module {module}: run the command in its folder, or put that folder on PYTHONPATH."
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserError(f"module {module} does not load: {type(error).__name__}: {text}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"module {module} has no {attribute}: name a function that it defines.")
        found = getattr(found, part)
    return found
