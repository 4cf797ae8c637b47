"""The quantized twin of any layer's class, and the way back.

`SWAPS` has the twins of torch's own classes. Two other kinds of classes get one made for them:

- a subclass without a `forward` of its own becomes class(Subclass, Twin): its methods and attributes stay, its `forward` is
  the twin's;
- what `torch.nn.utils.parametrize` has made of a class (weight_norm, spectral_norm, ...) becomes what it makes of the twin, so
  that the parametrized weight, and taking the parametrization off again, go on working.
"""

from __future__ import annotations

import copyreg
import types
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

from fourbit.nn._base import SWAPS, QuantizedLayer, learn_class
from fourbit.nn._parts import Composed

_ORIGINALS: WeakKeyDictionary[type, type[nn.Module]] = WeakKeyDictionary()
"""What twins that were made here were made of."""

_BYPASSED = ("forward", "_conv_forward", "__call__")
"""Methods of torch's layers whose place the twin's `forward` takes, or a fused chain."""


def torch_class_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of `SWAPS` that a layer of this class is, converted or not; None: it is no such layer."""
    for base in cls.__mro__:
        learn_class(base)
        if base in SWAPS:
            return base
    return None


def obstacle(module: nn.Module) -> str:
    """Why a layer cannot be converted, in words that follow its class; empty if it can."""
    cls = type(module)
    torch_class = torch_class_of(cls)
    if torch_class is None:
        return "cannot be converted"
    if isinstance(module, QuantizedLayer | Composed):
        return ""
    twin = SWAPS[torch_class]
    for name in _BYPASSED:
        own = getattr(cls, name, None)
        if "forward" in module.__dict__ or (own not in (getattr(torch_class, name, None), getattr(twin, name, None))):
            return f"has a {name} of its own"
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return "is sharded already (convert first)"
    taken = [name for name in _added(torch_class) if hasattr(module, name)]
    if taken:
        return f"has an attribute {taken[0]!r}, which a quantized layer has for itself"
    try:
        quantized_class(cls.__bases__[0] if _is_parametrized(cls) else cls)
    except TypeError as error:
        return f"cannot be extended ({error})"
    return ""


@cache
def _added(torch_class: type[nn.Module]) -> tuple[str, ...]:
    """Attributes that the twin has and torch's class has not."""
    ours = [base for base in SWAPS[torch_class].__mro__ if not issubclass(torch_class, base)]
    declared = (name for base in (QuantizedLayer, Composed) for name in vars(base).get("__annotations__", ()))
    names = {name for base in ours for name in vars(base)} | set(declared)
    return tuple(sorted(name for name in names if not hasattr(torch_class, name) and not name.startswith("__")))


def quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The twin of a class that has no `obstacle`."""
    if cls in SWAPS:
        return SWAPS[cls]
    if _is_parametrized(cls):
        twin = _with_base(cls, quantized_class(cls.__bases__[0]))
        _ORIGINALS[twin] = cls
        return twin
    return _merged(cls)


@cache
def _merged(cls: type[nn.Module]) -> type[nn.Module]:
    torch_class = torch_class_of(cls)
    assert torch_class is not None

    def fill(namespace: dict[str, Any]) -> None:
        kept = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        namespace.update(kept, __reduce_ex__=_reduce)

    twin = types.new_class(cls.__name__, (cls, SWAPS[torch_class]), {}, fill)
    _ORIGINALS[twin] = cls
    return twin


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """The class is found by what it was made of."""
    reduced = object.__reduce_ex__(self, protocol)
    if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced
    _, (cls, *arguments), *rest = reduced
    return _rebuild, (_ORIGINALS[cls], *arguments), *rest


def _rebuild(cls: type[nn.Module], *arguments: Any) -> nn.Module:
    twin = quantized_class(cls)
    return twin.__new__(twin, *arguments)


def original_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a layer had before conversion: the inverse of `quantized_class`; None: it is no twin."""
    found = next((torch_class for torch_class, ours in SWAPS.items() if ours is cls), None)
    if found is not None:
        return found
    if not _is_parametrized(cls):
        return _ORIGINALS.get(cls)
    base = original_class(cls.__bases__[0])
    if base is None:
        return None
    before = _ORIGINALS.get(cls)
    if before is not None and before.__bases__ == (base,) and set(vars(before)) == set(vars(cls)):
        return before
    return _with_base(cls, base)  # parametrized, or freed of one of several parametrizations, since it was converted


def _is_parametrized(cls: type[nn.Module]) -> bool:
    return cls.__module__ == "torch.nn.utils.parametrize"


def _with_base(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A parametrized class, with the same properties, of another base."""
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return cast("type[nn.Module]", type(cls.__name__, (base,), namespace))
