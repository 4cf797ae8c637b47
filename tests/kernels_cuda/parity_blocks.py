"""Checks of blocks along the summed axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from parity_inputs import DTYPES, Check, between_infinities, same, sample
from torch import Tensor

from fourbit import formats
from fourbit.kernels.cuda import _tiles
from fourbit.quantizers import BlockScale, QuantSpec, Request, Rounding, Tile
from fourbit.quantizers._request import _run_tiles

SCALES = {
    "E8M0 floor": BlockScale(),
    "E4M3 over a tensor scale": BlockScale(formats.get("fp8_e4m3fn"), "nearest", 448.0),
    "E4M3": BlockScale(formats.get("fp8_e4m3fn"), "nearest"),
}


def compare(x: Tensor, scaling: BlockScale, size: int, name: str, rounding: Rounding, wide: bool) -> None:
    format, tile = formats.get(name), Tile(1, size)
    request = Request(x, QuantSpec(format, scaling, tile, rounding=rounding), format, tile, key=12345, wide=wide)
    ours = _tiles.round_tiles(request)
    assert ours is not None, "the kernel declined"
    theirs = _run_tiles(request, tile)
    assert ours.q is not None and theirs.tensor.each is not None and ours.q.dtype == theirs.tensor.q.dtype
    same(ours.q, theirs.tensor.q, "q")
    same(ours.scale, theirs.tensor.scale, "scale")
    same(ours.each, theirs.tensor.each[0], "each")
    same(ours.amax, torch.as_tensor(theirs.amax), "amax")


def block_checks(device: str) -> Iterator[Check]:
    names = ("fp4_e2m1", "int4_sym", "fp8_e4m3fn")
    rules = (Rounding.NEAREST, Rounding.STOCHASTIC)
    for i, (size, (label, scaling), name, rule) in enumerate(product((16, 32, 64, 128), SCALES.items(), names, rules)):
        x = sample(2 * 5 * 150, DTYPES[i % 3], device, 1.0).view(2, 5, 1, 150)
        yield (
            f"block of {size}, {label}, {name}, {rule}",
            lambda a=(x, scaling, size, name, rule, i % 2 == 1): compare(*a),
        )
    for (label, scaling), value in product(SCALES.items(), (0.0, math.nan, math.inf)):
        x = between_infinities(sample(2 * 150, torch.float32, device, 1.0).view(1, 2, 1, 150))
        x[0, 1, 0, :32] = 0.0
        x[0, 0, 0, 40] = value
        yield f"block with {value}, {label}", lambda a=(x, scaling, 16, "fp4_e2m1", rules[0], False): compare(*a)

    def saving_declines() -> None:
        x, tile = sample(64, torch.float32, device).view(1, 2, 1, 32), Tile(1, 32)
        spec = QuantSpec(formats.FP4_E2M1, BlockScale(), tile)
        assert _tiles.round_tiles(Request(x, spec, spec.format, tile, save=True)) is None
        assert _tiles.round_tiles(Request(x, spec, spec.format, tile)) is not None

    yield "codes to save are declined", saving_declines
