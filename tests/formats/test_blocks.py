"""Block-scaled formats in pure Python against closed forms, numpy with ml_dtypes, gfloat, and other libraries, bit for bit.

Tests of libraries that are not installed are skipped; each says what to install.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import types
from itertools import pairwise
from pathlib import Path

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest

from fourbit import formats
from fourbit.errors import UserError
from fourbit.formats import BLOCKS, HIF4, MXFP4, MXFP4_CEIL, NVFP4, NVFP4_4OVER6, NVFP4_ONE_LEVEL, BlockFormat
from fourbit.formats._blocks import ORDERS, float32

F = np.float32


def numbers(rows: int = 24, columns: int = 96, seed: int = 0) -> np.ndarray:
    """Numbers with heavy tails, rows of very different magnitude, half of them of bfloat16, which hit decision points."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, columns)) * np.exp2(random.integers(-12, 12, (rows, 1)))
    x *= np.exp(random.standard_normal((rows, columns)))
    x[::2] = x[::2].astype(ml_dtypes.bfloat16).astype(F)
    x[1, :40] = 0.0
    return x.astype(F)


def same(format: BlockFormat, x: np.ndarray, theirs: np.ndarray) -> None:
    ours = np.array(format.round(x.tolist()), dtype=F)
    assert np.array_equal(ours, np.asarray(theirs, dtype=F) + 0.0), np.argwhere(ours != theirs)[:5]


@pytest.mark.parametrize("value", [1 / 3, 1e-45, 7e-46, 3.4028235e38, 3.4028236e38, 1e300, -1e300, 0.1, math.inf])
def test_float32_rounds_as_numpy_does(value):
    with np.errstate(over="ignore"):
        assert float32(value) == float(F(value))


@pytest.mark.parametrize("name", list(BLOCKS))
def test_numbers_of_the_grid_come_back_and_codes_fit(name):
    f = BLOCKS[name]
    lead = [max(f.targets), *[0.0] * (max(f.micro, default=1) - 1)]
    for start in range(0, len(f.element.grid), f.block - len(lead)):
        row = [*lead, *f.element.grid[start : start + f.block - len(lead)]]
        amax = f.tensor_bound * max(f.targets) or None
        blocks = f.quantize(row, amax)
        assert f.dequantize(blocks) == row
        assert all(0 <= code < 2**f.element.bits for code in blocks.codes)
        assert all(0 <= code < 2**f.scale.bits for code in blocks.scales) and len(blocks.scales) == 1


def test_scale_rules_are_as_the_papers_write_them():
    for i in range(1, 400):
        amax = i / 37
        floor, ceil = (f.scale.values[f.quantize([amax]).scales[0]] for f in (MXFP4, MXFP4_CEIL))
        assert floor == 2.0 ** (math.floor(math.log2(float32(amax))) - 2)
        assert ceil == 2.0 ** math.ceil(math.log2(float32(amax) / 6))
        assert float32(amax) / ceil <= 6 < float32(amax) / (ceil / 2)


def test_bits_per_element_count_the_scales():
    assert (MXFP4.bits, NVFP4.bits, BLOCKS["mxfp8_e4m3"].bits, HIF4.bits) == (4.25, 4.5, 8.25, 4.5)


def test_zeros_ragged_ends_and_nonfinite_numbers():
    for f in BLOCKS.values():
        assert f.round([[0.0] * 5, [-0.0] * 5]) == [[0.0] * 5] * 2
        assert f.quantize([]) == ((), (), 1.0, ((),) * len(f.micro))
        last = [7.0, -5.0] if f.micro else [3.0, -1.5]
        row = [1.0] * f.block + last
        assert len(f.quantize(row).scales) == 2 and f.round([row])[0][-2:] == last
        for bad in (math.nan, math.inf, -math.inf):
            y = f.round([[*row, *[1.0] * f.block], [1.0] * f.block])
            assert not any(map(math.isnan, y[0]))
            y = f.round([[bad, *row[1:]], [1.0] * f.block])
            assert all(map(math.isnan, y[0][: f.block]))
            assert any(map(math.isnan, y[1])) == bool(f.tensor_bound)


def test_four_over_six_takes_the_smaller_error_and_six_on_equal_ones():
    six, four = NVFP4_4OVER6.choices([6.0, 4.5, 4.5], 1536.0)  # 6 4 4 with scale 1, or 4 3 3 with scale 1.5
    assert (six.codes, six.error) == ((7, 6, 6), 0.5)
    assert (four.codes, four.error) == ((6, 5, 5), 0.0)
    assert NVFP4_4OVER6.choose([6.0, 4.5, 4.5], 1536.0) == four
    assert NVFP4_4OVER6.choose([6.0, 2.0, 2.0], 1536.0).codes == (7, 4, 4)
    assert NVFP4_4OVER6.choose([6.0, 3.0], 1536.0).codes == (7, 5)  # both are exact


