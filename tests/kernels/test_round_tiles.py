"""Kernels for operands whose tiles have scales: every bit as the reference, in the order of axes that the operand has."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends
from fourbit import formats as f
from fourbit.quantizers import (
    Block,
    BlockScale,
    Hadamard,
    Quantized,
    QuantSpec,
    Request,
    Rotation,
    Rounding,
    Tile,
    run,
    unpack_mask,
)

MX, CEIL = BlockScale(f.E8M0, "floor"), BlockScale(f.E8M0, "ceil")
NV, ONE_LEVEL = BlockScale(f.FP8_E4M3FN, "nearest", tensor_bound=448), BlockScale(f.FP8_E4M3FN, "nearest")
POWER = BlockScale(f.E8M0, "nearest")
QUEST = replace(POWER, clip_rms=2.92247856)
BETTER = BlockScale(f.FP8_E4M3FN, "nearest", tensor_bound=256, targets=(6.0, 4.0))
TILES = (Block(16), Block(32), Tile(16, 16), Tile(32, 64), Block(128))
SHAPES = ((1, 64, 1, 128), (2, 33, 1, 49), (1, 5, 3, 200), (1, 192, 2, 64), (3, 70, 1, 16), (1, 1, 1, 7), (1, 20, 1, 1))
CLIPPED = ((1, 64, 1, 128), (2, 33, 1, 48), (1, 5, 3, 200), (3, 70, 1, 16), (1, 1, 1, 8))
KEY = 77


def spec_of(scaling: BlockScale, tile: Tile, element: f.Format = f.FP4_E2M1, draws: bool = False) -> QuantSpec:
    return QuantSpec(element, scaling, tile, Rounding.STOCHASTIC if draws else Rounding.NEAREST)


def operand(shape: tuple[int, ...], turned: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers over many binades; `turned`: neighbours in memory are rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * 3)
    x = x.to(dtype)
    if not turned:
        return x
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def request_of(x: Tensor, spec: QuantSpec, rotation: Rotation | None = None) -> Request:
    assert isinstance(spec.granularity, Tile)
    return Request(x, spec, spec.format, spec.granularity, None, KEY, save=True, rotation=rotation)


def both(request: Request) -> tuple[Quantized, Quantized]:
    assert backends.OPERATIONS["round_tiles"](request) is not None, "the kernel does not take it"
    ours = run(request)
    with backends.without():
        return ours, run(request)


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.nan_to_num(7e9), b.nan_to_num(7e9))
        and bool((a.isnan() == b.isnan()).all())
    )


def require_same(request: Request) -> Quantized:
    ours, reference = both(request)
    (q, scale, format, each), amax, packed, mask = ours
    assert same(q, reference.tensor.q)
    assert same(scale, reference.tensor.scale) and format is reference.tensor.format
    assert each is not None and reference.tensor.each is not None
    assert same(each[0], reference.tensor.each[0]) and each[1] == reference.tensor.each[1]
    assert same(torch.as_tensor(amax), torch.as_tensor(reference.amax).max())
    assert packed is not None and reference.packed is not None
    assert (mask is None) == (reference.mask is None)
    assert mask is None or reference.mask is None or torch.equal(mask, reference.mask)
    assert packed.blocks is not None and reference.packed.blocks is not None
    assert torch.equal(packed.blocks.data, reference.packed.blocks.data)
    assert packed.blocks.tile == reference.packed.blocks.tile
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.OPERATIONS["unpack_tiles"](packed, dtype) is not None
        numbers = packed.unpack(dtype)
        with backends.without():
            assert same(numbers, reference.packed.unpack(dtype))
            assert same(numbers, packed.unpack(dtype))
        assert same(numbers, reference.packed.unpack(dtype))
    return ours


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    "scaling", [MX, CEIL, POWER, NV, ONE_LEVEL, BETTER, replace(MX, prescale=0.75), replace(NV, prescale=0.75)], ids=str
)
def test_every_bit_is_that_of_the_reference(isa: str, scaling: BlockScale, tile: Tile, turned: bool) -> None:
    for seed, (shape, element) in enumerate(itertools.product(SHAPES, (f.FP4_E2M1, f.INT4_SYM))):
        if scaling is not BETTER or element is f.FP4_E2M1:
            require_same(request_of(operand(shape, turned, seed), spec_of(scaling, tile, element)))


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("tile", [Block(16), Block(32), Tile(16, 16)], ids=str)
@pytest.mark.parametrize("scaling", [MX, NV, replace(MX, prescale=0.75)], ids=str)
def test_random_words_belong_to_the_same_numbers(isa: str, scaling: BlockScale, tile: Tile, turned: bool) -> None:
    for seed, (shape, element) in enumerate(itertools.product(SHAPES, (f.FP4_E2M1, f.INT4_SYM))):
        require_same(request_of(operand(shape, turned, seed), spec_of(scaling, tile, element, draws=True)))


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("tile", [Block(16), Block(32), Tile(16, 16), Tile(32, 64)], ids=str)
@pytest.mark.parametrize("scaling", [MX, NV, replace(CEIL, clip_rms=2.0)], ids=str)
def test_pixels_of_images_whose_channels_lie_next_to_each_other(
    isa: str, scaling: BlockScale, tile: Tile, turned: bool
) -> None:
    """Sums over channels (fprop, dgrad), or over images (wgrad)."""
    for seed, (images, pixels, channels) in enumerate(((40, 9, 16), (16, 5, 32), (7, 6, 48), (64, 4, 24), (3, 2, 64))):
        x = operand((1, images, pixels, channels), False, seed)
        x = x.transpose(1, 3) if turned else x
        for rotation, draws in itertools.product((None, Rotation(Hadamard(16, "fresh"), 5)), (False, True)):
            if not (scaling.clips and x.shape[3] % 8):
                require_same(request_of(x, spec_of(scaling, tile, draws=draws), rotation))


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize(
    "scaling", [QUEST, replace(MX, clip_rms=1.5), replace(CEIL, clip_rms=2.0), replace(NV, clip_rms=2.0)], ids=str
)
def test_what_a_multiple_of_the_root_mean_square_clips_is_masked(isa: str, scaling: BlockScale, turned: bool) -> None:
    """Means are taken in float64, so that their order does not matter."""
    clipped = 0
    for seed, (shape, tile) in enumerate(itertools.product(CLIPPED, TILES)):
        x = operand(shape, turned, seed)
        for rotation in (None, Rotation(Hadamard(8, "fresh"), 5)):
            mask = require_same(request_of(x, spec_of(scaling, tile), rotation)).mask
            assert mask is not None
            clipped += x.numel() - int(unpack_mask(mask, x).sum())
    assert clipped


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("signs", ["none", "fixed", "fresh", "given"])
def test_the_rotation_is_part_of_the_pass(isa: str, signs: str, size: int, turned: bool) -> None:
    given = tuple(1 if i % 3 else -1 for i in range(size))
    rotation = Rotation(Hadamard(size, given if signs == "given" else signs), 5)  # type: ignore[arg-type]
    for seed, (shape, scaling) in enumerate(itertools.product(SHAPES, (MX, NV))):
        for draws in (False, True):
            x = operand(shape, turned, seed)
            found = require_same(request_of(x, spec_of(scaling, Block(16), draws=draws), rotation))
            assert found.tensor.q.shape[3] % size == 0
    require_same(request_of(operand((1, 40, 1, 256), turned), spec_of(BETTER, Tile(16, 16)), rotation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
def test_narrow_numbers_are_read_as_they_are(isa: str, dtype: torch.dtype, turned: bool) -> None:
    for shape, scaling in itertools.product(SHAPES, (MX, NV)):
        x = operand(shape, turned, dtype=dtype)
        require_same(request_of(x, spec_of(scaling, Block(16))))
        require_same(request_of(x, spec_of(scaling, Block(16)), Rotation(Hadamard(32, "fresh"), 9)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("scaling", [MX, CEIL, POWER, NV, ONE_LEVEL, BETTER], ids=str)
def test_what_is_not_finite_makes_its_tile_nan(isa: str, scaling: BlockScale, turned: bool, bad: float) -> None:
    x = operand((1, 40, 2, 96), turned)
    x[0, 3, 1, 40] = bad
    for tile, draws in itertools.product((Block(16), Tile(16, 16)), (False, True)):
        if not (draws and scaling is BETTER):
            found = require_same(request_of(x, spec_of(scaling, tile, draws=draws)))
            assert found.tensor.dequantize()[0, 3, 1, 40].isnan()
            assert not torch.as_tensor(found.amax).isfinite()


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("scaling", [MX, CEIL, POWER, NV, ONE_LEVEL, BETTER], ids=str)
@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-42, 1e-38, 1e-30, 1e30, 3e38 / 8])
def test_zeros_and_the_ends_of_the_range(isa: str, scaling: BlockScale, turned: bool, factor: float) -> None:
    x = operand((1, 40, 1, 96), turned).clamp(-8, 8) * factor
    x[0, :16, 0, :32] = 0.0
    for tile in (Block(16), Tile(16, 16)):
        require_same(request_of(x, spec_of(scaling, tile)))


def test_each_decision_point_goes_to_the_same_side(isa: str) -> None:
    """All bfloat16 numbers from 0 to 8, and their neighbours in float32, in blocks whose scale is 1."""
    points = torch.arange(0x3D00, 0x4100, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    near = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(9.0)), -points])
    rows = torch.nn.functional.pad(near, (0, -near.numel() % 15)).view(-1, 15)
    x = torch.cat([torch.full((rows.shape[0], 1), 6.0), rows.clamp(-6, 6)], 1).view(1, -1, 1, 16)
    for element, scaling in itertools.product((f.FP4_E2M1, f.INT4_SYM, f.FP4_E1M2), (MX, ONE_LEVEL)):
        for draws in (False, True):
            require_same(request_of(x, spec_of(scaling, Block(16), element, draws)))


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
def test_the_result_lies_as_the_operand_does(isa: str, turned: bool) -> None:
    x = operand((2, 64, 3, 96), turned)
    found = run(request_of(x, spec_of(NV, Block(16))))
    assert found.tensor.q.stride() == x.stride()
    assert found.packed is not None and found.packed.stride == x.stride()


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
def test_numbers_come_in_float32_or_not_at_all_where_that_is_asked_for(isa: str, turned: bool) -> None:
    for shape in SHAPES:
        request = request_of(operand(shape, turned), spec_of(NV, Block(16)))
        narrow, wide = run(request), require_same(replace(request, wide=True))
        assert narrow.tensor.q.dtype == torch.bfloat16 and wide.tensor.q.dtype == torch.float32
        assert torch.equal(narrow.tensor.q.float(), wide.tensor.q)
        codes = run(replace(request, carrier=False))
        assert codes.tensor.q.numel() == 0 and codes.packed is not None and narrow.packed is not None
        assert torch.equal(codes.packed.data, narrow.packed.data)


@pytest.mark.parametrize(
    "recipe", ["nvfp4", "nvfp4-4over6", "mxfp4-rht-sr", "mxfp4-amd", "tetrajet", "ufp4", "quartet"]
)
def test_layers_train_as_without_kernels(isa: str, recipe: str) -> None:
    """Products are torch's, in float32, of the same numbers; their sums may go in another order."""
    found = []
    for kernels in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), *(nn.Linear(64, 64) for _ in range(4))
        )
        fb.convert(model, recipe)
        x = torch.randn(40, 64, requires_grad=True)
        with nullcontext() if kernels else backends.without():
            model(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_several_threads_write_the_same(isa: str) -> None:
    before = torch.get_num_threads()
    for turned, draws in itertools.product((False, True), (False, True)):
        request = request_of(operand((1, 256, 1, 512), turned), spec_of(NV, Block(16), draws=draws))
        try:
            torch.set_num_threads(3)
            many = run(request)
        finally:
            torch.set_num_threads(before)
        one = run(request)
        assert torch.equal(many.tensor.q, one.tensor.q) and many.packed is not None and one.packed is not None
        assert torch.equal(many.packed.data, one.packed.data)


@pytest.mark.parametrize("turned", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "float32"])
def test_results_larger_than_caches_are_those_of_their_parts(wide: bool, turned: bool) -> None:
    """From 2^25 bytes on they are written past the caches."""
    rows, sums = (4096, 2048) if wide else (4096, 4096)
    x = torch.randn(1, sums, 1, rows).permute(0, 3, 2, 1) if turned else torch.randn(1, rows, 1, sums)
    request = replace(request_of(x, spec_of(MX, Block(32))), wide=wide)
    whole = run(request).tensor.q
    for part in (slice(0, rows // 2), slice(rows // 2, rows)):
        y = x[:, part].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) if turned else x[:, part]
        assert torch.equal(whole[:, part], run(replace(request, x=y)).tensor.q)


def test_what_the_kernels_have_not_got_is_left_to_the_reference() -> None:
    x = operand((1, 32, 1, 64), False)
    for spec in (
        spec_of(MX, Block(24)),
        spec_of(MX, Tile(4, 16)),
        spec_of(MX, Block(16), f.FP8_E4M3FN),
        spec_of(replace(NV, rounding="stochastic"), Block(16)),
        spec_of(replace(POWER, tensor_bound=448), Block(16)),
        spec_of(BETTER, Block(16), draws=True),
        spec_of(replace(NV, corrected=32), Block(16)),
    ):
        assert backends.OPERATIONS["round_tiles"](request_of(x, spec)) is None
