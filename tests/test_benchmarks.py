"""The benchmarks run, on tiny sizes and without other libraries, and what they compare computes the same numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from benchmarks import (
    _child,
    _harness,
    _naive,
    _networks,
    _operations,
    _regions,
    _ways,
    cold_start,
    growth,
    quantizers,
    traces,
)
from benchmarks import step as steps
from benchmarks import tables as documents
from torch import nn

import fourbit as fb
from fourbit import formats

ROOT = Path(__file__).parents[1]
STEP_WAYS = (
    "fp32;fp32 channels_last;bf16 autocast;ours ibm2020;ours ibm2020, not fused;ours ibm2020, no kernels;QPyTorch"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All four benchmarks, run small: the folder that they wrote."""
    out = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    common = ["--rounds", "2", "--threads", "1", "--out", str(out), "--no-peers"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOURBIT_BENCHMARK_PEERS", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("fourbit.train._environment.tune_malloc", lambda: False)  # it would stay in this process
        patch.setattr(
            cold_start, "run", lambda job: _child.JOBS[job["do"]](**{k: v for k, v in job.items() if k != "do"})
        )
        quantizers.main(["--sizes", "7,8", "--turn", "0", *common])
        steps.main(["--networks", "digits_cnn", "--batch", "8", "--ways", STEP_WAYS, "--no-memory", *common])
        growth.main(["--series", "mlp-width", "--sizes", "8,16", "--ways", "fp32;ours ibm2020", "--no-memory", *common])
        cold_start.main(["--network", "digits_cnn", "--batch", "8", "--ways", "fp32;ours ibm2020", *common])
    torch.set_num_threads(threads)
    return out


def load(results: Path, name: str) -> dict:
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.slow
def test_every_benchmark_writes_json_tables_and_plots(results):
    for name in ("quantizers", "step", "growth", "cold_start"):
        data = load(results, name)
        assert data["command"].startswith(f"python -m benchmarks.{name} --") and data["machine"]["torch"]
        assert "| --- |" in (results / f"{name}.md").read_text()
    for figure in ("quantizers", "step", "step-profile", "growth"):
        assert (results / f"{figure}.png").stat().st_size > 5000


@pytest.mark.slow
def test_results_hold_no_path_of_the_machine(results):
    for path in [*results.glob("*.json"), *results.glob("*.md")]:
        assert str(results) not in path.read_text() and str(ROOT) not in path.read_text()


@pytest.mark.slow
def test_every_operation_has_our_time_at_every_size(results):
    for name, operation in load(results, "quantizers")["operations"].items():
        for size in ("7", "8"):
            found = operation["sizes"][size]
            assert len(found["ours"]["seconds"]) == 2, name
            assert _harness.ratio(found, "ours", "copy of as many bytes").median > 0
            peers = {"QPyTorch", "microxcaling", "torchao MXFP4", "torchao NVFP4"} & set(found)
            said = {found[peer]["skipped"] for peer in peers}
            assert said <= {"other libraries were left out (--no-peers)", "no clone given: --microxcaling DIR"}, name
            assert peers or name.endswith(("-rht", "-sr")), name  # who rounds these?


@pytest.mark.slow
def test_a_step_says_what_waits_for_backward_and_where_the_time_goes(results):
    network = load(results, "step")["networks"]["digits_cnn"]
    saved = network["saved_bytes"]
    # 4 of 32 bits, and a bit of mask: 0.156
    assert 0.15 < saved["ours ibm2020"]["activations"] / saved["fp32"]["activations"] < 0.17
    assert saved["fp32"]["activations"] == saved["fp32"]["four_bit_layers"]
    assert saved["bf16 autocast"]["four_bit_layers"] < saved["fp32"]["four_bit_layers"]
    assert network["times"]["QPyTorch"]["skipped"]
    assert set(network["profile"]) == {"fp32 channels_last", "bf16 autocast", "ours ibm2020"}
    assert network["profile"]["ours ibm2020"]["products"] > 0 and network["profile"]["ours ibm2020"]["quantize"] > 0


@pytest.mark.slow
def test_the_document_shows_every_table_and_keeps_its_prose(results):
    (results / "parity.md").write_text("all equal")
    (results / "avx2").mkdir()
    shutil.copy(results / "step.json", results / "avx2")
    shown = documents.blocks(documents.load(results), results, "figures")
    text = (ROOT / "docs" / "performance.md").read_text()
    names = set(_regions.names(text))
    assert {name for name in names if not name.endswith("-avx2")} == {
        name for name in shown if not name.endswith("-avx2")
    }
    assert {"targets-avx2", "machine-avx2"} < names <= set(shown)
    filled = _regions.fill(text, shown)
    assert all(shown[name] in filled for name in names)
    assert "Not measured" not in re.sub(r"\| not measured \|", "", filled)
    assert _regions.outside(filled) == _regions.outside(text) and _regions.fill(text, {}) == text


def test_turns_alternate_and_slow_entrants_have_five():
    calls = []

    def entrant(name):
        return _harness.Entrant(name, "ours", lambda: lambda: calls.append(name))

    results = _harness.race([entrant("a"), entrant("b")], rounds=3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3  # two calls each to warm up
    assert len(results["a"]["seconds"]) == 3
    assert len(_harness.race([entrant("a")], rounds=9, budget_s=0.0)["a"]["seconds"]) == 5


def test_peers_that_fail_are_skipped_with_a_reason_and_ours_are_not():
    def broken():
        raise ValueError("cannot read /some/where/file.py")

    def missing():
        raise _harness.Skip("not installed")

    results = _harness.race([_harness.Entrant("x", "peer", broken), _harness.Entrant("y", "peer", missing)], 2)
    assert results["x"]["skipped"] == "ValueError: cannot read file.py" and results["y"]["skipped"] == "not installed"
    assert _harness.ratio(results, "x", "y") is None
    with pytest.raises(ValueError, match="cannot read"):
        _harness.race([_harness.Entrant("ours", "ours", broken)], 2)


def test_ratios_are_taken_turn_by_turn():
    results = {"a": {"seconds": [1.0, 10.0, 3.0]}, "b": {"seconds": [2.0, 20.0, 3.0]}}
    assert _harness.ratio(results, "a", "b").median == 0.5


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_peak_of_memory():
    job = {"do": "peak_memory", "network": "mlp", "way": "fp32", "batch": 4096, "width": 256, "steps": 1}
    try:
        found = _harness.in_fresh_process(job)
    except _harness.Skip as reason:
        pytest.skip(str(reason))
    activations = 4 * 4096 * (3 * 256 + 1024)
    assert activations < found["peak_bytes"] < 20 * activations


@pytest.mark.parametrize("name", [name for name, o in _operations.OPERATIONS.items() if o.plain is not None])
def test_the_plain_functions_give_the_numbers_of_the_library(name):
    operation = _operations.OPERATIONS[name]
    x = operation.data(1000)
    ours, plain = operation.ours(x)(), operation.plain(x)(x)
    if name == "pair":
        assert torch.equal(ours[0].q, plain[0]) and torch.equal(ours[1].q, plain[1]) and torch.equal(ours[2], plain[2])
        return
    quantized = ours.tensor if hasattr(ours, "tensor") else ours
    assert torch.equal(quantized.q, plain[0])
    if name in ("pact", "sawb"):
        assert torch.equal(ours.packed.data, plain[1])
    if name == "pact":
        assert torch.equal(ours.mask, plain[2])


@pytest.mark.parametrize("grid", ["fp4_r4_even", "fp4_r4_odd"])
def test_the_naive_radix_4_is_the_format(grid):
    format = formats.get(grid)
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([3e-3, 5e-3, 0.0097, 0.0099, 0.0])])
    x = x[((x.abs() * 1.6).log2() / 2 % 1 - 0.5).abs() < 0.499]  # a logarithm is not exact at the decision points
    assert torch.equal(_naive.radix4(x, 0.5 if grid.endswith("odd") else 1.0), fb.round_to_format(x, format))


