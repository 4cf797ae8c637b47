"""Every registered quantizing kernel equals the reference, bit for bit: codes, packed codes, masks, amax."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import isas
from kernel_cases import (
    ALL_BFLOAT16,
    DTYPES,
    NARROW,
    SIZES,
    assert_same,
    assert_same_rounding,
    each_implementation,
    implementations,
    layouts,
    numbers,
    reference,
    threads,
)

from fourbit import backends, formats
from fourbit.errors import UserError
from fourbit.formats import FloatFormat, Format
from fourbit.quantizers import (
    Amax,
    ClipValue,
    FixedScale,
    GradScale,
    Moments,
    QuantSpec,
    Request,
    Rounding,
    Sawb,
    is_packable,
    pack,
    quantize,
    request_for,
)
from fourbit.quantizers._statistics import Statistics

SCALES = (2.0**-7, 0.1, 1e-30, 1.7014118e38)
ROUND = implementations("round")
ROUNDINGS = (Rounding.NEAREST, Rounding.STOCHASTIC, Rounding.TRUNCATE)
WIDE = [formats.FP16_169, formats.BINARY16, formats.BFLOAT16]
USER = [
    FloatFormat("large", exponent_bits=4, mantissa_bits=3, exponent_bias=-110),  # up to 2^125: sums near float32's end
    FloatFormat("largest with a kernel", exponent_bits=3, mantissa_bits=2, exponent_bias=-97),
    FloatFormat("small", exponent_bits=3, mantissa_bits=3, exponent_bias=123),
    FloatFormat("no_subnormals", exponent_bits=3, mantissa_bits=2, exponent_bias=3, subnormals=False),
    FloatFormat("to_infinity", exponent_bits=4, mantissa_bits=3, exponent_bias=7, specials="ieee", overflow="infinity"),
    dataclasses.replace(formats.FP4_R4_EVEN, name="r4_inf", overflow="infinity"),
    formats.Codebook("uneven", table=(0.0, 0.3, -1.25, 7.0, 8.0)),
]
PACKABLE = [format for format in NARROW if is_packable(format)]
PACKABLE += [
    formats.Codebook("integers", table=(3, 0, 1, -8)),
    formats.Codebook("beyond a nibble", table=range(20, 30)),
]
OPERANDS = {
    "PACT": (QuantSpec("uint4", ClipValue()), torch.tensor(1.7)),
    "PACT, signed": (QuantSpec("int4_sym", ClipValue()), torch.tensor(0.9)),
    "PACT on a stochastic grid": (
        QuantSpec("int4_sym", ClipValue(), rounding=Rounding.STOCHASTIC),
        torch.tensor(0.9),
    ),
    "SAWB": (QuantSpec("int4_sym", Sawb()), None),
    "SAWB, clipped": (QuantSpec("int4_sym", Sawb(clipped=True)), None),
    "radix 4": (QuantSpec("fp4_r4_even", GradScale()), torch.tensor(3)),
    "LUQ": (QuantSpec("fp4_r2", Amax(), rounding=Rounding.STOCHASTIC), None),
    "radix 4, stochastic": (QuantSpec("fp4_r4_odd", Amax(), rounding=Rounding.STOCHASTIC), None),
    "radix 2, stochastic underflow": (QuantSpec("fp4_r2_139", Amax(), rounding=Rounding.UNDERFLOW), None),
    "E2M1, stochastic underflow": (QuantSpec("fp4_e2m1", Amax(), rounding=Rounding.UNDERFLOW), None),
    "FP8": (QuantSpec("fp8_152", GradScale()), torch.tensor(-2)),
    "E2M1": (QuantSpec("fp4_e2m1", Amax()), None),
    "FP16 1-6-9": (QuantSpec("fp16_169"), None),
    "INT8": (QuantSpec("int8", Amax()), None),
    "integers beyond a nibble": (QuantSpec(formats.Codebook("20s", table=range(20, 30)), FixedScale(0.1)), None),
    "two samples": (QuantSpec("fp4_r2", Amax(), rounding=Rounding.STOCHASTIC, samples=2), None),
}
every_operand = pytest.mark.parametrize("operand", OPERANDS.values(), ids=OPERANDS.keys())


def compare(request: Request) -> dict[str, bool]:
    """Compares every kernel with the reference; which of them took the request."""
    scale, expected = reference(request)
    before = request.x.clone()
    taken = {}
    for implementation in ROUND:
        found = implementation(request, scale)
        taken[str(implementation)] = found is not None
        if found is not None:
            assert_same_rounding(found, expected, request.x)
    assert_same(request.x, before)
    return taken


def test_every_kernel_belongs_to_an_operation_that_is_tested_here():
    tested = {"moments", "round", "round_pair", "unpack", "gemm", "epilogue", "product"}
    tested |= {
        "accumulate",
        "norm_supported",
        "norm_statistics",
        "norm_apply",
        "norm_backward",
        "lstm_forward",
        "lstm_backward",
        "lstm_run",
        "lstm_run_back",
        "round_tiles",
        "unpack_tiles",
        "block_carrier",
    }  # in test_cpu_accumulate.py, test_chain_numbers.py, test_cpu_lstm.py, test_round_tiles.py and test_kernel_products.py
    assert {kernel.operation for kernel in backends.kernels()} <= tested


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC, Rounding.UNDERFLOW], ids=lambda r: r.value)
@pytest.mark.parametrize("format", NARROW + WIDE + USER, ids=str)
def test_all_bfloat16_numbers_round_as_the_reference_rounds_them(format: Format, rounding):
    for scale in SCALES:
        compare(request_for(ALL_BFLOAT16, QuantSpec(format, FixedScale(scale), rounding=rounding), key=99))
    spec = QuantSpec(format, FixedScale(SCALES[1]), rounding=rounding)
    compare(request_for(ALL_BFLOAT16.float(), spec, key=99, save=True))


def test_the_kernels_take_what_the_recipes_need():
    """Parity of kernels that decline everything would be worth nothing."""
    for save, allowed in ((False, set()), (True, {"PACT on a stochastic grid"})):
        for name, (spec, stored) in OPERANDS.items():
            taken = compare(request_for(numbers(500, torch.float32), spec, None, stored, 5, save=save))
            if name not in allowed | {"two samples"}:
                assert all(has for kernel, has in taken.items() if kernel.startswith("cpu")), (name, save, taken)


@each_implementation("round")
def test_codes_and_masks_of_clipped_operands_come_from_the_same_pass(implementation):
    if implementation.kernel.backend == "cpu":
        for name in ("PACT", "PACT, signed", "SAWB, clipped"):
            spec, stored = OPERANDS[name]
            request = request_for(numbers(500, torch.float32), spec, None, stored, save=True)
            found = implementation(request, reference(request)[0])
            assert found.packed is not None and found.mask is not None


@every_operand
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_length_rounds_as_the_reference_does(operand, dtype):
    spec, stored = operand
    with threads(3):
        for size in SIZES:
            compare(request_for(numbers(size, dtype), spec, None, stored, 7, save=True))


@every_operand
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_of_axes_rounds_as_the_reference_does(operand, dtype):
    spec, stored = operand
    for x in layouts(numbers(3 * 5 * 7 * 9, dtype).view(3, 5, 7, 9)).values():
        compare(request_for(x, spec, None, stored, 7, save=True))
    for shape in ((), (1,), (1, 1, 1, 1), (0, 3), (3, 0, 2)):
        compare(request_for(torch.full(shape, 0.7).to(dtype), spec, None, stored, 7, save=True))


@every_operand
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_infinity_reach_the_scale_and_leave_the_other_elements_alone(operand, bad):
    spec, stored = operand
    for size in (1, 65, 1000):
        x = numbers(size, torch.float32).clamp(-100, 100)
        x[size // 2] = bad
        # a scale that does not depend on the data, so that the codes mean something beside the NaN
        fixed = isinstance(spec.scaling, (Amax, Sawb))
        compare(
            request_for(
                x, dataclasses.replace(spec, scaling=FixedScale(0.25)) if fixed else spec, None, stored, 7, save=True
            )
        )
        assert quantize(x, spec, stored=stored, key=7).scale.isnan().any()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_requests_round_as_the_reference_does(data):
    format = data.draw(st.sampled_from(NARROW + WIDE + USER))
    rounding = data.draw(st.sampled_from(ROUNDINGS))
    scale = data.draw(st.floats(2.0**-120, 2.0**120, width=32))
    size, dtype = data.draw(st.integers(0, 300)), data.draw(st.sampled_from(DTYPES))
    x = numbers(size, dtype, data.draw(st.integers(0, 1000))) * data.draw(st.sampled_from([1.0, scale]))
    key, save = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.booleans())
    request = request_for(x, QuantSpec(format, FixedScale(scale), rounding=rounding), key=key, save=save)
    compare(request)


@each_implementation("round_pair")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_grids_from_one_read_equal_one_after_the_other(implementation, dtype):
    even, odd = QuantSpec("fp4_r4_even", GradScale()), QuantSpec("fp4_r4_odd", GradScale())
    inputs = [ALL_BFLOAT16.to(dtype), *(numbers(size, dtype) for size in SIZES)]
    inputs += list(layouts(numbers(3 * 5 * 7 * 9, dtype).view(3, 5, 7, 9)).values())
    for x, exponent, specs in itertools.product(inputs, (0, 5, -80), ((even, odd), (odd, even), (odd, odd))):
        one = request_for(x, specs[0], stored=torch.tensor(exponent))
        requests = [one, request_for(one.x, specs[1], stored=torch.tensor(exponent))]  # of one tensor
        (scale, first), (_, second) = map(reference, requests)
        found = implementation(*requests, scale)
        assert found is not None or implementation.kernel.backend != "cpu"
        for got, expected in zip(found or (), (first, second), strict=False):
            assert_same_rounding(got, expected, requests[0].x)


@each_implementation("round_pair")
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("fp8_152", GradScale()),
        QuantSpec("fp4_r4_odd", GradScale(), rounding=Rounding.STOCHASTIC),
        QuantSpec("fp4_r4_odd", GradScale(), rounding=Rounding.TRUNCATE),
    ],
    ids=str,
)
def test_a_pair_with_one_member_that_has_no_kernel_is_declined_or_right(implementation, spec):
    x = numbers(640, torch.float32).view(64, 10)
    stored = torch.tensor(0)
    requests = [
        request_for(x, each, None, stored, key=3)
        for each in (dataclasses.replace(spec, format=formats.FP4_R4_EVEN), spec)
    ]
    (scale, first), (_, second) = map(reference, requests)
    found = implementation(*requests, scale)
    for got, expected in zip(found or (), (first, second), strict=False):
        assert_same_rounding(got, expected, x)


@each_implementation("unpack")
@pytest.mark.parametrize("format", PACKABLE, ids=str)
def test_packed_codes_come_back_as_they_were(implementation, format):
    grid = torch.tensor(format.grid)
    shaped = grid[torch.randint(len(grid), (3 * 5 * 7 * 9,))].view(3, 5, 7, 9)
    dense = [x for name, x in layouts(shaped).items() if name not in ("strided", "expanded")]
    cases = [grid[torch.randint(len(grid), (size,))] for size in SIZES] + dense + [grid[:1].view(())]
    for q in cases:
        packed = pack(q, format)
        for dtype in (torch.int8, torch.uint8, torch.bfloat16, torch.float32, torch.float16, torch.float64):
            with threads(3):
                found = implementation(packed, dtype)
            with backends.without():
                assert_same(packed.unpack(dtype), q.to(dtype))
            if found is not None:
                assert_same(found, q.to(dtype))
                assert found.stride() == packed.stride
            elif implementation.kernel.backend == "cpu":
                assert dtype in (torch.float16, torch.float64) or packed.grid is not None


@each_implementation("moments")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_moments_equal_the_reference_up_to_the_order_of_a_float64_sum(implementation, dtype):
    cases = [numbers(size, dtype) for size in SIZES]
    cases += layouts(numbers(3 * 5 * 7 * 9, dtype).view(3, 5, 7, 9)).values()
    for bad in (math.nan, math.inf, -math.inf):
        cases.append(torch.cat([numbers(20000, dtype), torch.tensor([bad], dtype=dtype), numbers(77, dtype)]))
    for x in cases:
        with threads(3):
            found = implementation(x)
        if found is None:
            continue
        with backends.without():
            expected: Moments = Statistics(x).moments
        found, expected = (
            torch.tensor([float(m) for m in moments], dtype=torch.float64) for moments in (found, expected)
        )
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0, equal_nan=True)
        assert_same(found[2], expected[2])


def test_the_scale_of_a_tensor_with_gaps_is_that_of_its_own_elements():
    w = torch.full((64, 10), 1e6)
    w[:, ::2] = torch.randn(64, 5)
    for view in (w[:, ::2], w[:1, ::2].expand(64, 5)):
        scales = [Sawb().of(Statistics(t), formats.INT4_SYM, None) for t in (view, view.contiguous())]
        assert float(scales[0]) == float(scales[1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", formats.names())
def test_numbers_that_are_not_floating_point_are_refused(dtype, name):
    with pytest.raises(UserError, match="floating-point"):
        quantize(torch.ones(3, dtype=dtype), QuantSpec(name, Amax()))


def _has_avx_vnni() -> bool:
    """As the operating system says."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx_vnni" in flags.read_text().split()


def test_all_instruction_sets_of_a_usual_build_were_compared():
    """On x86, what is built for AVX2 and AVX-512 is used where the machine has them."""
    supported = {
        "portable": True,
        "avx2": torch.cpu._is_avx2_supported(),
        "avx512": torch.cpu._is_avx512_supported(),
        "avx_vnni": _has_avx_vnni(),
        "avx512_vnni": torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported(),
        "dot_product": torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported(),
    }
    assert not isas() or set(isas()) == {name for name, has in supported.items() if has}