def test_hifloat4_doubles_the_parts_whose_numbers_are_large():
    """Worked by hand: 7/7 makes a scale of 1; in it up to 1.75 without a factor, 3.5 with one, 7 with both."""
    row = [7.0, 1.0, 0.0, 0.0, 1.7, -0.3, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 1.875, 0.0, 0.0, 0.0, 4.2, 0.0, 0.0, 0.0, 2.0]
    found = HIF4.quantize(row)
    assert (HIF4.scale.values[found.scales[0]], found.micro) == (1.0, ((1, 0, 1), (1, 0, 1, 0, 1, 0)))
    y = HIF4.dequantize(found)
    assert (y[0], y[1]) == (7.0, 1.0)  # the first four in steps of 1
    assert (y[4], y[5]) == (1.5, -0.5)  # 1.7 / 2 = 0.85 and -0.15, in steps of 1/4: the part of eight has its factor
    assert (y[8], y[12], y[16], y[20]) == (3.0, 1.75, 4.0, 2.0)  # 1.875 saturates below the 2 that sets a factor
    tie = HIF4.dequantize(HIF4.quantize([7.0, *[0.0] * 7, 0.125, -0.375]))
    assert tie[8:] == [0.25, -0.5]  # ties away from zero
    assert HIF4.quantize([6.9e-20]).scales == (0,) and HIF4.round([[1e9]])[0] == [344064.0]


def hifloat4_by_numpy(x: np.ndarray) -> np.ndarray:
    """The authors' operations in numpy's float32 and ml_dtypes' bfloat16."""

    def bf16(t):
        return t.astype(ml_dtypes.bfloat16).astype(F)

    u = np.abs(x.reshape(len(x), -1, 8, 2, 4))
    a = u.max(axis=(2, 3, 4), keepdims=True)
    s = bf16(a * bf16(F(1) / np.full_like(a, 7)))
    quantum = np.exp2(np.floor(np.log2(s)) - 2)
    s = np.clip(np.round(s / quantum) * quantum, F(2.0**-48), F(1.5 * 2**15))
    r = bf16(F(1) / s)
    eight = np.where(u.max(axis=(3, 4), keepdims=True) * r >= 4, F(2), F(1))
    four = np.where(u.max(axis=4, keepdims=True) * r / eight >= 2, F(2), F(1))
    q = np.minimum(np.floor(u * r / eight / four * 4 + F(0.5)) / 4, F(1.75))
    return (np.sign(x) * (q * eight * four * s).reshape(x.shape)).astype(F)


def test_hifloat4_is_what_numpy_and_ml_dtypes_give():
    for seed in range(4):
        x = numbers(12, 192, seed)
        x[1, :64] = 1e-3
        same(HIF4, x, hifloat4_by_numpy(x))


