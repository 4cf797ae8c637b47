"""One plain safetensors file: packed codes, scales, everything else as it is, and a header that says how to read it.

    NAME.weight_codes   uint8 [rows, ceil(spots * k / 2)]: two codes a byte, the first in the low nibble, spots * k in order
    NAME.weight_scale   [rows or 1, spots or 1, blocks]: float32, or uint8 codes of the scale format
    NAME.tensor_scale   float32 []
    NAME.input_scale    float32 [], where the input is quantized with a constant scale: x ~ input_scale * integer
    any other name      what the state_dict has; weights of more than 4 bits as the float32 numbers that they are rounded to

    weight = tensor_scale * scale * number, of shape [rows, *kernel, k] with k moved to axis 1

The header's entry `fourbit` is JSON: `layers` has shape, format, scale format, block and input format of each NAME, `formats`
the number of each code of each format (null: none), `folded` the layer of each batch normalization that is folded: the
normalization has no entries, and the layer a bias.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit._version import __version__
from fourbit.errors import UserError
from fourbit.exports._fold import Folds, packed_weights
from fourbit.exports._target import Target, register
from fourbit.exports._weights import (
    activation_objection,
    activation_of,
    codes_of,
    evaluating,
    weight_objection,
)
from fourbit.formats import Format
from fourbit.nn import QuantizedLayer, float_state_dict
from fourbit.ops import LayerSpec

FILE = "model.safetensors"


def _objection(spec: LayerSpec) -> str:
    found = weight_objection(spec)
    return f"weight {found}" if found else ""


def _write(model: nn.Module, folder: Path, input_shape: Sequence[int] | None, folds: Folds) -> None:
    from safetensors.torch import save_file

    with evaluating(model) as layers:
        tensors = {key: t.detach().cpu().clone().contiguous() for key, t in float_state_dict(model).items()}
        described: dict[str, Any] = {}
        formats: dict[str, Format] = {}
        for name, layer, weight in packed_weights(layers, tensors, folds):
            del tensors[f"{name}.weight"]
            tensors[f"{name}.weight_codes"] = pack_nibbles(weight.codes.flatten(1))
            scale, scale_format = weight.scales, weight.scale_format
            tensors[f"{name}.weight_scale"] = scale.clone() if scale_format is None else codes_of(scale, scale_format)
            tensors[f"{name}.tensor_scale"] = weight.tensor_scale.clone()
            described[name] = {
                "shape": list(weight.shape),
                "format": weight.format.name,
                "scale_format": None if scale_format is None else scale_format.name,
                "block": weight.block,
                "input_format": _input(name, layer, tensors),
            }
            formats |= {f.name: f for f in (weight.format, scale_format) if f is not None}
        tables = {name: [v if math.isfinite(v) else None for v in f.values] for name, f in formats.items()}
        folded = {fold.norm: name for name, fold in folds.of.items()}
        header = {"version": __version__, "layers": described, "formats": tables, "folded": folded}
        save_file(tensors, folder / FILE, metadata={"format": "pt", "fourbit": json.dumps(header)})


def _input(name: str, layer: QuantizedLayer, tensors: dict[str, Tensor]) -> str | None:
    """The format of the input, whose scale is entered where it is a constant."""
    spec = layer.spec.x_fprop
    if spec is None or activation_objection(spec):
        return None if spec is None else str(spec)
    found = activation_of(name, layer)
    assert found is not None
    tensors[f"{name}.input_scale"] = torch.tensor(found.scale)
    return found.format.name


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [rows, n] below 16, two a byte, the first in the low nibble; [rows, ceil(n / 2)]."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_nibbles(data: Tensor, count: int) -> Tensor:
    """The inverse."""
    return torch.stack((data & 15, data >> 4), 2).flatten(1)[:, :count]


def read_packed(file: Path) -> dict[str, Tensor]:
    """What `to="safetensors"` wrote as a state_dict of the unconverted model, with weights of 4-bit numbers in float32.

    Where batch normalization is folded, the model is the one that `load_packed` makes.

    Args:
        file: the file, or its folder.

    Raises:
        UserError: there is none, or it is another.
    """
    return _read(file)[0]


def load_packed(model: nn.Module, file: Path) -> nn.Module:
    """Load what `to="safetensors"` wrote into the unconverted model, in place.

    Folded batch normalizations become `torch.nn.Identity`, and the layers in front of them have a bias.

    Args:
        model: built as before `fourbit.convert`.
        file: the file, or its folder.

    Raises:
        UserError: as `read_packed`, or the file is of another model.
    """
    tensors, header = _read(file)

    def load(model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for norm, layer in header["folded"].items():
            modules[layer].register_parameter("bias", nn.Parameter(tensors[f"{layer}.bias"]))
            model.set_submodule(norm, nn.Identity())
        model.load_state_dict(tensors)

    try:
        load(copy.deepcopy(model))  # nothing happens to the model if the file is of another
        load(model)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is of another model than {type(model).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return model


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the header."""
    from safetensors import SafetensorError, safe_open

    file = Path(file) / FILE if Path(file).is_dir() else Path(file)
    try:
        with safe_open(file, "pt") as stored:
            text = (stored.metadata() or {}).get("fourbit")
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): name what fourbit export --to safetensors wrote.") from error
    if text is None:
        raise UserError(
            f"{file} does not say how its codes are packed: name what fourbit export --to safetensors wrote."
        )
    try:
        return _unpacked(json.loads(text), tensors)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file} is damaged, its header does not fit its tensors: export the model again.") from error


def _unpacked(header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights in place of codes and scales."""
    tables = {name: torch.tensor([math.nan if v is None else v for v in t]) for name, t in header["formats"].items()}
    for name, layer in header["layers"].items():
        rows, k, *kernel = layer["shape"]
        spots = math.prod(kernel)
        codes = unpack_nibbles(tensors.pop(f"{name}.weight_codes"), spots * k).view(rows, spots, k)
        scale = tensors.pop(f"{name}.weight_scale")
        scale = scale if layer["scale_format"] is None else tables[layer["scale_format"]][scale.int()]
        scale = scale.repeat_interleave(layer["block"] or k, 2)[:, :, :k]
        weight = tensors.pop(f"{name}.tensor_scale") * (scale * tables[layer["format"]][codes.int()])
        tensors[f"{name}.weight"] = weight.view(rows, *kernel, k).movedim(-1, 1).contiguous()
        tensors.pop(f"{name}.input_scale", None)
    return tensors, {"folded": {}} | header


register(Target("safetensors", "packed codes and scales in one plain file", _objection, _write, FILE, "safetensors"))
