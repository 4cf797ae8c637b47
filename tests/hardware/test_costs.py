"""The model of costs against a simulator of systolic arrays, against the paper, and against calculations by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fourbit as fb
from fourbit.cli._hardware import step_products, with_formats
from fourbit.errors import UserError
from fourbit.hardware import (
    UNITS,
    InnerProduct,
    Machine,
    Product,
    Results,
    cycles_of,
    estimate,
    figure_6c,
    separate_arrays,
    stored,
    unit_of,
)
from fourbit.hardware._machine import dram_bits, sram_bits
from fourbit.hardware._product import quantizers_of

LAYERS = json.loads((Path(__file__).parent / "scalesim_resnet18.json").read_text())["layers"]


def product(m=64, n=32, k=128, a="uint4", b="int4_sym", gemm="fprop", **more) -> Product:
    return Product("layer", gemm, 1, m, n, k, a, b, m * k, k * n, **more)


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda e: e["name"])
def test_cycles_are_those_of_scale_sim(layer, dataflow):
    theirs = layer[dataflow]
    cycles = cycles_of(layer["m"], layer["n"], layer["k"], 32, 32, dataflow)
    assert cycles == theirs["cycles"] + 1  # it counts from 0
    used = layer["m"] * layer["n"] * layer["k"] / (cycles * 32 * 32)
    assert 100 * used == pytest.approx(theirs["utilisation"], rel=1e-3)


@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda e: e["name"])
def test_reads_of_on_chip_memory_are_those_of_scale_sim(layer, dataflow):
    """It writes every partial sum once and never reads one back: the sums of a cost model that adds them are told apart."""
    m, n, k = layer["m"], layer["n"], layer["k"]
    p = product(m, n, k, "full", "full")
    deep = -(-k // 32) if dataflow != "os" else 1
    bits = sram_bits(p, k, Machine(dataflow=dataflow), 32, 1)
    sums = m * n * (2 * deep - 1)
    theirs = layer[dataflow]["sram_ifmap_reads"] + layer[dataflow]["sram_filter_reads"]
    assert bits / 16 - sums == theirs
    if dataflow != "os":  # where it counts R + C words too many per block
        assert m * n * deep == layer[dataflow]["sram_ofmap_writes"]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda e: e["name"])
def test_memory_traffic_is_that_of_scale_sim(layer):
    """Reads with weights that stay (its other orders read weights again in the last stages), writes with sums that stay (it
    sends every partial sum of the others to memory, of which the model keeps them on the chip). It counts padding."""
    m, n, k = layer["m"], layer["n"], layer["k"]
    p = replace(product(m, n, k, "full", "full"), a_numbers=layer["ws"]["dram_ifmap"])
    bits = dram_bits(p, 1024 * 8192)
    reads, writes = layer["ws"]["dram_ifmap"] + layer["ws"]["dram_filter"], layer["os"]["dram_ofmap"]
    assert 0 <= writes - m * n < 32
    assert bits == 16 * (reads + m * n)


def test_memory_traffic_of_a_large_product():
    """Near the least that any order needs, 2 m n k / sqrt(words on the chip) (Hong and Kung, 1981); less with more memory."""
    p = product(4096, 4096, 4096, "full", "full")
    previous = float("inf")
    for kb in (64, 128, 1024, 8192):
        bits = dram_bits(p, kb * 8192)
        least = 16 * 2 * 4096**3 / (kb * 512) ** 0.5
        assert max(least, 3 * 16 * 4096**2) <= bits < 2.1 * least + 3 * 16 * 4096**2
        assert bits < previous
        previous = bits


def test_figure_6c_within_3_percent():
    for row in figure_6c():
        best = min(abs(value / row.paper - 1) for value in row.ours.values())
        assert best < 0.03, row
        if len(row.ours) == 1:
            assert abs(row.ours[""] / row.paper - 1) < 0.01


def test_units_of_formats():
    assert unit_of(product(), "fp16") == "uint4_int4"
    assert unit_of(product(), "fixed") == "uint4_int4_fixed"
    assert unit_of(product(a="fp4_r4_even", b="int4_sym", gemm="dgrad"), "fixed") == "int4_fp4_fixed"
    assert unit_of(product(a="fp4_r4_odd", b="uint4", gemm="wgrad"), "fp16") == "uint4_fp4"
    assert unit_of(product(a="fp8_152", b="int4_sym"), "fixed") == "int4_fp8"
    assert unit_of(product(a="fp8_152", b="uint4"), "fixed") == "uint4_fp8"
    assert unit_of(product(a="fp4_r2", b="int4_sym"), "fp16") == "int4_fp4r2"
    assert unit_of(product(a="full", b="int4_sym"), "fp16") == "fma_fp16"
    assert unit_of(product(a="fp4_e2m1", b="fp4_e2m1", block="e8m0"), "fp16") == "mxfp4"
    assert (
        unit_of(product(a="fp4_r8"), "fp16") == "int4_fp4r8"
        and unit_of(product(a="fp5_r2"), "fixed") == "int4_fp5r2_fixed"
    )
    assert unit_of(product(a="fp4_121"), "fp16") == "int4_fp4_121"
    with pytest.raises(
        UserError, match="no arithmetic unit multiplies fp4_r2_5 by int4_sym, which layer layer asks for"
    ):
        unit_of(product(a="fp4_r2_5"), "fp16")


def test_a_unit_of_one_s_own_multiplies_its_formats(monkeypatch):
    from fourbit.formats import get

    name = "int4_fp4r2_5"
    monkeypatch.setitem(UNITS._items, name, InnerProduct(name, "", get("int4_sym"), get("fp8_e4m3fn"), 1))
    assert unit_of(product(a="fp8_e4m3fn"), "fp16") == name
    assert unit_of(product(a="fp8_e4m3fn"), "fixed") == name  # it has no form with a fixed-point register


def test_a_step_by_hand():
    """One product, large enough that nothing is left over: its time and its energy."""
    results, machine = stored(), Machine(rows=4, columns=4, dataflow="os", bandwidth=1e9)
    base = results.densest("fma_fp16")
    p = product(8, 8, 64, "full", "full")
    part, between, optimizer = estimate([p], machine, results).parts
    assert part.compute == pytest.approx(4 * (64 + 4 + 4 - 2) * base.period * 1e-12)
    assert part.utilisation == pytest.approx(8 * 8 * 64 / (4 * 70 * 16))
    assert part.energy["arithmetic"] == pytest.approx(8 * 8 * 64 * base.energy * 1e-15)
    dram = 16 * (8 * 64 * 2 + 8 * 8)
    fma = min(c.energy for c in results.costs("fma_fp16")) * 1e-15
    assert part.energy["dram"] == pytest.approx(dram * 2.6 * fma)
    words = 8 * 64 * 2 + 8 * 64 * 2 + 8 * 8  # each operand passes twice, as 8 = 2 x 4
    assert part.energy["sram"] == pytest.approx(16 * words * 0.1 * 128**0.5 * fma)
    bits, bandwidth = 16 * (3 * 64 + 8 * 64), 1e9 * 16 / (base.period * 1e-12)
    assert between.macs == 0 and between.memory == pytest.approx(
        bits / bandwidth
    )  # y, y, dy; and x for the next product
    assert optimizer.memory == pytest.approx(144 * 64 * 8 / bandwidth)


def test_what_a_layer_writes_between_products_is_in_its_formats():
    """x in 4 bits; the gradient in two phases of 4 bits, or once where both products take the same."""
    fprop, dgrad = product(), replace(product(a="fp4_r4_even", gemm="dgrad"), a_numbers=1000)
    wgrad = replace(dgrad, gemm="wgrad", a="fp4_r4_odd", b="uint4")
    machine = Machine(optimizer_bits=0)
    two, one = (
        estimate([fprop, dgrad, w], machine).parts[3].energy["dram"] for w in (wgrad, replace(wgrad, a="fp4_r4_even"))
    )
    fma = min(c.energy for c in stored().costs("fma_fp16")) * 1e-15 * 2.6
    assert two - one == pytest.approx(4 * 1000 * fma)
    assert one == pytest.approx((48 * fprop.results + 4 * fprop.a_numbers + 4 * 1000) * fma)


@pytest.mark.parametrize(
    ("dgrad", "wgrad", "found"),
    [
        ({"a": "fp4_r4_even"}, {"a": "fp4_r4_odd"}, ["quantize_fp4"]),
        ({"a": "fp4_r4_even"}, {"a": "fp4_r4_even"}, ["quantize_fp4_even"]),
        ({"a": "fp4_r4_even"}, {"a": "fp8_152"}, ["quantize_fp8_152", "quantize_fp4_even"]),
        ({"a": "fp4_r2"}, {"a": "fp4_r2", "power": True}, ["quantize_fp4r2"]),
        ({"a": "fp4_r2"}, {"a": "fp4_r2", "stochastic": True}, ["quantize_luq"]),
        ({"a": "fp4_r2"}, {"a": "fp4_r2", "stochastic": True, "power": True}, ["quantize_fp4r2_sr"]),
        ({"a": "full"}, {"a": "full", "b": "full"}, []),
        ({"a": "fp4_e2m1"}, {"a": "fp4_e2m1", "b": "fp4_e2m1", "block": "e8m0", "power": True}, ["quantize_mxfp4"] * 2),
    ],
)
def test_what_quantizes_a_gradient(dgrad, wgrad, found):
    d, w = (product(gemm=gemm, **kind) for gemm, kind in (("dgrad", dgrad), ("wgrad", wgrad)))
    assert quantizers_of(d, None) == [] and [name for name, _ in quantizers_of(w, d)] == found
    assert [name for name, _ in quantizers_of(product(), None)] == ["quantize_uint4", "quantize_int4"]


def test_a_recurrent_layer_has_one_wgrad_and_reads_its_weights_again_if_they_do_not_fit():
    p = replace(product(20, 800, 200, "full", "full"), count=35, a_numbers=35 * 20 * 200, shared=True)
    once, again = dram_bits(p, 1e9), dram_bits(p, 1e6)
    assert once == 16 * (35 * 20 * 200 + 800 * 200 + 35 * 20 * 800)
    assert again > once + 34 * 16 * 800 * 200 * 0.9
    from fourbit.cli._hardware import step_products

    found = [p for p in step_products("lstm_200", "ibm2020", None, None, 1) if p.layer == "lstm.hh_l0"]
    assert [(p.count, p.m, p.n, p.k, p.results) for p in found] == [
        (35, 1, 800, 200, 35 * 800),
        (35, 1, 200, 800, 35 * 200),
        (1, 800, 200, 35, 800 * 200),
    ]
    assert [p.shared for p in found] == [True, True, False] and not any(p.depthwise for p in found)


def test_a_convolution_writes_one_gradient_per_pixel_of_its_input():
    from fourbit.cli._hardware import step_products

    found = [p for p in step_products("resnet20", "ibm2020", None, None, 2) if p.layer == "stages.1.0.conv1.0"]
    pixels = 2 * 32 * 32
    assert [(p.gemm, p.results) for p in found] == [
        ("fprop", pixels // 4 * 32),
        ("dgrad", pixels * 16),
        ("wgrad", 32 * 16 * 9),
    ]


def test_products_of_activations_run_in_fp16_and_have_no_weights_for_the_optimizer():
    from torch import nn

    from fourbit.recipes import Recipe, Rule, catalog, explain
    from fourbit.tuning._products import products_of

    net = nn.TransformerEncoderLayer(16, 2, 32)
    found = products_of(explain(net, Recipe("one", (Rule(catalog.TPR),)), (5, 3, 16)))
    scores = [p for p in found if not p.learned]
    assert {(p.layer, p.a, p.b) for p in scores} == {
        ("self_attn.scores", "full", "full"),
        ("self_attn.values", "full", "full"),
    }
    assert [(p.count, p.m, p.n, p.k) for p in scores if p.gemm == "fprop"] == [(6, 5, 5, 8), (6, 5, 8, 5)]
    costs = [estimate(products).parts[-1] for products in (found, [p for p in found if p.learned])]
    assert costs[0] == costs[1] and costs[0].gemm == "optimizer"


def test_time_is_the_longer_one_of_arithmetic_and_memory():
    p = product(512, 512, 512)
    slow, fast = (estimate([p], Machine(bandwidth=b)).parts[0] for b in (1e-3, 1e3))
    assert slow.seconds == slow.memory > slow.compute
    assert fast.seconds == fast.compute > fast.memory


def test_formats_of_another_recipe_replace_narrow_products_only():
    found = step_products("resnet20", "ibm2020/nvfp4", None, None, 2)
    own = step_products("resnet20", "ibm2020", None, None, 2)
    narrow = [p.a != "fp16_169" for p in own if p.learned]
    assert any(narrow) and not all(narrow)
    for before, after in zip(own, found, strict=True):
        if before.a == "fp16_169" or not before.learned:
            assert after == before
        else:
            assert (after.a, after.block) == ("fp4_e2m1", "fp8_e4m3fn") and after.stochastic == (after.gemm != "fprop")
    assert with_formats(fb.recipes.get("ibm2020"), fb.recipes.get("fp32")).rules[-1].spec is None
    with pytest.raises(UserError, match="unknown recipe"):
        step_products("resnet20", "ibm2020/fp3", None, None, 2)


def test_separate_arrays():
    assert separate_arrays([1.0]) == 1.0
    assert separate_arrays([1.0, 1.0]) == pytest.approx(2.0)
    shares = [s / 100 for s in range(1, 100)]
    assert separate_arrays([1.0, 4.0]) == pytest.approx(min(1 / s + 4 / (1 - s) for s in shares) / 5, rel=1e-3)


@pytest.mark.parametrize("library", ["sg13g2", "sky130"])
def test_stored_results_are_of_every_unit(library):
    results = stored(library)
    assert set(results.units) == set(UNITS)
    for unit in UNITS:
        assert all(p.area > 0 and p.delay > 0 and p.energy > 0 for p in results.points_of(unit))
    assert results.density("fma_fp16") == 1.0


def test_a_missed_clock_and_damaged_results(tmp_path):
    with pytest.raises(UserError, match=r"fma_fp16 misses a clock period of 100 ps in .*: its fastest form needs"):
        stored().at("fma_fp16", 100)
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="cannot be read"):
        Results.read(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="holds no results"):
        Results.read(path)
    stored().write(path)
    assert Results.read(path) == stored()
    with pytest.raises(UserError, match="unknown unit"):
        stored().points_of("fma")
    for wrong in ({"rows": 0}, {"bandwidth": float("nan")}, {"period": float("inf")}, {"period": -5.0}):
        with pytest.raises(UserError, match=r"is \S+, but must be positive and finite"):
            Machine(**wrong)
    with pytest.raises(UserError, match="there are no products"):
        estimate([])


def test_registers_and_converters_add_area():
    results = stored()
    bare, held = (results.costs("int4_fp4_fixed", r, 0)[0] for r in (False, True))
    area, _ = results.flop
    assert held.area == pytest.approx(bare.area + 26 * area) and held.period >= bare.period
    one, many = (results.costs("int4_fp4_fixed", True, s)[0] for s in (1, 32))
    assert one.area - held.area == pytest.approx(32 * (many.area - held.area))


def test_unsigned_and_signed_products_cost_alike():
    machine = Machine()
    signed, unsigned = (estimate([product(a=a)], machine).seconds for a in ("int4_sym", "uint4"))
    assert 0.5 < signed / unsigned < 2
    assert estimate([replace(product(), count=3)], machine).macs == 3 * product().macs


def test_depthwise_layers_are_no_work_for_an_array():
    p = replace(product(m=100, n=1, k=9, a="full", b="full"), count=64, depthwise=True)
    part = estimate([p], Machine(rows=4, columns=4)).parts[0]
    assert part.utilisation == pytest.approx(1.0)


def test_partial_sums_in_fixed_point_are_wide_and_results_are_not():
    p = product(64, 32, 4096)
    for dataflow, word in (("ws", 32), ("os", 16)):
        machine = Machine(dataflow=dataflow, accumulator="fixed", sram_kb=8, sram_bit=1.0)
        part = estimate([p], machine).parts[0]
        cost = stored().densest(part.unit)
        columns = round(32 * 32 * stored().densest("fma_fp16").area / (32 * cost.area))
        fma = min(c.energy for c in stored().costs("fma_fp16")) * 1e-15
        assert part.energy["sram"] == pytest.approx(sram_bits(p, 4096, machine, columns, 4, word) * fma)