def by_numpy(x: np.ndarray, order: str, bound: float | None) -> np.ndarray:
    """NVFP4 in numpy's float32 and ml_dtypes' casts, operation for operation as the libraries have it."""
    blocks = x.reshape(len(x), -1, 16)
    a, A = np.abs(blocks).max(axis=-1, keepdims=True), np.abs(x).max()
    six, one = F(6), F(1)
    e = d = one
    if bound and order == "decode":
        d = A / F(bound * 6)
    elif bound:
        e = F(bound * 6) / A
        d = one / e
    wanted = {"encode_folded": a * (e * (one / six)), "encode": (a / six) * e, "decode": (a / six) / d}[order]
    s = np.minimum(wanted, F(448)).astype(ml_dtypes.float8_e4m3fn).astype(F)
    with np.errstate(divide="ignore", over="ignore"):
        factor = (one / d) / s if order == "decode" else one / (s * d)
    factor = np.minimum(factor, np.finfo(F).max)
    q = np.clip(blocks * factor, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(F)
    return (q * (s * d)).reshape(x.shape)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("format", [NVFP4, NVFP4_ONE_LEVEL], ids=str)
def test_nvfp4_is_what_numpy_and_ml_dtypes_give_in_each_order(format, order):
    for seed in range(4):
        x = numbers(seed=seed)
        same(dataclasses.replace(format, order=order), x, by_numpy(x, order, format.tensor_bound))


def test_the_orders_differ_near_decision_points():
    random, differing = np.random.default_rng(0), np.zeros(3)
    for _ in range(30):
        x = random.standard_normal((8, 64)).astype(ml_dtypes.bfloat16).astype(F)
        y = [np.array(dataclasses.replace(NVFP4, order=order).round(x.tolist())) for order in ORDERS]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            differing[i + j - 1] += (np.abs(y[i] - y[j]) > 1e-4 * np.abs(y[i])).sum()
    assert (differing > 0).all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_mx_formats_are_what_gfloat_gives(name):
    f, info = BLOCKS[name], getattr(gf, f"format_info_{name.replace('mxfp4', 'mxfp4_e2m1')}")
    x = numbers(8, 64)
    for row in x:
        for block in row.reshape(-1, 32).astype(np.float64):
            if not block.any():
                continue
            scale = 2.0 ** (np.floor(np.log2(np.abs(block).max())) - info.etype.emax)
            theirs = [gfloat.round_float(info.etype, float(v / scale), sat=True) * scale for v in block]
            assert f.round([block.tolist()])[0] == [v + 0.0 for v in theirs]


def peer(module: str, how: str):
    """A module of another library; skips the test where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        pytest.skip(f"{module} is not installed: {how}")


TORCHAO = "pip install torchao"


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4_ceil"])
def test_mx_formats_are_what_torchao_gives(name):
    mx = peer("torchao.prototype.mx_formats.mx_tensor", TORCHAO)
    torch = importlib.import_module("torch")
    dtypes = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2}
    dtypes |= {"mxfp6_e2m3": "fp6_e2m3", "mxfp6_e3m2": "fp6_e3m2"}
    mode = mx.ScaleCalculationMode.RCEIL if name.endswith("ceil") else mx.ScaleCalculationMode.FLOOR
    x = numbers()
    tensor = mx.MXTensor.to_mx(torch.from_numpy(x), dtypes.get(name, torch.float4_e2m1fn_x2), 32, mode)
    same(BLOCKS[name], x, tensor.dequantize(torch.float32).numpy())
    codes = [BLOCKS[name].quantize(row).scales for row in x.tolist()]
    zeros = np.abs(x.reshape(len(x), -1, 32)).max(axis=-1) == 0
    theirs = tensor.scale.view(torch.uint8).numpy()
    assert (np.where(zeros, 0, codes) == np.where(zeros, 0, theirs)).all()


@pytest.mark.parametrize("format", [NVFP4, NVFP4_ONE_LEVEL], ids=str)
def test_nvfp4_is_what_torchao_gives(format):
    """Its block scales are at least 2^-6, where E4M3's smallest number is 2^-9."""
    nvfp4, torch = peer("torchao.prototype.mx_formats.nvfp4_tensor", TORCHAO), importlib.import_module("torch")
    theirs = dataclasses.replace(format, order="decode", least_scale=nvfp4.E4M3_EPS)
    for seed in range(4):
        x = numbers(seed=seed)
        tensor = torch.from_numpy(x)
        scale = nvfp4.per_tensor_amax_to_scale(tensor.abs().max()) if format.tensor_bound else None
        found = nvfp4.NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=scale)
        same(theirs, x, found.dequantize(torch.float32).numpy())
        scales = [theirs.quantize(row, float(np.abs(x).max())).scales for row in x.tolist()]
        assert (found.scale.view(torch.uint8).numpy() == np.array(scales)).all()


MICROXCALING = "clone github.com/microsoft/microxcaling and put the folder on PYTHONPATH"


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("mxfp4", "fp4_e2m1"),
        ("mxint4", "int4"),
        ("mxfp6_e2m3", "fp6_e2m3"),
        ("mxfp6_e3m2", "fp6_e3m2"),
        ("mxfp8_e4m3", "fp8_e4m3"),
        ("mxfp8_e5m2", "fp8_e5m2"),
    ],
)
def test_mx_formats_are_what_microxcaling_gives_with_ties_to_even(name, elements):
    mx, torch = peer("mx", MICROXCALING), importlib.import_module("torch")
    names = {"w_elem_format": elements, "a_elem_format": elements}
    specs = mx.finalize_mx_specs({**names, "scale_bits": 8, "block_size": 32, "bfloat": 0, "custom_cuda": False})
    x = numbers()
    quantize = importlib.import_module("mx.mx_ops").quantize_mx_op
    found = quantize(torch.from_numpy(x), specs, elem_format=elements, axes=[-1], block_size=32, round="even")
    same(BLOCKS[name], x, found.numpy())


