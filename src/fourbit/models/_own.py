"""Networks of one's own: a function, or a class, in a Python file.

    path/to/nets.py:make                      reads images [B, C, H, W], gives logits [B, num_classes]
    path/to/nets.py:make?kind=text            tokens [T, B] and the state before them (None at first), gives logits and state

It is called with those of num_classes, in_channels and image_size (None where it is not known) that are its parameters. The
file runs as a program would, so only what a user has typed is ever loaded, and never what a run folder says.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fourbit.errors import UserError, unknown
from fourbit.models._hf import Kind
from fourbit.models._libraries import reason

_NAME = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)(\?kind=(?P<kind>\w*))?", re.DOTALL)


def is_own(name: str) -> bool:
    """Whether a name is that of something in a Python file."""
    return _NAME.fullmatch(name) is not None


def own_kind(name: str) -> Kind:
    """What the network reads. Raises UserError for a kind that there is not, or a file."""
    found = _parts(name)
    kind = found["kind"] or "image"
    if kind not in typing.get_args(Kind):
        raise unknown("kind of network", kind, typing.get_args(Kind))
    if not Path(found["path"]).is_file():
        raise UserError(f"there is no file {found['path']}: check the name of the model.")
    return kind  # type: ignore[return-value]


def own_digest(name: str) -> str:
    """Of the file: runs go on with the network that they began with."""
    return hashlib.blake2b(Path(_parts(name)["path"]).read_bytes(), digest_size=8).hexdigest()


def build_own(name: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """The network that the function makes.

    Raises:
        UserError: no such file or function, an error in it, parameters that nobody gives, or a result that is no module.
    """
    own_kind(name)
    path, function = _parts(name)["path"], _parts(name)["function"]
    module = _loaded(Path(path).resolve())
    make = getattr(module, function, None)
    if not callable(make):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"function in {path}", function, names)
    given: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        parameters = inspect.signature(make).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        values = {key: value for key, value in given.items() if takes_all or any(p.name == key for p in parameters)}
        network = make(**values)
    except Exception as error:
        raise UserError(
            f"{name} cannot make a network ({type(error).__name__}: {reason(error)}): correct it."
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} gives {type(network).__name__}, but must give a torch.nn.Module.")
    return network


@functools.cache
def _loaded(path: Path) -> ModuleType:
    """The module of a file; modules beside it can be imported, as when Python runs it."""
    name = f"fourbit_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: {reason(error)}): correct it.") from error
    return module


def _parts(name: str) -> dict[str, str | Any]:
    found = _NAME.fullmatch(name)
    assert found is not None
    return found.groupdict()