def test_the_naive_fp16_is_the_format():
    x = torch.randn(2000) * torch.exp2(torch.randint(-34, 34, (2000,)).float())
    assert torch.equal(_naive.fp16_169(x), fb.round_to_format(x, formats.FP16_169))


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Conv2d(8, 8, 3), (4, 8, 6, 6)), (lambda: nn.Linear(16, 8), (32, 16))]
)
def test_the_naive_emulation_trains_with_the_same_numbers(make, shape):
    torch.manual_seed(0)
    first, last = make(), make()
    last.load_state_dict(first.state_dict())
    spec = fb.recipes.get("ibm2020").rules[-1].spec
    ours = fb.convert(nn.Sequential(first), fb.Recipe("one", (fb.Rule(spec),)), products="exact")
    naive = _naive.convert(nn.Sequential(last), ["0"])
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(t) for model, t in zip((ours, naive), inputs, strict=True)]
    g = torch.randn_like(outputs[0]) * 1e-3
    for y in outputs:
        y.backward(g)
    # sums of scaled numbers here, of unscaled ones there: the last bit of FP16 may differ
    for a, b in ((outputs[0], outputs[1]), (inputs[0].grad, inputs[1].grad), (first.weight.grad, last.weight.grad)):
        torch.testing.assert_close(a, b, rtol=2**-9, atol=1e-3 * float(b.detach().abs().max()))
    torch.testing.assert_close(ours[0].quant.x_alpha.grad, naive[0].alpha.grad.view(1), rtol=1e-3, atol=1e-6)


def test_a_slope_is_that_of_the_largest_sizes():
    assert growth.slope([(1, 50.0), (2, 4.0), (4, 16.0), (8, 64.0)]) == 2.0
    assert growth.slope([(1, 5.0)]) is None


def test_every_network_has_layers_for_4_bits_and_a_loss():
    for name in ("digits_cnn", "mlp", "gpt"):
        network = _networks.get(name, None if name == "digits_cnn" else 64)
        training = _ways.prepare("ours ibm2020", network, 2)
        assert len(_ways.four_bit_names(network)) >= 2
        training()
        assert torch.isfinite(training.loss())


@pytest.mark.parametrize("case", ["linear", "grouped and transposed"])
def test_traces_repeat_every_bit_and_tell_recipes_apart(case):
    before, again, other = (traces.trace(case, recipe) for recipe in ("luq", "luq", "int4-fwd"))
    assert not list(traces.differences({"a": before}, {"a": again}))
    (line,) = traces.differences({"a": before}, {"a": other})
    assert line.startswith("a: step 0: ")
    assert list(traces.differences({"a": before}, {})) == ["a: only before"]


def test_one_bit_of_a_gradient_is_a_difference():
    before = traces.trace("linear", "ibm2020")
    after = json.loads(json.dumps(before))
    after[2]["gradients"]["0.weight"] = "0" * 16
    assert list(traces.differences({"a": before}, {"a": after})) == ["a: step 2: d 0.weight"]