@pytest.mark.parametrize(
    ("name", "settings"),
    [("nvfp4_4over6", {}), ("nvfp4_4over6", {"scale_rule": "mae"}), ("nvfp4", {"scale_rule": "static_6"})],
)
def test_nvfp4_is_what_four_over_six_gives(name, settings):
    """For blocks with normal scales: it wraps numbers beyond 7 scales around. Its dequantization has another order."""
    library = peer("fouroversix.quantize", "pip install fouroversix transformers")
    torch = importlib.import_module("torch")
    quantize = getattr(library, "quantize_to_fp4", None) or library.quantize
    error = "absolute" if settings.get("scale_rule") == "mae" else "squared"
    f = dataclasses.replace(BLOCKS[name], order="encode", error=error)
    x = np.concatenate([numbers(seed=seed)[:8] for seed in range(4)])
    x = (x / np.abs(x).max(axis=1, keepdims=True)).astype(F)
    config = library.QuantizationConfig(**settings)
    found = library.dequantize(quantize(torch.from_numpy(x), config), torch.float32, intermediate_dtype=torch.float32)
    assert np.allclose(found.numpy(), np.array(f.round(x.tolist())), rtol=2**-21, atol=0)


class Anything(type):
    """A class whose attributes are such classes again: stands for what a module names and the test does not use."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Stub(types.ModuleType):
    """A module of such classes."""

    def __getattr__(self, name):
        return getattr(Anything("stub", (), {}), name)


def transformer_engine(monkeypatch: pytest.MonkeyPatch):
    """TransformerEngine's reference quantizer from a clone, without the rest, which needs a GPU to be built."""
    package = "transformer_engine.pytorch.custom_recipes"
    names = ("reference_nvfp4", "quantization_ref_nvfp4")
    files = [Path(folder or ".", *package.split("."), f"{name}.py") for folder in sys.path for name in names]
    file = next((each for each in files if each.exists()), None)
    if file is None:
        pytest.skip("no TransformerEngine: clone github.com/NVIDIA/TransformerEngine and put the folder on PYTHONPATH")
    inside = ("gemm", "quantization", "reference_utils", "utils")
    parents = (
        "transformer_engine",
        "transformer_engine.pytorch",
        package,
        "transformer_engine.pytorch.quantized_tensor",
    )
    for name in (*parents, *(f"{package}.{each}" for each in inside)):
        monkeypatch.setitem(sys.modules, name, Stub(name))
    module = types.ModuleType("reference_nvfp4")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
    return module.NVFP4QuantizerRef


@pytest.mark.parametrize(
    ("name", "error"), [("nvfp4", "squared"), ("nvfp4_4over6", "squared"), ("nvfp4_4over6", "absolute")]
)
def test_nvfp4_is_what_transformer_engines_reference_gives(name, error, monkeypatch):
    """Codes and scales, four over six included. Where a scale is zero, its codes are not."""
    reference, torch = transformer_engine(monkeypatch), importlib.import_module("torch")
    f = dataclasses.replace(BLOCKS[name], error=error)
    options = {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256} if len(f.targets) > 1 else {}
    options["nvfp4_4over6_err_mode"] = "MSE" if error == "squared" else "MAE"
    for seed in range(8):
        x = torch.from_numpy(numbers(seed=seed))
        x = x / x.abs().amax(dim=1, keepdim=True) if seed % 2 else x
        q, s = reference._quantize_blockwise_reference(x, x.abs().max(), 16, 1, pow_2_scales=False, eps=0.0, **options)
        ours = [f.quantize(row, float(x.abs().max())) for row in x.tolist()]
        scales = s.view(torch.uint8)
        assert torch.equal(scales, torch.tensor([each.scales for each in ours], dtype=torch.uint8))
        codes = torch.stack([q % 16, q // 16], dim=-1).flatten(1)
        codes = codes.where((codes != 8) & (scales != 0).repeat_interleave(16, dim=1), 0)  # 8 is -0
        assert torch.equal(codes, torch.tensor([each.codes for each in ours], dtype=torch.uint8))


def test_smaller_blocks_have_smaller_errors_and_tensor_scales_hold_any_magnitude():
    x = numbers(8, 128)
    sizes = [dataclasses.replace(MXFP4, block=block) for block in (8, 32, 128)]
    errors = [np.square(np.array(f.round(x.tolist())) - x).sum() for f in sizes]
    assert all(a < b for a, b in pairwise(errors))
    for k in (-100, 0, 100):
        assert np.array_equal(
            np.array(NVFP4.round((x[:2] * 2.0**k).tolist())), np.array(NVFP4.round(x[:2].tolist())) * 2.0**k
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: dataclasses.replace(MXFP4, block=0),
        lambda: dataclasses.replace(MXFP4, tensor_bound=448.0),
        lambda: dataclasses.replace(MXFP4, targets=(6.0, 4.0)),
        lambda: formats.get_block("nvpf4"),
    ],
)
def test_an_impossible_block_format_is_refused_in_one_sentence(make):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)
