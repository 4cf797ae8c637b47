"""Operands with scales of their own for parts of them, and rotated ones, in all three products of every contraction."""

import itertools

import pytest
import torch

import fourbit as fb
from fourbit import UserError, formats
from fourbit.ops import REUSE, Contraction, Convolution, LayerSpec, LayerState, LinearMap, Matmul, contract
from fourbit.quantizers import Amax, Block, BlockScale, GradScale, Hadamard, QuantSpec, Rounding, Tile, quantize

FINE = formats.FP16_169
"""Numbers in it have a relative error of at most 2^-10, so that a wrong axis or a rotation that stays shows."""
H16 = Hadamard(16, "fresh")
NVFP4 = QuantSpec("fp4_e2m1", BlockScale("fp8_e4m3fn", "nearest", tensor_bound=448), Block(16))

CASES = {
    "linear": (LinearMap(), (3, 24, 32), (48, 32)),
    "conv2d": (Convolution((2, 2), (1, 1), (1, 1)), (16, 16, 7, 7), (32, 16, 3, 3)),
    "grouped": (Convolution((1, 1), (1, 1), (1, 1), 2), (5, 32, 6, 6), (64, 16, 3, 3)),
    "transposed": (Convolution((2,), (1,), (1,), 2, True, (0,)), (5, 32, 6), (32, 16, 3)),
    "conv3d": (Convolution((1, 1, 1), (1, 1, 1), (1, 1, 1)), (3, 16, 3, 4, 5), (16, 16, 3, 3, 3)),
    "matmul": (Matmul(), (2, 3, 20, 16), (2, 3, 16, 32)),
    "broadcast": (Matmul(), (2, 3, 20, 16), (16, 32)),
}
every_contraction = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def fine(**options) -> QuantSpec:
    return QuantSpec(FINE, Amax(), **options)


