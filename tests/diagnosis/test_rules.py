"""Rules on histories that are written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fourbit as fb
from fourbit.cli import main
from fourbit.diagnosis import RULES, Finding, History, Warner, examine, outlier

STATISTICS = {
    "numel": 100,
    "amax": 1.0,
    "scale": 0.1,
    "underflow": 0.1,
    "saturation": 0.0,
    "sqnr_db": 20.0,
    "bias": -0.1,
}


def observed(steps: Iterable[int], change: dict[str, Any] | None = None, slot: str = "g_dgrad") -> list[dict[str, Any]]:
    """Lines of two layers; `change` is made to the second."""
    lines = []
    for step in steps:
        layers = {}
        for name, more in (("first", {}), ("second", change or {})):
            slots = {s: STATISTICS | (more if s == slot else {}) for s in ("x_fprop", "w_fprop", "g_dgrad", "g_wgrad")}
            layers[name] = {"g_exponent": 5, "x_alpha": 1.0, "slots": slots}
        lines.append({"kind": "layers", "step": step, "layers": layers})
    return lines


def examined(lines: Iterable[dict[str, Any]]) -> dict[str, Finding]:
    history = History()
    for line in lines:
        history.add(line)
    return {finding.kind: finding for finding in examine(history)}


def losses(*values: float | None, every: int = 10) -> list[dict[str, Any]]:
    return [{"kind": "step", "step": every * (i + 1), "loss": v, "lr": 0.1} for i, v in enumerate(values)]


def test_nothing_is_wrong_with_nothing():
    assert examined([]) == {}
    assert examined(observed(range(1, 9))) == {}


@pytest.mark.parametrize(
    ("kind", "slot", "change"),
    [
        ("underflow", "g_wgrad", {"underflow": 0.5, "bias": -0.3}),
        ("saturation", "g_wgrad", {"saturation": 0.06, "bias": -0.3}),
        ("saturation", "x_fprop", {"saturation": 0.3, "bias": -0.6}),
        ("signal-lost", "w_fprop", {"sqnr_db": 2.0}),
        ("dead-layer", "x_fprop", {"amax": 0.0}),
        ("gradient-shrinks", "g_dgrad", {"bias": -0.25}),
    ],
)
def test_a_state_is_found_in_its_layer_since_its_step_if_it_lasts(kind: str, slot: str, change: dict[str, float]):
    before = observed((1, 2, 3))
    found = examined(before + observed((4, 5, 6), change, slot))
    assert list(found) == [kind]
    assert found[kind].layers == ("second",)
    assert found[kind].step == 4
    assert "second" in found[kind].sentence and "first" not in found[kind].sentence.split(" since")[0].split()
    assert examined(before + observed((4, 5), change, slot)) == {}, "two observations are not enough"
    assert examined(observed((1, 2, 3), change, slot) + observed((4,))) == {}, "it is over"


def test_underflow_that_keeps_the_magnitude_is_none():
    assert examined(observed(range(6), {"underflow": 0.7, "bias": 0.0})) == {}


def test_clip_values_that_fall_to_a_tenth_have_collapsed_and_what_they_cut_off_is_no_second_finding():
    lines = observed(range(1, 7), {"saturation": 0.9, "bias": -0.9}, "x_fprop")
    for line in lines[2:]:
        line["layers"]["second"]["x_alpha"] = 0.05
    found = examined(lines)
    assert list(found) == ["clip-collapse"]
    assert (found["clip-collapse"].step, found["clip-collapse"].value) == (3, 0.05)


def test_many_layers_are_counted_and_three_are_named():
    lines = [
        {"kind": "layers", "step": s, "layers": {f"layer{i}": {"slots": {"x_fprop": {"amax": 0.0}}} for i in range(5)}}
        for s in (1, 2, 3)
    ]
    found = examined(lines)["dead-layer"]
    assert len(found.layers) == 5
    assert "layer0, layer1, layer2 and 2 more" in found.sentence


def test_losses_tell_of_a_rate_too_high_of_a_network_that_does_not_learn_and_of_the_end():
    assert list(examined(losses(2.0, 1.8, 1.5, 1.2, 1.0))) == []
    assert list(examined(losses(2.0, 4.0, 3.0, 1.2, 1.0))) == ["rate-too-high"]
    assert list(examined(losses(2.0, 2.1, 2.0, 2.0, 2.0))) == ["learns-nothing"]
    found = examined(losses(2.0, 1.5, None))
    assert found["not-finite"].step == 30
    assert found["not-finite"].as_dict()["value"] is None


def test_the_loss_of_the_very_first_step_is_what_others_are_compared_with():
    first = {"kind": "vitals", "step": 1, "loss": 2.4, "layers": {}, "norms": {}}
    assert "rate-too-high" in examined([first, *losses(6.8, 4.0, 3.0, 2.0)])
    assert examined(losses(6.8, 4.0, 3.0, 2.0)) == {}


def test_a_loss_scale_that_goes_up_and_down_does_not_settle_and_one_that_grows_does():
    def scaled(scales: Iterable[float]) -> list[dict[str, Any]]:
        return [{"kind": "step", "step": i, "loss": 2 / (i + 1), "loss_scale": s} for i, s in enumerate(scales)]

    assert "loss-scale-unsettled" in examined(scaled([1.0, 2.0] * 10))
    assert examined(scaled([2.0 ** (i // 4) for i in range(20)])) == {}


def test_exponents_that_turn_by_one_are_healthy_and_by_four_are_not():
    def moved(exponents: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {
                "kind": "step",
                "step": i,
                "loss": 2 / (i + 1),
                "scales": {"a": {"g_exponent": e}, "b": {"g_exponent": None}},
            }
            for i, e in enumerate(exponents)
        ]

    assert examined(moved([3, 4] * 10)) == {}
    assert list(examined(moved([3, 5, 7, 5] * 6))) == ["scale-flips"]


def vitals(steps: Iterable[int], **slots: Any) -> list[dict[str, Any]]:
    return [{"kind": "vitals", "step": s, "layers": {"second": slots}, "norms": {}} for s in steps]


def test_an_exponent_that_stands_still_far_off_is_stuck_and_one_that_moves_is_not():
    lines = observed(range(1, 7))
    off = vitals(range(1, 7), g_dgrad={"full": 0.01})
    assert list(examined(lines + off)) == ["scale-stuck"]
    for place, line in enumerate(lines):
        line["layers"]["second"]["g_exponent"] = place
    assert examined(lines + off) == {}


def test_sums_are_broken_where_they_were_zero_and_more_than_chance_is_left():
    assert list(examined(vitals(range(4), g_dgrad={"sums": [1e-8, 0.3, 4096]}))) == ["sums-broken"]
    assert examined(vitals(range(4), g_dgrad={"sums": [0.2, 0.3, 4096]})) == {}
    assert examined(vitals(range(4), g_dgrad={"sums": [1e-8, 0.3, 64]})) == {}


def test_running_statistics_run_away_if_they_are_large_and_still_grow():
    def norms(values: Iterable[float]) -> list[dict[str, Any]]:
        return [
            {"kind": "vitals", "step": i, "layers": {}, "norms": {"bn": {"mean": v, "deviation": 1.0}}}
            for i, v in enumerate(values)
        ]

    assert list(examined(norms([1, 10, 100, 200, 400, 800]))) == ["statistics-run-away"]
    assert examined(norms([500] * 6)) == {}
    assert examined(norms([1, 2, 4, 8, 16, 32])) == {}


def test_weights_oscillate_that_change_their_code_without_moving():
    def of(places: list[list[float]]) -> list[dict[str, Any]]:
        return [
            line
            for step, place in enumerate(places)
            for line in vitals([step], w_fprop={"codes": [place, [float(round(v)) for v in place]]})
        ]

    assert list(examined(of([[0.45, 2.0], [0.55, 2.1]] * 4))) == ["oscillating-weights"]
    assert examined(of([[0.0, 2.0], [1.0, 3.0]] * 4)) == {}, "these have moved"


@pytest.mark.parametrize(
    ("results", "place"),
    [
        ([90.0, 91.0, 70.0], 2),
        ([90.0, 91.0, 89.0], None),
        ([90.0, 84.0, 70.0], None),
        ([90.0, 70.0], None),
        ([90.0, 90.0, math.nan], 2),
        ([math.nan, 90.0, math.nan], None),
        ([90.0, 90.0, 90.0, 88.0], None),
    ],
)
def test_a_seed_is_an_outlier_if_it_is_far_from_all_others(results: list[float], place: int | None):
    assert outlier(results, percent=True) == place


def test_a_warner_says_each_kind_once_and_nothing_that_was_said_before():
    said: list[Finding] = []
    dead = observed(range(1, 7), {"amax": 0.0}, "x_fprop")
    warner = Warner(said.append)
    for line in dead:
        warner.add(line)
        warner.add({"kind": "vitals", "step": line["step"], "layers": {}, "norms": {}})
    assert [finding.kind for finding in said] == ["dead-layer"]
    again = Warner(said.append)
    for line in dead[:4]:
        again.recall(line)
    again.recalled()
    for line in dead[4:]:
        again.add(line)
    again.add({"kind": "epoch", "step": 7})
    assert len(said) == 1


def test_a_warner_of_a_long_run_keeps_a_bounded_history():
    history = History(limited=True)
    for line in observed(range(500)):
        history.add(line)
    steps = [line["step"] for line in history.lines("layers")]
    assert len(steps) == 80
    assert (steps[0], steps[-1]) == (0, 499)


def test_every_sentence_and_remedy_ends_and_names_what_to_do():
    for rule in RULES:
        assert rule.sentence.endswith(".") and rule.remedy.endswith(".")


def test_a_loop_of_ones_own_is_warned_once_and_computes_what_it_would_without():
    def trained(watched: bool) -> tuple[list[str], torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        with torch.no_grad():
            model[2].bias.fill_(-100.0)  # nothing gets through
        fb.convert(model, "ibm2020")
        said: list[Finding] = []
        watch = fb.Watch(model, every=2, say=said.append)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(10):
            x = torch.randn(32, 8)
            if watched:
                with watch.step(step):
                    loss = F.cross_entropy(model(x), x[:, 0].gt(0).long())
                    loss.backward()
                watch.loss(step, loss.item())
            else:
                F.cross_entropy(model(x), x[:, 0].gt(0).long()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [finding.kind for finding in said], model[0].weight.detach()

    (kinds, weight), (_, alone) = trained(True), trained(False)
    assert kinds == ["dead-layer"]
    assert torch.equal(weight, alone)


def test_a_watch_refuses_an_interval_that_is_none():
    with pytest.raises(fb.UserError, match="every is 0"):
        fb.Watch(nn.Linear(2, 2), every=0)


def write(folder: Any, lines: list[dict[str, Any]], **config: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"recipe": "ibm2020", "model": "m", "data": "d", **config}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ended(metric: float) -> dict[str, Any]:
    judged = {"metric": "accuracy %", "test_metric": metric, "test_accuracy": metric / 100}
    return {"kind": "final", "step": 60, "epoch": 0, "test_loss": 0.5, "stopped": "done", **judged}


def test_the_command_ends_with_0_for_a_healthy_run_and_1_for_findings(tmp_path: Any, capsys: pytest.CaptureFixture):
    write(tmp_path / "good", [*observed(range(1, 60, 9)), ended(90)])
    write(tmp_path / "bad", [*observed(range(1, 60, 9), {"amax": 0.0}, "x_fprop"), ended(90)], lr=1)
    assert main(["diagnose", str(tmp_path / "good")]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["diagnose", str(tmp_path)]) == 1
    assert "dead-layer: Everything is zero in second since step 1" in " ".join(capsys.readouterr().out.split())
    assert main(["diagnose", str(tmp_path / "bad"), "--json"]) == 1
    (shown,) = json.loads(capsys.readouterr().out)
    assert [f["kind"] for f in shown["findings"]] == ["dead-layer"]
    assert shown["findings"][0]["layers"] == ["second"]


def test_the_command_finds_the_seed_that_is_unlike_the_others(tmp_path: Any, capsys: pytest.CaptureFixture):
    for seed, metric in enumerate((90.0, 91.0, 60.0)):
        write(tmp_path / f"seed{seed}", [*observed((1, 2, 3)), ended(metric)], seed=seed)
    assert main(["diagnose", str(tmp_path), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert [[f["kind"] for f in run["findings"]] for run in shown] == [[], [], ["seed-outlier"]]


def test_the_command_refuses_what_is_no_run(tmp_path: Any, capsys: pytest.CaptureFixture):
    assert main(["diagnose"]) == 2
    assert main(["diagnose", str(tmp_path)]) == 2
    assert main(["diagnose", str(tmp_path / "none")]) == 2
    assert "no run folder found" in capsys.readouterr().err


def test_a_report_begins_with_what_is_wrong(tmp_path: Any):
    write(tmp_path / "bad", [*observed(range(1, 60, 9), {"amax": 0.0}, "x_fprop"), ended(90)])
    page = fb.report.write_report([tmp_path / "bad"], tmp_path / "page.html").read_text()
    assert page.index("What is wrong") < page.index('id="results"')
    assert "Everything is zero in second" in page


def test_losses_that_begin_at_zero_or_below_are_not_compared_with_their_beginning():
    """Distances to a starting point, likelihoods of densities: legal, and no ratio says anything about them."""
    for first, slope in ((0.0, 0.01), (-1.0, -0.01), (-1.0, 0.0)):
        assert not examined(losses(*(first + slope * step for step in range(200))))


@pytest.mark.parametrize("kind", [float, torch.tensor, np.float32])
def test_a_loss_may_be_a_number_a_tensor_or_an_array(kind):
    said: list[Finding] = []
    watch = fb.Watch(
        fb.convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), "int4-fwd"), every=10, say=said.append
    )
    for step in range(200):
        watch.loss(step, kind(2 - 0.005 * step))
    watch._warner.add({"kind": "final", "step": 200})
    assert not said
