"""Quantizers of other libraries under short names: `torchao:nvfp4`.

Nothing is imported before a name is asked for. Adapters call what the libraries' documentation calls, with their defaults
unless the name says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fourbit._registry import Registry
from fourbit.errors import UserError


@dataclass(frozen=True)
class Peer:
    """A quantizer of another library.

    Args:
        name: "library:quantizer".
        make: imports the library and returns the quantizer.
        format: the block format that it claims.
        rounding: what it does.
        module: what has to be importable, and `how` to make it so.
        linear: makes a layer, where this is about one.
        package: whose version is reported.
    """

    name: str
    make: Callable[[], Callable[[Tensor], Tensor]]
    format: str
    module: str
    how: str
    package: str = ""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    linear: Callable[[], Callable[..., Any]] | None = None

    def require(self) -> None:
        """Import the library.

        Raises:
            UserError: it is not installed, or does not load.
        """
        logging.disable(logging.WARNING)  # of kernels for other devices
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            library = self.module.partition(".")[0]
            missing = (
                library if (error.name or "").partition(".")[0] == library else f"{error.name}, which {library} needs,"
            )
            raise UserError(f"{missing} is not installed: {self.how}.") from error
        except Exception as error:
            text = " ".join(str(error).split())
            raise UserError(f"{self.module} does not load: {type(error).__name__}: {text}.") from error
        finally:
            logging.disable(logging.NOTSET)

    def versions(self) -> dict[str, str]:
        """The library's version, as far as it has one."""
        try:
            return {self.package: importlib.metadata.version(self.package)}
        except importlib.metadata.PackageNotFoundError:
            return {self.package: "a clone"}


PEERS: Registry[Peer] = Registry("peer")
"""Every quantizer that has an adapter, by name."""

_TORCHAO = "pip install torchao"
_MICROXCALING = "clone github.com/microsoft/microxcaling and put the folder on PYTHONPATH"
_FOUR_OVER_SIX = "SKIP_CUDA_BUILD=1 pip install --no-build-isolation fouroversix transformers"


def _add(
    name: str, make: Callable[[], Callable[[Tensor], Tensor]], format: str, module: str, how: str, **rest: Any
) -> None:
    package = name.partition(":")[0]
    PEERS.add(name, Peer(name, make, format, module, how, package, **rest))


def _torchao_mx(elements: str, mode: str = "FLOOR") -> Callable[[Tensor], Tensor]:
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    dtype = getattr(torch, elements, elements)
    scaling = getattr(mx.ScaleCalculationMode, mode)
    return lambda x: mx.MXTensor.to_mx(x, dtype, 32, scaling).dequantize(torch.float32)


def _torchao_nvfp4(tensor_scale: bool) -> Callable[[Tensor], Tensor]:
    nvfp4 = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

    def quantize(x: Tensor) -> Tensor:
        scale = nvfp4.per_tensor_amax_to_scale(x.abs().max()) if tensor_scale else None
        return nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    return quantize


for _name, _elements in (
    ("mxfp4", "float4_e2m1fn_x2"),
    ("mxfp6_e2m3", "fp6_e2m3"),
    ("mxfp6_e3m2", "fp6_e3m2"),
    ("mxfp8_e4m3", "float8_e4m3fn"),
    ("mxfp8_e5m2", "float8_e5m2"),
):
    _add(f"torchao:{_name}", partial(_torchao_mx, _elements), _name, "torchao.prototype.mx_formats.mx_tensor", _TORCHAO)
_add(
    "torchao:mxfp4_rceil",
    partial(_torchao_mx, "float4_e2m1fn_x2", "RCEIL"),
    "mxfp4_ceil",
    "torchao.prototype.mx_formats.mx_tensor",
    _TORCHAO,
)
for _name, _scaled in (("nvfp4", True), ("nvfp4_one_level", False)):
    _add(
        f"torchao:{_name}",
        partial(_torchao_nvfp4, _scaled),
        _name,
        "torchao.prototype.mx_formats.nvfp4_tensor",
        _TORCHAO,
    )


def _mx_specs(elements: str) -> Any:
    settings = {"w_elem_format": elements, "a_elem_format": elements, "scale_bits": 8, "block_size": 32, "bfloat": 0}
    return importlib.import_module("mx").finalize_mx_specs(
        {**settings, "custom_cuda": False, "quantize_backprop": True}
    )


def _microxcaling(elements: str, rounding: str) -> Callable[[Tensor], Tensor]:
    quantize, specs = importlib.import_module("mx.mx_ops").quantize_mx_op, _mx_specs(elements)
    return lambda x: quantize(x, specs, elem_format=elements, axes=[-1], block_size=32, round=rounding)


def _microxcaling_linear() -> Callable[..., Any]:
    mx, specs = importlib.import_module("mx"), _mx_specs("fp4_e2m1")
    return lambda inputs, outputs: mx.Linear(inputs, outputs, bias=True, mx_specs=specs)


for _name, _elements in (
    ("mxfp4", "fp4_e2m1"),
    ("mxint4", "int4"),
    ("mxfp6_e2m3", "fp6_e2m3"),
    ("mxfp6_e3m2", "fp6_e3m2"),
    ("mxfp8_e4m3", "fp8_e4m3"),
    ("mxfp8_e5m2", "fp8_e5m2"),
):
    _linear = _microxcaling_linear if _name == "mxfp4" else None
    _add(
        f"microxcaling:{_name}",
        partial(_microxcaling, _elements, "nearest"),
        _name,
        "mx",
        _MICROXCALING,
        linear=_linear,
    )
