"""`compressed-tensors`: a folder that transformers and vLLM load, with the weights of linear layers packed.

    pack-quantized         INT4: weight_packed int32 [out, ceil(in / 8)], codes + 8 from the low nibble on; weight_scale float32
                           [out, 1], or [out, in / group]; weight_shape. A scale of the tensor is that of every channel.
    nvfp4-pack-quantized   E2M1 in blocks of 16: weight_packed uint8 [out, in / 2]; weight_scale E4M3 [out, in / 16];
                           weight_global_scale float32 [1], by which scales are divided: 1 / the scale of the tensor
    mxfp4-pack-quantized   E2M1 in blocks of 32: weight_packed likewise; weight_scale uint8 [out, in / 32], the codes of E8M0

Inputs stay in the runtime's precision (W4A16): none of these layouts has a clip value for them. E2M1 is unpacked to bfloat16,
and config.json says so.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.exports._fold import Folds, packed_weights
from fourbit.exports._safetensors import pack_nibbles
from fourbit.exports._target import Target, register
from fourbit.exports._weights import PackedWeight, evaluating, weight_objection
from fourbit.formats import E8M0, FP4_E2M1, FP8_E4M3FN
from fourbit.nn import Linear, float_state_dict
from fourbit.ops import LayerSpec
from fourbit.quantizers import BlockScale, QuantSpec, Tile, has_integer_codes

FILE = "model.safetensors"


def is_mxfp4(w: QuantSpec) -> bool:
    """E2M1 in blocks of 32 with one level of E8M0 scales."""
    return _is_blocks(w, 32, E8M0.name) and w.scaling.tensor_bound is None  # type: ignore[union-attr,attr-defined]


def _is_blocks(w: QuantSpec, size: int, scale_format: str) -> bool:
    return (
        w.format == FP4_E2M1
        and isinstance(w.granularity, Tile)
        and w.granularity.sums == size
        and isinstance(w.scaling, BlockScale)
        and w.scaling.kept(w.granularity)[1] is not None
        and w.scaling.format.name == scale_format
    )


def _objection(spec: LayerSpec) -> str:
    w = spec.w_fprop
    if found := weight_objection(spec):
        return f"weight {found}"
    if w is None or len(w.format.grid) > 16 or is_mxfp4(w) or _is_blocks(w, 16, FP8_E4M3FN.name):
        return ""
    if has_integer_codes(w.format) and w.format.signed:
        return ""
    return f"weight is {w}, where it has INT4, NVFP4 and MXFP4"


def _write(model: nn.Module, folder: Path, input_shape: Sequence[int] | None, folds: Folds) -> None:
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"compressed-tensors is a folder of transformers, and the model is a {type(model).__name__}: take safetensors."
        )
    scheme: dict[str, Any] = {}
    kept = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    with evaluating(model) as layers:
        tensors = {key: t.detach().cpu().clone().contiguous() for key, t in float_state_dict(model).items()}
        for name, layer, weight in packed_weights(layers, tensors, folds):
            if not isinstance(layer, Linear):
                raise UserError(f"{name} is a {type(layer).__name__}: it packs linear layers alone: take safetensors.")
            found, parts = _packed(name, weight)
            if scheme not in ({}, found):
                raise UserError(
                    f"{name} is packed otherwise than the layers before it: compressed-tensors takes one layout."
                )
            scheme = found
            kept.remove(name)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": t for key, t in parts.items()}
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.tie_word_embeddings and _are_tied(model, tensors)
    if scheme["weights"]["type"] == "float":
        config.dtype = torch.bfloat16  # as which compressed-tensors unpacks it
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": scheme["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme["weights"]}},
        "ignore": kept,
    }
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def _are_tied(model: Any, tensors: dict[str, Tensor]) -> bool:
    """Whether the head has the numbers of the embedding; where its rounding has changed them, it needs a weight of its own."""
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    embedding = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), None)
    both = [tensors.get(f"{name}.weight") for name in (head, embedding)]
    return both[0] is not None and both[1] is not None and torch.equal(*both)  # type: ignore[arg-type]


def _packed(name: str, weight: PackedWeight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The layout, and the tensors of a layer."""
    rows, _, k = weight.values.shape
    values, block = weight.values[:, 0], weight.block
    if block is not None and k % block:
        raise UserError(
            f"the {k} inputs of {name} are not whole blocks of {block}, which this needs: take safetensors."
        )
    scales = weight.scales[:, 0].expand(rows, -1).contiguous()
    args: dict[str, Any] = {"num_bits": 4, "symmetric": True, "dynamic": False}
    if has_integer_codes(weight.format):
        args |= {"type": "int", "strategy": "channel" if block is None else "group", "group_size": block}
        parts = {
            "weight_packed": _int32(values.to(torch.int32) + 8),
            "weight_scale": weight.tensor_scale * scales,
            "weight_shape": torch.tensor([rows, k]),
        }
        return {"format": "pack-quantized", "weights": args}, parts
    args |= {"type": "float", "group_size": block}
    parts = {"weight_packed": pack_nibbles(weight.codes[:, 0])}
    if weight.scale_format == E8M0:
        args |= {"strategy": "group", "scale_dtype": "torch.uint8"}
        codes = torch.frexp(scales)[1] - 1 + 127
        return {"format": "mxfp4-pack-quantized", "weights": args}, parts | {"weight_scale": codes.to(torch.uint8)}
    args |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    parts["weight_scale"] = scales.to(torch.float8_e4m3fn)
    parts["weight_global_scale"] = weight.tensor_scale.reciprocal().reshape(1)
    return {"format": "nvfp4-pack-quantized", "weights": args}, parts


def _int32(nibbles: Tensor) -> Tensor:
    """[rows, n] below 16, eight to an int32, the first in its low nibble."""
    nibbles = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % 8)).unflatten(1, (-1, 8))
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int32)
    for i in range(8):
        words |= nibbles[:, :, i] << (4 * i)
    return words


register(
    Target(
        "compressed-tensors",
        "a folder of transformers with packed INT4, NVFP4 or MXFP4 weights (W4A16)",
        _objection,
        _write,
        FILE,
        "transformers",
        fold_scales=None,
    )
)
