"""GGUF: linear layers in blocks of 32, INT4 weights as Q4_0 and MXFP4 weights as MXFP4; the rest in float32.

    Q4_0    fp16 scale d, then 16 bytes; w = d * (nibble - 8). Every block has the scale of its tensor, row or block, rounded to
            fp16: the weights of a block are off by one common factor within 1 +- 2^-11
    MXFP4   the code of the E8M0 scale, then 16 bytes of E2M1: the same numbers

In both, byte i has element i in the low and element i + 16 in the high nibble. Tensors have their names of the state_dict,
and the file has no metadata of an architecture: it is a container of tensors, and no model that llama.cpp would run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fourbit.errors import UserError
from fourbit.exports._compressed import is_mxfp4
from fourbit.exports._fold import Folds, packed_weights
from fourbit.exports._target import Target, register
from fourbit.exports._weights import PackedWeight, evaluating, weight_objection
from fourbit.nn import Linear, float_state_dict
from fourbit.ops import LayerSpec
from fourbit.quantizers import Tile, has_integer_codes

FILE = "model.gguf"
BLOCK = 32
SMALLEST, LARGEST = 2.0**-14, 65504.0
"""Of the normal numbers of fp16."""


def _objection(spec: LayerSpec) -> str:
    w = spec.w_fprop
    if found := weight_objection(spec):
        return f"weight {found}"
    if w is None or len(w.format.grid) > 16 or is_mxfp4(w):
        return ""
    if not (has_integer_codes(w.format) and w.format.signed):
        return f"weight is {w}, where it has INT4 (Q4_0) and MXFP4"
    if isinstance(w.granularity, Tile) and w.granularity.sums is not None and w.granularity.sums % BLOCK:
        return f"weight has a scale per {w.granularity}, where Q4_0 has one for each 32"
    return ""


def _write(model: nn.Module, folder: Path, input_shape: Sequence[int] | None, folds: Folds) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / FILE, "fourbit")
    with evaluating(model) as layers:
        tensors = {key: t.detach().cpu() for key, t in float_state_dict(model).items()}
        for name, layer, weight in packed_weights(layers, tensors, folds):
            if not isinstance(layer, Linear):
                raise UserError(
                    f"{name} is a {type(layer).__name__}: GGUF's blocks are for linear layers: take safetensors."
                )
            del tensors[f"{name}.weight"]
            kind = "Q4_0" if has_integer_codes(weight.format) else "MXFP4"
            data = _blocks(name, weight)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
        for name, t in tensors.items():
            if t.dim():  # not the number of batches that a normalization has seen
                writer.add_tensor(name, np.ascontiguousarray(t.to(torch.float32).numpy()))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _blocks(name: str, weight: PackedWeight) -> np.ndarray:
    """uint8 [rows, bytes]."""
    rows, _, k = weight.values.shape
    if k % BLOCK:
        raise UserError(f"the {k} inputs of {name} are not whole blocks of {BLOCK}, as GGUF needs: take safetensors.")
    scales = weight.each.expand(weight.values.shape)[:, 0, ::BLOCK]
    if has_integer_codes(weight.format):
        nibbles, scales = weight.values[:, 0].to(torch.int16) + 8, weight.tensor_scale * scales
        if not bool(((scales >= SMALLEST) & (scales <= LARGEST)).all()):
            raise UserError(
                f"a scale of {name} is {float(scales.min()):.3g} or {float(scales.max()):.3g}, beyond the normal numbers of "
                f"fp16 ({SMALLEST:.3g} to {LARGEST:g}) that Q4_0 has: take safetensors."
            )
        heads = scales.to(torch.float16).contiguous().view(torch.uint8).reshape(rows, -1, 2)
    else:
        nibbles = weight.codes[:, 0]
        heads = (torch.frexp(scales)[1] + 126).to(torch.uint8).unsqueeze(-1)
    halves = nibbles.to(torch.uint8).reshape(rows, -1, 2, BLOCK // 2)
    return torch.cat((heads, halves[:, :, 0] | (halves[:, :, 1] << 4)), 2).flatten(1).numpy()


register(
    Target(
        "gguf",
        "linear layers in GGUF's blocks of 32, Q4_0 or MXFP4",
        _objection,
        _write,
        FILE,
        "gguf",
        (SMALLEST, LARGEST),
    )
)