_add("microxcaling:mxfp4_even", partial(_microxcaling, "fp4_e2m1", "even"), "mxfp4", "mx", _MICROXCALING)
_add(
    "microxcaling:mxfp4_dither",
    partial(_microxcaling, "fp4_e2m1", "dither"),
    "mxfp4",
    "mx",
    _MICROXCALING,
    rounding="stochastic",
)


def _four_over_six(**settings: Any) -> Callable[[Tensor], Tensor]:
    library = importlib.import_module("fouroversix.quantize")
    quantize = getattr(library, "quantize_to_fp4", None) or library.quantize
    config = library.QuantizationConfig(**settings)
    # Its default float16 for values times scales holds nothing above 65504.
    return lambda x: library.dequantize(quantize(x, config), torch.float32, intermediate_dtype=torch.float32)


for _name, _format, _settings in (
    ("nvfp4_4over6", "nvfp4_4over6", {}),
    ("nvfp4_4over6_mae", "nvfp4_4over6", {"scale_rule": "mae"}),
    ("nvfp4", "nvfp4", {"scale_rule": "static_6"}),
    ("mxfp4", "mxfp4_ceil", {"dtype": "mxfp4", "scale_rule": "static_6"}),
):
    _add(f"fouroversix:{_name}", partial(_four_over_six, **_settings), _format, "fouroversix", _FOUR_OVER_SIX)
_add(
    "fouroversix:nvfp4_stochastic",
    partial(_four_over_six, scale_rule="static_6", round_style="stochastic"),
    "nvfp4",
    "fouroversix",
    _FOUR_OVER_SIX,
    rounding="stochastic",
)


def _trainkit(elements: str, rule: str, rounding: str) -> Callable[[Tensor], Tensor]:
    recipe, quantizer = importlib.import_module("fp4tk.recipe"), importlib.import_module("fp4tk.quantizer.registry")
    config = recipe.QuantConfig(
        recipe.QuantFormat[elements], recipe.BlockAxis.RowWise, recipe.Rounding[rounding], recipe.ScaleImpl[rule]
    )
    importlib.import_module("fp4tk.linear")  # registers the quantizers
    return quantizer.QuantizerRegistry.create(config)


def _trainkit_linear() -> Callable[..., Any]:
    layer, recipes = (
        importlib.import_module("fp4tk.linear").FP4Linear,
        importlib.import_module("fp4tk.recipe").FP4_RECIPES,
    )
    return lambda inputs, outputs: layer(inputs, outputs, recipe=recipes["mx_baseline"])


_TRAINKIT = "clone github.com/vuiseng9/fp4-trainkit and put the folder's src on PYTHONPATH"
for _name, _format, _settings, _linear in (
    ("mxfp4", "mxfp4", ("MXFP4", "MX", "Nearest"), _trainkit_linear),
    ("mxfp4_ceil", "mxfp4_ceil", ("MXFP4", "TetraJet", "Nearest"), None),
    ("nvfp4_one_level", "nvfp4_one_level", ("NVFP4", "FP4_All_The_Way", "Nearest"), None),
):
    _add(f"fp4-trainkit:{_name}", partial(_trainkit, *_settings), _format, "fp4tk", _TRAINKIT, linear=_linear)
_add(
    "fp4-trainkit:mxfp4_stochastic",
    partial(_trainkit, "MXFP4", "MX", "Stochastic"),
    "mxfp4",
    "fp4tk",
    _TRAINKIT,
    rounding="stochastic",
)


def _own(name: str, rounding: str) -> Callable[[Tensor], Tensor]:
    from fourbit.formats import get_block
    from fourbit.quantizers import Block, BlockScale, QuantSpec, Rounding, quantize, stream_key

    block = get_block(name)
    targets = block.targets if len(block.targets) > 1 else None
    scaling = BlockScale(block.scale, block.rule, tensor_bound=block.tensor_bound or None, targets=targets)
    spec = QuantSpec(block.element, scaling, Block(block.block), Rounding(rounding))
    calls = iter(range(1 << 62))
    return lambda x: quantize(x, spec, key=stream_key(next(calls))).dequantize()


def _own_linear() -> Callable[..., Any]:
    from fourbit.formats import FP4_E2M1
    from fourbit.nn import Linear
    from fourbit.ops import LayerSpec
    from fourbit.quantizers import Block, BlockScale, QuantSpec

    mxfp4 = QuantSpec(FP4_E2M1, BlockScale(), Block(32))
    spec = LayerSpec(mxfp4, mxfp4, mxfp4, mxfp4, mxfp4, mxfp4)
    return lambda inputs, outputs: Linear(inputs, outputs, spec=spec)


for _name in ("mxfp4", "mxfp4_ceil", "mxfp8_e4m3", "nvfp4", "nvfp4_one_level", "nvfp4_4over6"):
    _add(
        f"fourbit:{_name}",
        partial(_own, _name, "nearest"),
        _name,
        "fourbit",
        "pip install fourbit",
        linear=_own_linear if _name == "mxfp4" else None,
    )
for _name in ("mxfp4_ceil", "nvfp4"):
    _add(
        f"fourbit:{_name}_stochastic",
        partial(_own, _name, "stochastic"),
        _name,
        "fourbit",
        "pip install fourbit",
        rounding="stochastic",
    )
