"""Which product goes where, and in which layout: with float32 in place of the tensor cores, and on fake CUDA tensors.

Triton is not needed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product as every

import pytest
import torch
from torch import Tensor

from fourbit import formats
from fourbit.formats import CATALOG, Format
from fourbit.kernels.cuda import _device, _multiply, _products, _quantize
from fourbit.ops import Convolution, Gemm, Layout, LinearMap, Matmul, Operand
from fourbit.ops._product import reference_product as reference
from fourbit.quantizers import carrier_dtype, pack, round_to_format

WHICH = ("fprop", "dgrad", "wgrad")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CPU as if it were a Hopper GPU; the names of the products in the order of their use."""
    used: list[str] = []

    def bfloat16(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        used.append("bfloat16")
        return a.float() @ b.float()

    def fp8(a: Tensor, b: Tensor) -> Tensor:
        assert a.is_contiguous() and b.is_contiguous() and a.dtype.itemsize == b.dtype.itemsize == 1
        assert not a.dtype == b.dtype == torch.float8_e5m2
        used.append("fp8")
        return a.float() @ b.float().t()

    def convolved_once(name: str) -> Callable[..., Tensor]:
        """A derivative as cuDNN has it: sums in float32, rounded to the operands' dtype at the end, on every processor."""
        derivative = getattr(Convolution, name)

        def convolve(self: Convolution, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
            return derivative(self, a.float(), b.float(), like.float()).to(a.dtype)

        return convolve

    def int8(a: Tensor, b: Tensor) -> Tensor:
        used.append("int8")
        return _multiply.int8_mm(a, b)

    monkeypatch.setitem(_device.DEVICES, "cpu", (9, 0))
    monkeypatch.setattr(_multiply, "_FP8_SMALLEST", 32)
    for name, function in (("bfloat16_mm", bfloat16), ("fp8_mm", fp8), ("int8_mm", int8), ("kernels", lambda: None)):
        monkeypatch.setattr(_products, name, function)
    for name in ("dgrad", "wgrad"):
        monkeypatch.setattr(Convolution, name, convolved_once(name))
    monkeypatch.setattr(_quantize, "kernels", lambda: None)
    _device.capability.cache_clear()
    yield used
    _device.capability.cache_clear()


def numbers(shape: tuple[int, ...], format: Format, seed: int, packed: bool = False) -> Operand:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * float(format.max) / 2
    q = round_to_format(x, format).to(carrier_dtype(format))
    if q.dim() == 4:
        q = q.contiguous(memory_format=torch.channels_last)
    return Operand(pack(q, format) if packed else q, None, format, True)


def linear(
    which: str, g: Format = formats.FP4_R4_EVEN, products: str = "fast", packed: bool = True, rows=(4, 16)
) -> Gemm:
    x = numbers((*rows, 96), formats.UINT4, 1, packed and which == "wgrad")
    w = numbers((64, 96), formats.INT4_SYM, 2, packed and which == "dgrad")
    gradient = numbers((*rows, 64), g, 3)
    a, b = {"fprop": (x, w), "dgrad": (gradient, w), "wgrad": (gradient, x)}[which]
    like = x if which == "dgrad" else w
    layout = None if which == "fprop" else Layout(like.q.shape, torch.empty(like.q.shape).stride())
    return Gemm(which, LinearMap(), a, b, layout, torch.float32, products)  # type: ignore[arg-type]


def convolution(which: str, kernel: int, stride: int = 1, products: str = "fast", packed: bool = True) -> Gemm:
    con = Convolution((stride,) * 2, (kernel // 2,) * 2, (1, 1))
    x = numbers((2, 16, 8, 8), formats.UINT4, 1, packed and which == "wgrad")
    w = numbers((24, 16, kernel, kernel), formats.INT4_SYM, 2, packed and which == "dgrad")
    gradient = numbers((2, 24, 8 // stride, 8 // stride), formats.FP4_R4_ODD, 3)
    a, b = {"fprop": (x, w), "dgrad": (gradient, w), "wgrad": (gradient, x)}[which]
    like = x if which == "dgrad" else w
    outline = torch.empty(like.q.shape).contiguous(memory_format=torch.channels_last)
    layout = None if which == "fprop" else Layout.of(outline)
    return Gemm(which, con, a, b, layout, torch.float32, products)  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("which", "products", "used"),
    [
        ("fprop", "fast", "int8"),
        ("fprop", "exact", "int8"),
        ("dgrad", "fast", "fp8"),
        ("wgrad", "fast", "fp8"),
        ("dgrad", "exact", "bfloat16"),
        ("wgrad", "exact", "bfloat16"),
    ],
)
def test_a_linear_layers_products_equal_the_references(calls, which: str, products: str, used: str, packed: bool):
    g = linear(which, products=products, packed=packed)
    raw = _products.gemm(g)
    assert raw is not None and calls == [used] and not raw.rounded and raw.unit == 1.0
    assert torch.equal(raw.y.to(torch.float32), reference(g))


@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_gradients_that_two_phase_rounding_left_transposed_are_not_copied(calls, which: str):
    g = linear(which)
    q = g.a.q.reshape(-1, 64).to(torch.float8_e4m3fn)  # type: ignore[union-attr]
    turned = q.t().contiguous().t().view(4, 16, 64)
    assert torch.equal(_products.gemm(replace(g, a=g.a._replace(q=turned))).y, reference(g))  # type: ignore[union-attr]
    assert calls == ["fp8"]


def test_sizes_that_int8_does_not_take_go_to_bfloat16(calls):
    g = linear("fprop", rows=(2, 3))
    assert torch.equal(_products.gemm(g).y, reference(g))  # type: ignore[union-attr]
    assert calls == ["bfloat16"]


def test_gradients_that_only_e5m2_holds_meet_e4m3(calls):
    g = linear("dgrad", g=formats.FP4_R8)
    assert _multiply.fits_fp8(formats.FP4_R8) is torch.float8_e5m2
    assert torch.equal(_products.gemm(g).y, reference(g)) and calls == ["fp8"]  # type: ignore[union-attr]


def test_what_is_wider_than_fp8_goes_to_bfloat16(calls):
    g = linear("dgrad", g=formats.FP8_152)
    assert _multiply.fits_fp8(formats.FP8_152) is None
    assert torch.allclose(_products.gemm(g).y, reference(g), rtol=1e-5) and calls == ["bfloat16"]  # type: ignore[union-attr]


def test_operands_of_eleven_bits_are_multiplied_in_tf32_and_the_setting_is_put_back(calls, monkeypatch):
    seen = []
    monkeypatch.setattr(_products, "reference_product", lambda g: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    g = linear("fprop")
    wide = [numbers(o.q.shape, formats.FP16_169, i) for i, o in enumerate((g.a, g.b))]
    for contraction in (LinearMap(), Matmul()):
        assert _products.gemm(replace(g, contraction=contraction, a=wide[0], b=wide[1])) is not None
    assert seen == ["high", "high"] and torch.get_float32_matmul_precision() == before


def test_numbers_that_are_on_no_grid_are_left_to_the_reference(calls):
    g = linear("fprop")
    for a in (g.a._replace(on_grid=False), Operand(torch.randn(4, 16, 96))):
        assert _products.gemm(replace(g, a=a)) is None
    assert _products.gemm(replace(g, b=g.b._replace(on_grid=False))) is None
    assert not calls


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", WHICH)
def test_a_pointwise_convolution_is_a_product_of_matrices(calls, which: str, packed: bool):
    g = convolution(which, 1, packed=packed)
    raw = _products.gemm(g)
    assert raw is not None and calls == ["int8" if which == "fprop" else "bfloat16"] and not raw.rounded
    assert torch.equal(raw.y.to(torch.float32), reference(g))
    if which != "wgrad":
        assert raw.y.is_contiguous(memory_format=torch.channels_last)


def test_a_forward_convolution_keeps_eleven_bits(calls):
    g = convolution("fprop", 3)
    raw = _products.gemm(g)
    assert raw is not None and raw.y.dtype == torch.float16 and not raw.rounded and not calls
    exact = reference(g)
    assert bool((raw.unit * raw.y.float() - exact).abs().le(exact.abs() * 2.0**-11).all())


def test_the_power_of_two_keeps_the_largest_sum_of_a_convolution_in_float16(calls):
    con = Convolution((1, 1), (0, 0), (1, 1))
    x = Operand(torch.full((1, 512, 3, 3), 15, dtype=torch.uint8), None, formats.UINT4, True)
    w = Operand(torch.full((1, 512, 3, 3), 7, dtype=torch.int8), None, formats.INT4_SYM, True)
    raw = _products.gemm(Gemm("fprop", con, x, w, None, torch.float32, "fast"))
    assert raw is not None and math.isclose(float(raw.y) * raw.unit, 512 * 9 * 105, rel_tol=2**-11)


@pytest.mark.parametrize(("which", "stride"), list(every(("dgrad", "wgrad"), (1, 2))))
def test_a_convolutions_gradients_are_rounded_to_bfloat16_where_that_is_accepted(calls, which: str, stride: int):
    g = convolution(which, 3, stride)
    raw, exact = _products.gemm(g), reference(g)
    assert raw is not None and raw.y.dtype == torch.bfloat16 and raw.rounded
    assert bool((raw.y.float() - exact).abs().le(exact.abs() * 2.0**-8).all())
    raw = _products.gemm(replace(g, products="exact"))
    assert raw is not None and raw.y.dtype == torch.float32 and torch.equal(raw.y, exact)


def test_every_format_of_eight_bits_is_placed():
    for format in CATALOG.values():
        grid = torch.tensor(format.grid, dtype=torch.float64)
        dtype = _multiply.fits_fp8(format)
        assert dtype is None or torch.equal(grid.to(dtype).double(), grid)
        if _multiply.fits_tf32(format):
            bits = grid.to(torch.float32).view(torch.int32)
            assert bool((bits & 0x1FFF == 0).all())
    placed = {
        f.name: _multiply.fits_fp8(f) for f in (formats.UINT4, formats.INT4, formats.FP4_R4_EVEN, formats.FP4_R4_ODD)
    }
    assert set(placed.values()) == {torch.float8_e4m3fn}
    assert _multiply.fits_tf32(formats.FP16_169) and not _multiply.fits_tf32(formats.BFLOAT16)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("products", ["fast", "exact"])
@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_torch_takes_the_shapes_and_layouts_on_a_gpu(monkeypatch, which: str, products: str, kernel: int | None):
    """torch's own shape functions check what cuBLAS asks for: sizes, row and column order, combinations of dtypes."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    monkeypatch.setitem(_device.DEVICES, "cuda", (9, 0))
    monkeypatch.setattr(_multiply, "_FP8_SMALLEST", 32)
    caches = (_device.capability, _multiply._one)
    for cache in caches:
        cache.cache_clear()
    if kernel is None:
        g = linear(which, products=products, packed=False)
    else:
        g = convolution(which, kernel, 1, products, packed=False)
    expected = reference(g).shape
    if (
        kernel is None and which == "wgrad"
    ):  # as two-phase rounding leaves it: fake tensors of a torch without CUDA cannot turn
        g = replace(g, a=g.a._replace(q=g.a.q.view(64, 64).t().contiguous().t().view(4, 16, 64)))  # type: ignore[union-attr]

    def transposed(operand: Operand, dtype: torch.dtype) -> Tensor:
        q = operand.q
        return torch.empty((q.shape[-1], q.shape[:-1].numel()), dtype=dtype, device="cuda")

    monkeypatch.setattr(_products, "_transposed", transposed)

    def on_gpu(operand: Operand) -> Operand:
        assert isinstance(operand.q, Tensor)
        q = torch.empty_strided(operand.q.shape, operand.q.stride(), dtype=operand.q.dtype, device="cuda")
        return operand._replace(q=q)

    with fake.FakeTensorMode():
        raw = _products.gemm(replace(g, a=on_gpu(g.a), b=on_gpu(g.b)))
        assert raw is not None and raw.y.device.type == "cuda" and raw.y.shape == expected
    for cache in caches:
        cache.cache_clear()
