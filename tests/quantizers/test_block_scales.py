"""Scales of tiles, and rotations, against definitions in Python."""

import itertools
import math

import pytest
import torch

from fourbit import UserError, formats
from fourbit.formats import BLOCKS
from fourbit.quantizers import (
    Amax,
    Block,
    BlockScale,
    Hadamard,
    QuantSpec,
    Rounding,
    Sawb,
    Tile,
    fold,
    quantize,
    stream_key,
    unfold,
)


def spec_of(name: str) -> QuantSpec:
    block = BLOCKS[name]
    targets = block.targets if len(block.targets) > 1 else None
    bound = block.tensor_bound or None
    scaling = BlockScale(block.scale, block.rule, tensor_bound=bound, targets=targets, micro=block.micro)
    return QuantSpec(block.element, scaling, Block(block.block))


def defined(name: str, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Element times scale of its block, which is exact, and the scale of the tensor, by the definition in Python."""
    block = BLOCKS[name]
    amax, numbers, tensor_scale = float(x.abs().max()), [], 1.0
    for row in x.tolist():
        q = block.quantize(row, amax)
        tensor_scale = q.tensor_scale
        numbers.append(
            [
                block.element.values[c] * block.scale_at(i, q.scales[i // block.block], q.micro)
                for i, c in enumerate(q.codes)
            ]
        )
    return torch.tensor(numbers, dtype=torch.float64), tensor_scale


def rows(seed: int, num: int = 12, length: int = 83) -> torch.Tensor:
    """Numbers of many magnitudes, ties, zeros; blocks of zeros; the last block is ragged."""
    torch.manual_seed(seed)
    x = torch.randn(num, length) * torch.exp2(torch.randint(-12, 12, (num, 1)).float())
    x[1] = (x[1] * 4).round() / 4
    x[2] = torch.randint(-12, 13, (length,)) / 2
    x[3] = 0
    x[4, :40] = 0
    x[5] = x[5] * 2.0**-110
    if seed == 2:  # so small that the tensor's scale reaches the ends of float32
        x *= 2.0**-140
    x[6] *= torch.exp2(torch.randint(-20, 20, (length,)).float())
    return x


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(BLOCKS))
def test_every_block_format_is_that_of_its_definition_in_python(name, seed):
    x = rows(seed)
    numbers, tensor_scale = defined(name, x)
    found = quantize(x, spec_of(name))
    assert torch.equal(found.q.double(), numbers)
    assert float(found.scale) == tensor_scale


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8_e4m3", "hif4"])
def test_nan_and_infinity_make_their_block_or_tensor_nan_as_the_definition_says(name, bad):
    x = rows(0)
    x[7, 50] = bad
    expected = torch.tensor(BLOCKS[name].round(x.tolist()))
    found = quantize(x, spec_of(name)).dequantize()
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()


@pytest.mark.parametrize("sums", [0, 1, 2, (0, 2), (2, 0), (1, 2)])
def test_blocks_run_along_the_axes_that_a_product_sums_over(sums):
    x = torch.randn(5, 18, 7)
    spec = spec_of("nvfp4")
    axes = [sums] if isinstance(sums, int) else list(sums)
    others = [d for d in range(3) if d not in axes]
    flat = x.permute(*others, *axes).reshape(math.prod(x.shape[d] for d in others), -1)
    expected = defined("nvfp4", flat)[0].reshape([x.shape[d] for d in (*others, *axes)])
    found = quantize(x, spec, sums=sums).q.permute(*others, *axes)
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize(
    "tile", [Tile(1, 16), Tile(16, 16), Tile(3, 7), Tile(1, None), Tile(None, 1), Tile(None, 4)], ids=str
)
@pytest.mark.parametrize("scaling", [Amax(), Sawb()], ids=str)
def test_each_tile_has_the_scale_that_it_would_have_alone(tile, scaling):
    x = torch.randn(20, 36)
    found = quantize(x, QuantSpec("int4_sym", scaling, tile)).dequantize()
    r, k = tile.rows or 20, tile.sums or 36
    for i, j in itertools.product(range(0, 20, r), range(0, 36, k)):
        part = x[i : i + r, j : j + k]
        alone = quantize(part, QuantSpec("int4_sym", scaling))
        torch.testing.assert_close(found[i : i + r, j : j + k], alone.dequantize(), rtol=1e-6, atol=1e-7)


def test_cutting_into_tiles_and_back_changes_nothing():
    for shape, tile in itertools.product(
        [(2, 5, 3, 17), (1, 1, 1, 1), (2, 0, 1, 4), (1, 4, 1, 0)], [Tile(2, 4), Tile(None, 3), Tile(1, None)]
    ):
        m = torch.randn(shape)
        assert torch.equal(unfold(fold(m, tile).t, m.shape), m)


def test_quest_s_scale_is_a_power_of_two_next_to_a_multiple_of_the_root_mean_square():
    x = torch.randn(4, 32)
    spec = QuantSpec("fp4_e2m1", BlockScale("e8m0", "nearest", clip_rms=2.92247856), Block(32))
    raw = 2.92247856 / 6 * x.double().square().mean(1).sqrt()
    scales = torch.tensor([formats.E8M0.round(float(v)) for v in raw])
    expected = torch.tensor(
        [[formats.FP4_E2M1.round(float(v / s)) * float(s) for v in row] for row, s in zip(x, scales, strict=True)]
    )
    assert torch.equal(quantize(x, spec).dequantize(), expected)


@pytest.mark.parametrize(
    "scaling",
    [BlockScale(prescale=0.75), BlockScale("fp8_e4m3fn", "nearest", tensor_bound=448), BlockScale(rounding="ceil")],
    ids=str,
)
def test_stochastic_rounding_in_blocks_is_unbiased(scaling):
    """Four standard errors of the mean of 2000 roundings, for each of 64 numbers: a false alarm in 250 runs."""
    x = torch.randn(2, 32)
    spec = QuantSpec("fp4_e2m1", scaling, Block(32 if scaling.format.name == "e8m0" else 16), Rounding.STOCHASTIC)
    if scaling.tensor_bound:
        x = x / x.abs().unflatten(1, (-1, 16)).amax(2, keepdim=True).expand(2, 2, 16).reshape(2, 32)  # scales are exact
    drawn = torch.stack([quantize(x, spec, key=stream_key(5, i)).dequantize() for i in range(2000)]).double()
    rare = (
        float(x.abs().max()) / 3 / 2000**0.5
    )  # a number next to the grid is moved too seldom for a standard deviation
    error = (drawn.var(0) + rare**2).sqrt() / 2000**0.5
    assert ((drawn.mean(0) - x.double()).abs() <= 4 * error + 1e-6).all()


@pytest.mark.slow
def test_ms_eden_is_unbiased_over_rotations_and_nearer_than_stochastic_rounding():
    torch.manual_seed(1)
    x = torch.randn(1, 128)
    eden = BlockScale("fp8_e4m3fn", "stochastic", tensor_bound=255.99, targets=(6 / (17 / 16 * 0.93),), corrected=32)
    turn = Hadamard(32, "fresh")
    errors, means = {}, {}
    for name, spec in {
        "eden": QuantSpec("fp4_e2m1", eden, Block(16), transform=turn),
        "stochastic": QuantSpec(
            "fp4_e2m1",
            BlockScale("fp8_e4m3fn", "nearest", tensor_bound=448),
            Block(16),
            Rounding.STOCHASTIC,
            transform=turn,
        ),
    }.items():
        keys = [stream_key(9, i) for i in range(3000)]
        drawn = torch.stack([turn.undo(quantize(x, spec, key=k).dequantize(), k) for k in keys]).double()
        means[name] = float((drawn.mean(0) - x).norm() / x.norm())
        errors[name] = float((drawn - x).norm(dim=2).mean() / x.norm())
    assert errors["eden"] < 0.75 * errors["stochastic"]  # the paper: less than half of the squared error
    for name, mean in means.items():
        assert mean < 3 * errors[name] / 3000**0.5, name


@pytest.mark.parametrize("size", [2, 16, 128])
@pytest.mark.parametrize("signs", ["none", "fixed", "fresh"])
def test_a_rotation_is_orthogonal_and_what_it_says(size, signs):
    turn = Hadamard(size, signs, seed=4)
    R = turn.apply(torch.eye(size), key=11).double()
    torch.testing.assert_close(R @ R.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < size:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    diagonal = R @ sylvester / size**0.5
    torch.testing.assert_close(diagonal.abs(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (diagonal.diagonal() > 0).all() == (signs == "none" or (size == 2 and bool((diagonal.diagonal() > 0).all())))
    x = torch.randn(3, 5, 3 * size)
    torch.testing.assert_close(turn.undo(turn.apply(x, 11), 11), x)


def test_signs_are_fresh_for_each_key_and_fixed_for_each_seed():
    x = torch.ones(64)
    fresh, fixed = Hadamard(64, "fresh"), Hadamard(64, "fixed", 3)
    assert not torch.equal(fresh.apply(x, 1), fresh.apply(x, 2)) and torch.equal(fresh.apply(x, 1), fresh.apply(x, 1))
    assert torch.equal(fixed.apply(x), fixed.apply(x)) and not torch.equal(
        fixed.apply(x), Hadamard(64, "fixed", 4).apply(x)
    )
    given = Hadamard(2, (1, -1))
    torch.testing.assert_close(given.apply(torch.tensor([3.0, 1.0])), torch.tensor([2.0, 4.0]) / 2**0.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Block(0), "a tile has a positive number of sums"),
        (lambda: Tile(-1, 4), "a tile has a positive number of rows"),
        (lambda: Block(2.5), "a tile has a positive number of sums"),
        (lambda: QuantSpec("fp4_e2m1", BlockScale()), "needs tiles to scale"),
        (lambda: QuantSpec("fp4_e2m1", Amax(), "block"), "granularity must be"),
        (lambda: BlockScale("e8m1"), "e8m0"),
        (lambda: BlockScale("fp8_e4m3fn"), "the floor rule is for scales that are powers of two"),
        (lambda: BlockScale(rounding="up"), "a scale is rounded by"),
        (lambda: BlockScale(prescale=0.0), "prescale must be a positive number"),
        (lambda: BlockScale("ue6m2", "nearest", tensor_bound=8, micro=(8, 4)), "micro-exponents go with"),
        (lambda: BlockScale("ue6m2", "nearest", micro=(8, 3)), "each of the parts with micro-exponents divides"),
        (lambda: QuantSpec("s1p2", BlockScale("ue6m2", "nearest", micro=(8, 4)), Block(20)), "need blocks of whole parts"),
        (lambda: Hadamard(12), "a power of two from 2 to 1024"),
        (lambda: Hadamard(4, (1, 0, 1, 1)), "4 numbers, each 1 or -1"),
        (lambda: Hadamard(4, "random"), "signs must be"),
        (lambda: QuantSpec("int4", Amax(), source="other"), "source must be"),
        (lambda: QuantSpec("int4", Amax(), transform=4), "transform must be"),
        (lambda: quantize(torch.ones(3, 24), QuantSpec("int4", Amax(), transform=Hadamard(16))), "use 8"),
        (lambda: quantize(torch.ones(3, 16), QuantSpec("int4", Amax(), transform=Hadamard(16, "fresh"))), "needs a key"),
    ],
)  # fmt: skip
def test_misuse_is_refused_in_one_sentence(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