SPECS = {
    "rows": LayerSpec(*[fine(granularity="row")] * 6),
    "blocks": LayerSpec(*[fine(granularity=Block(5))] * 6),
    "tiles": LayerSpec(fine(granularity=Tile(3, 7)), *[fine(granularity=Tile(4, 4))] * 2, REUSE, REUSE, fine()),
    "one rotation each": LayerSpec(*[fine(transform=H16)] * 6),
    "rotated blocks": LayerSpec(*[fine(granularity=Block(16), transform=H16)] * 6),
    "rotated, reused": LayerSpec(fine(transform=H16), fine(transform=H16), fine(), REUSE, REUSE, REUSE),
    "rotated, second quantization": LayerSpec(
        *[fine(transform=Hadamard(16))] * 2,
        fine(granularity=Block(16), transform=H16),
        fine(granularity=Block(16), transform=H16, source="fprop"),
        fine(transform=H16),
        fine(transform=H16, source="fprop"),
    ),
    "float32 scales in a format": LayerSpec(*[QuantSpec(FINE, BlockScale("bfloat16", "nearest"), Block(16))] * 6),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def run(case, spec, seed=0, state=None, products="fast"):
    contraction, x_shape, w_shape = case
    torch.manual_seed(seed)
    x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
    state = state or LayerState(spec, products=products)
    y = contract(x, w, contraction, state)
    g = torch.randn_like(y)
    y.backward(g)
    return y.detach(), x.grad, w.grad, x.detach(), w.detach(), g


def exact(contraction: Contraction, x, w, g):
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    y = contraction.fprop(x, w)
    y.backward(g.double())
    return y.detach(), x.grad, w.grad


def error(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@every_contraction
@every_spec
def test_with_fine_formats_the_products_are_those_of_float64(case, spec):
    y, dx, dw, x, w, g = run(case, spec)
    for found, expected in zip((y, dx, dw), exact(case[0], x, w, g), strict=True):
        assert error(found, expected) < 2e-3


def in_python(t: torch.Tensor, element, scale_format, size: int) -> torch.Tensor:
    """NVFP4 of the rows of a matrix, with Python's numbers."""
    amax = max(abs(v) for v in t.flatten().tolist())
    encode = torch.tensor(448.0 * 6) / torch.tensor(amax)
    rows = []
    for row in t.tolist():
        numbers = []
        for start in range(0, len(row), size):
            block = row[start : start + size]
            raw = float(torch.tensor(max(map(abs, block))) / 6 * encode)
            scale = scale_format.round(raw)
            reciprocal = (torch.tensor(scale) * encode.reciprocal()).reciprocal() if scale else torch.tensor(0.0)
            numbers += [element.round(float(torch.tensor(v) * reciprocal)) * scale / float(encode) for v in block]
        rows.append(numbers)
    return torch.tensor(rows, dtype=torch.float64)


def test_nvfp4_in_a_linear_layer_is_that_of_a_computation_in_python():
    """Blocks run along in features forward, out features in dgrad and rows in wgrad; the last ones are ragged."""
    y, dx, dw, x, w, g = run((LinearMap(), (21, 40), (24, 40)), LayerSpec(*[NVFP4] * 6))

    def q(t):
        return in_python(t, formats.FP4_E2M1, formats.get("fp8_e4m3fn"), 16)

    torch.testing.assert_close(y.double(), q(x) @ q(w).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), q(g) @ q(w.T).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw.double(), q(g.T) @ q(x.T).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slot", range(6))
def test_a_slot_changes_the_product_that_it_enters_and_no_other(slot):
    slots = [fine()] * 6
    before = run(CASES["linear"], LayerSpec(*slots))
    slots[slot] = QuantSpec("fp4_e2m1", BlockScale(), Block(8))
    after = run(CASES["linear"], LayerSpec(*slots))
    changed = [not torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True)]
    assert changed == [slot in pair for pair in ((0, 1), (2, 3), (4, 5))]


@every_contraction
def test_square_tiles_may_be_reused_and_give_both_products_the_same_weight(case):
    square = QuantSpec("fp4_e2m1", BlockScale("fp8_e4m3fn", "nearest", tensor_bound=448), Tile(16, 16))
    reused, again = LayerSpec(w_fprop=square), LayerSpec(w_fprop=square, w_dgrad=square)
    for a, b in zip(run(case, reused)[:3], run(case, again)[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_scale_of_each_sample_is_taken_out_of_dgrad_and_one_of_each_channel_out_of_wgrad():
    """Their gradients differ by factors of 1000, which one scale of INT4 could not hold."""
    contraction, x_shape, w_shape = CASES["conv2d"]
    coarse = QuantSpec("int4_sym", Amax())
    rows = QuantSpec("int4_sym", Amax(), "row")
    torch.manual_seed(0)
    x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
    errors = {}
    for name, g_spec in (("tensor", coarse), ("row", rows)):
        x.grad = w.grad = None
        y = contract(x, w, contraction, LayerState(LayerSpec(g_dgrad=g_spec, g_wgrad=g_spec)))
        torch.manual_seed(1)
        samples, channels = 1000.0 ** torch.rand(16, 1, 1, 1), 1000.0 ** torch.rand(1, 32, 1, 1)
        g = torch.randn(y.shape) * (samples + 0 * channels)
        (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
        per_sample = (dx - exact(contraction, x.detach(), w.detach(), g)[1]).flatten(1).norm(dim=1)
        h = torch.randn(y.shape) * channels
        (dw,) = torch.autograd.grad(y, w, h)
        per_channel = (dw - exact(contraction, x.detach(), w.detach(), h)[2]).flatten(1).norm(dim=1)
        errors[name] = (
            (per_sample / g.flatten(1).norm(dim=1)).max(),
            (per_channel / h.transpose(0, 1).flatten(1).norm(dim=1)).max(),
        )
    assert all(errors["row"][i] < 0.2 * errors["tensor"][i] for i in range(2))


def test_clip_masks_of_a_rotated_forward_pass_are_applied_where_they_were_taken():
    """dx = R^T (mask * R dgrad), against a computation with matrices in float64."""
    clip = QuantSpec("fp4_e2m1", BlockScale("e8m0", "nearest", clip_rms=1.2), Block(16), transform=Hadamard(16))
    _, dx, dw, x, w, g = run((LinearMap(), (40, 32), (24, 32)), LayerSpec(clip, clip, None, None, None, None))
    R = torch.block_diag(*[Hadamard(16).apply(torch.eye(16))] * 2).double()
    x_turned, w_turned = (Hadamard(16).apply(t) for t in (x, w))
    masks = []
    for t in (x_turned, w_turned):
        q = quantize(t, QuantSpec(clip.format, clip.scaling, clip.granularity))
        blocks = t.double().unflatten(1, (2, 16))
        raw = 1.2 * blocks.square().mean(2, keepdim=True).sqrt() / 6
        below = 2.0 ** torch.floor(torch.log2(raw))
        limit = torch.where(raw > 1.5 * below, 2 * below, below) * 6
        masks.append((blocks.abs() <= limit).flatten(1))
        assert 0.05 < 1 - masks[-1].double().mean() < 0.6
        assert q.dequantize().abs().max() <= limit.max()
    expected_dx = (g.double() @ w.double() @ R * masks[0]) @ R.T
    expected_dw = (g.double().T @ x.double() @ R * masks[1]) @ R.T
    assert error(dx, expected_dx) < 1e-5 and error(dw, expected_dw) < 1e-5


def test_fresh_signs_change_from_step_to_step_and_are_those_of_the_step_when_it_is_done_again():
    spec = LayerSpec(*[QuantSpec("fp4_e2m1", BlockScale(), Block(32), transform=H16)] * 6)
    state = LayerState(spec, seed=3)
    first, second = run(CASES["linear"], spec, state=state), run(CASES["linear"], spec, state=state)
    again = run(CASES["linear"], spec, state=LayerState(spec, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_rounding_with_fresh_words_is_unbiased_through_all_three_products():
    sr = QuantSpec(
        "fp4_e2m1", BlockScale(prescale=0.75), Block(32), Rounding.STOCHASTIC, transform=Hadamard(32, "fresh")
    )
    spec = LayerSpec(None, None, sr, sr, sr, sr)
    state, case = LayerState(spec), (LinearMap(), (32, 64), (64, 64))
    runs = [run(case, spec, state=state) for _ in range(200)]
    _, dx, dw = exact(LinearMap(), *runs[0][3:])
    for index, expected in ((1, dx), (2, dw)):
        single, mean = runs[0][index], torch.stack([r[index] for r in runs]).double().mean(0)
        assert error(mean, expected) < 2.0 / 200**0.5 * error(single, expected)


COMPILED = [("linear", spec) for spec in SPECS] + [
    (case, "rotated, second quantization") for case in CASES if case != "linear"
]


@pytest.mark.parametrize(
    ("case", "spec"), [(CASES[c], SPECS[s]) for c, s in COMPILED], ids=[f"{c}, {s}" for c, s in COMPILED]
)
def test_compiled_layers_give_the_bits_of_eager_ones(case, spec):
    torch.compiler.reset()
    contraction, x_shape, w_shape = case
    torch.manual_seed(0)
    x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
    found = []
    for compiled in (False, True):
        state = LayerState(spec)

        def layer(x, w, state=state):
            return contract(x, w, contraction, state) * 1.0

        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        y = call(x, w)
        with torch.no_grad():
            torch.testing.assert_close(call(x, w), layer(x, w), rtol=1e-6, atol=1e-6)
        torch.manual_seed(1)
        found.append((y.detach(), *torch.autograd.grad(y, (x, w), torch.randn(y.shape))))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_saved_operands_are_codes_and_one_byte_for_each_block():
    layer = fb.nn.Linear(256, 256, bias=False, spec=LayerSpec(*[NVFP4] * 6))
    (found,) = fb.memory_report(torch.nn.Sequential(layer), (512, 256)).layers
    assert found.ratio == pytest.approx((4 + 8 / 16) / 32, rel=1e-3)


def test_what_no_hardware_could_run_is_refused_with_the_remedy():
    block, tile = fine(granularity=Block(16)), fine(granularity=Tile(16, 16))
    for spec in (block, fine(granularity="row")):
        with pytest.raises(UserError, match=r"x_wgrad=REUSE needs a scale that is constant .* x_wgrad=QuantSpec"):
            LayerSpec(x_fprop=spec, g_wgrad=fine())
    LayerSpec(x_fprop=tile, g_wgrad=fine())
    LayerSpec(x_fprop=block)  # wgrad in full precision multiplies any numbers
    with pytest.raises(UserError, match="both operands of fprop are rotated alike"):
        LayerSpec(x_fprop=fine(transform=H16), w_fprop=fine())
    with pytest.raises(UserError, match="both operands of dgrad are rotated alike"):
        LayerSpec(g_dgrad=fine(transform=H16))
    with pytest.raises(UserError, match="write granularity='row'"):
        LayerSpec(x_fprop=fine(granularity="channel"))
    with pytest.raises(UserError, match="source='fprop' is for w_dgrad and x_wgrad"):
        LayerSpec(g_dgrad=fine(source="fprop"))
    with pytest.raises(UserError, match="needs x_fprop to be quantized"):
        LayerSpec(x_wgrad=fine(source="fprop"))
    with pytest.raises(UserError, match="keeps one exponent per layer or channel"):
        QuantSpec("fp4_r4_even", GradScale(), Block(16))
    layer = fb.nn.Linear(40, 8, spec=LayerSpec(*[fine(transform=Hadamard(32))] * 2))
    with pytest.raises(UserError, match="32 does not divide the 40 numbers that fprop of a layer sums over: use 8"):
        layer(torch.randn(4, 40))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_result(bad):
    for spec, slot in itertools.product((NVFP4, fine(granularity=Block(16)), fine(transform=H16)), range(6)):
        specs = [fine(transform=spec.transform)] * 6 if spec.transform else [fine()] * 6
        specs[slot] = spec
        contraction, x_shape, w_shape = CASES["linear"]
        torch.manual_seed(0)
        x, w, g = torch.randn(x_shape), torch.randn(w_shape), torch.randn(3, 24, 48)
        for t, slots in ((x, (0, 5)), (w, (1, 3)), (g, (2, 4))):
            if slot in slots:
                t.view(-1)[17] = bad
        x.requires_grad_()
        w.requires_grad_()
        y = contract(x, w, contraction, LayerState(LayerSpec(*specs)))
        y.backward(g)
        result = (y, x.grad, w.grad)[slot // 2]
        assert not result.isfinite().all()


def test_a_clip_value_is_found_where_the_operand_is_rotated():
    pact = QuantSpec("uint4", fb.ClipValue(), transform=Hadamard(64))
    layer = fb.nn.Linear(64, 64, bias=False, spec=LayerSpec(pact, fine(transform=Hadamard(64))))
    x = torch.ones(32, 64) + 0.1 * torch.randn(32, 64)
    y = layer(x)
    assert layer.quant.x_form.tolist() == [0, 1]  # rotated numbers are negative, too
    assert float(layer.quant.x_alpha.detach()) > 5  # the first of them is the mean, times 8
    exact_y = x.double() @ layer.weight.detach().double().T
    assert error(y.detach(), exact_y) < 0.2
    y.square().mean().backward()
    assert layer.quant.x_alpha.grad is not None and layer.weight.grad.isfinite().all()


def test_nan_in_one_block_is_counted():
    layer = fb.nn.Linear(64, 32, spec=LayerSpec(*[QuantSpec("fp4_e2m1", BlockScale(), Block(32))] * 6))
    x = torch.randn(8, 64)
    x[3, 40] = float("nan")
    layer(x)
    assert fb.nonfinite_layers(torch.nn.Sequential(layer))
