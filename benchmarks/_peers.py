"""Other libraries, where they are installed: how to import them quietly, and how to put them into a network.

A peer that is missing, switched off or broken raises `Skip` with the reason. Peers quantize the layers that LUQ's recipe
quantizes (all but first, last and depthwise), which gives them the fewest layers that any of our entrants has. QPyTorch's
and microxcaling's layers are used as their documentation says, in the default layout of memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._harness import Skip


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


@functools.lru_cache(maxsize=16)
def _import(name: str, how: str) -> Any:
    if os.environ.get("FOURBIT_BENCHMARK_PEERS") == "0":
        raise Skip("other libraries were left out (--no-peers)")
    warnings.filterwarnings("ignore", module=rf"{name.split('.')[0]}\b")
    try:
        with _quietly():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Skip(f"{error.name} is not installed: {how}") from None
    except (ImportError, RuntimeError, OSError) as error:
        raise Skip(f"importing {name} failed: {type(error).__name__}") from None


def _from_clone(name: str, variable: str, option: str, inside: str) -> Any:
    folder = os.environ.get(variable)
    if not folder:
        raise Skip(f"no clone given: {option} DIR")
    path = str(Path(folder, inside).resolve())
    if path not in sys.path:
        sys.path.append(path)
    return _import(name, f"no package {name} in the folder of {option}")


_PIP = "pip install --no-deps -r benchmarks/requirements.txt"


def torchao(module: str) -> Any:
    """A module of torchao."""
    return _import(f"torchao.{module}", _PIP)


def qtorch() -> tuple[Any, Any]:
    """QPyTorch's number formats and its quantizers. It compiles C++ at the first import of a machine (half a minute)."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise Skip("qtorch needs a C++ compiler when it is imported")
    with contextlib.suppress(ImportError):  # torch looks for the program on the path
        os.environ["PATH"] = os.pathsep.join([importlib.import_module("ninja").BIN_DIR, os.environ["PATH"]])
    return _import("qtorch", _PIP), _import("qtorch.quant", _PIP)


def microxcaling() -> Any:
    """The package `mx`."""
    return _from_clone("mx", "MICROXCALING", "--microxcaling", ".")


def fp4_trainkit() -> Any:
    """The package `fp4tk`."""
    return _from_clone("fp4tk", "FP4_TRAINKIT", "--fp4-trainkit", "src")


def versions() -> dict[str, str]:
    """Versions of the peers that can be imported."""
    found = {}
    for name in ("qtorch", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for name, variable in (("microxcaling", "MICROXCALING"), ("fp4-trainkit", "FP4_TRAINKIT")):
        if os.environ.get(variable):
            found[name] = "a clone"
    return {} if os.environ.get("FOURBIT_BENCHMARK_PEERS") == "0" else found


def swap(model: nn.Module, names: Sequence[str], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace the layers of these names by what `make` makes of them."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))
    return model


def mx_specs(elements: str) -> Any:
    """microxcaling's settings: blocks of 32, an 8-bit scale each, forward and backward."""
    return microxcaling().finalize_mx_specs(
        {
            "w_elem_format": elements,
            "a_elem_format": elements,
            "scale_bits": 8,
            "block_size": 32,
            "bfloat": 0,
            "custom_cuda": False,
            "quantize_backprop": True,
        }
    )


def to_microxcaling(elements: str, model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Its own Linear and Conv2d in place of torch's."""
    mx, specs = microxcaling(), mx_specs(elements)

    def make(layer: nn.Module) -> nn.Module:
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            return mx.Linear(layer.in_features, layer.out_features, bias=bias, mx_specs=specs)
        assert isinstance(layer, nn.Conv2d)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups, bias)
        return mx.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, *geometry, mx_specs=specs)

    return swap(model, names, make)


class QPyTorchLayer(nn.Module):
    """y = Q_g(F(Q(x), Q(w))): 4-bit block floating point forward, stochastic [1,2,1] gradients (it has no [1,3,0])."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        numbers, quant = qtorch()
        self.layer = layer
        self.forward_quantizer = quant.quantizer(
            forward_number=numbers.BlockFloatingPoint(wl=4, dim=0), forward_rounding="nearest"
        )
        self.gradient_quantizer = quant.quantizer(
            backward_number=numbers.FloatingPoint(exp=2, man=1), backward_rounding="stochastic"
        )

    def forward(self, x: Tensor) -> Tensor:
        layer, x, w = self.layer, self.forward_quantizer(x), self.forward_quantizer(self.layer.weight)
        if isinstance(layer, nn.Linear):
            return self.gradient_quantizer(F.linear(x, w, layer.bias))
        y = F.conv2d(x, w, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]
        return self.gradient_quantizer(y)


def to_qpytorch(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Each layer wrapped in QPyTorch's quantizers. (It has no gradient scaling of its own; that does not change the time.)"""
    return swap(model, names, QPyTorchLayer)


def to_fp4_trainkit(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Its TetraJet recipe: MXFP4, linear layers only. (Its forward leaves biases out, which saves it an addition.)"""
    kit = fp4_trainkit()
    if not all(isinstance(model.get_submodule(name), nn.Linear) for name in names):
        raise Skip("fp4-trainkit has no convolutions")
    make = _import("fp4tk.linear", "").FP4Linear.from_linear
    return swap(model, names, lambda layer: make(layer, kit.FP4_RECIPES["tetrajet"]))


def require_compiler() -> None:
    """Skip unless there is the C++ compiler that torch.compile needs on a CPU."""
    if not any(map(shutil.which, [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"])):
        raise Skip("torch.compile needs a C++ compiler")
