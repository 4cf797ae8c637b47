"""Train deep neural networks in 4 bits.

    import fourbit as fb

    fb.convert(model, "ibm2020")
    opt = torch.optim.SGD(fb.param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)

Importing the package costs nothing: every name below is loaded when it is first used, and `fourbit.formats` never needs
torch at all.
"""

from fourbit._version import __version__ as __version__

TYPE_CHECKING = False  # typing's own costs time, in which Ctrl-C would have a traceback

if TYPE_CHECKING:
    from typing import Any

    from fourbit import backends as backends
    from fourbit import conform as conform
    from fourbit import diagnosis as diagnosis
    from fourbit import exports as exports
    from fourbit import formats as formats
    from fourbit import nn as nn
    from fourbit import recipes as recipes
    from fourbit.diagnosis._watch import Watch as Watch
    from fourbit.errors import NonFiniteError as NonFiniteError
    from fourbit.errors import UserError as UserError
    from fourbit.exports import export as export
    from fourbit.nn import LayerState as LayerState
    from fourbit.nn import float_state_dict as float_state_dict
    from fourbit.nn import nonfinite_layers as nonfinite_layers
    from fourbit.nn import observe as observe
    from fourbit.nn import quantized_layers as quantized_layers
    from fourbit.nn import share_batch as share_batch
    from fourbit.nn import synchronize as synchronize
    from fourbit.ops import REUSE as REUSE
    from fourbit.ops import Accumulation as Accumulation
    from fourbit.ops import LayerSpec as LayerSpec
    from fourbit.quantizers import Amax as Amax
    from fourbit.quantizers import Block as Block
    from fourbit.quantizers import BlockScale as BlockScale
    from fourbit.quantizers import ClipValue as ClipValue
    from fourbit.quantizers import FixedScale as FixedScale
    from fourbit.quantizers import GradScale as GradScale
    from fourbit.quantizers import Hadamard as Hadamard
    from fourbit.quantizers import LossScaled as LossScaled
    from fourbit.quantizers import QTensor as QTensor
    from fourbit.quantizers import QuantSpec as QuantSpec
    from fourbit.quantizers import Rounding as Rounding
    from fourbit.quantizers import Sawb as Sawb
    from fourbit.quantizers import Tile as Tile
    from fourbit.quantizers import quantize as quantize
    from fourbit.quantizers import round_to_format as round_to_format
    from fourbit.recipes import GradientNoise as GradientNoise
    from fourbit.recipes import LossScaler as LossScaler
    from fourbit.recipes import Phase as Phase
    from fourbit.recipes import Rate as Rate
    from fourbit.recipes import Recipe as Recipe
    from fourbit.recipes import Rule as Rule
    from fourbit.recipes import Scheduler as Scheduler
    from fourbit.recipes import convert as convert
    from fourbit.recipes import depthwise as depthwise
    from fourbit.recipes import explain as explain
    from fourbit.recipes import first as first
    from fourbit.recipes import kernel_size as kernel_size
    from fourbit.recipes import last as last
    from fourbit.recipes import last_share as last_share
    from fourbit.recipes import loss_scaler as loss_scaler
    from fourbit.recipes import memory_report as memory_report
    from fourbit.recipes import name as name
    from fourbit.recipes import param_groups as param_groups
    from fourbit.recipes import restore as restore
    from fourbit.recipes import scheduler as scheduler
    from fourbit.report import diagnose as diagnose
    from fourbit.tuning import tune as tune

_HOME = {
    "export": "exports",
    "diagnose": "report",
    "tune": "tuning",
    "Watch": "diagnosis._watch",
    **dict.fromkeys(("NonFiniteError", "UserError"), "errors"),
    **dict.fromkeys(("LayerState", "float_state_dict", "nonfinite_layers", "observe", "quantized_layers"), "nn"),
    **dict.fromkeys(("share_batch", "synchronize"), "nn"),
    **dict.fromkeys(("REUSE", "Accumulation", "LayerSpec"), "ops"),
    **dict.fromkeys(
        ("Amax", "ClipValue", "FixedScale", "GradScale", "LossScaled", "QTensor", "QuantSpec"), "quantizers"
    ),
    **dict.fromkeys(("Rounding", "Sawb", "quantize", "round_to_format"), "quantizers"),
    **dict.fromkeys(("Block", "BlockScale", "Hadamard", "Tile"), "quantizers"),
    **dict.fromkeys(("GradientNoise", "Phase", "Rate", "Scheduler", "last_share", "scheduler"), "recipes"),
    **dict.fromkeys(("LossScaler", "Recipe", "Rule", "convert", "depthwise", "explain", "first"), "recipes"),
    **dict.fromkeys(
        ("kernel_size", "last", "loss_scaler", "memory_report", "name", "param_groups", "restore"), "recipes"
    ),
}
_PACKAGES = (
    "backends",
    "formats",
    "quantizers",
    "ops",
    "nn",
    "recipes",
    "models",
    "data",
    "train",
    "report",
    "conform",
    "diagnosis",
    "exports",
)

__all__ = ["__version__", *_PACKAGES, *_HOME]


def __getattr__(name: str) -> "Any":
    import importlib

    if name in _PACKAGES:
        return importlib.import_module(f"fourbit.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"fourbit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fourbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
