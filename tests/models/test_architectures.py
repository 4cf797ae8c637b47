"""Architectures of transformers, small: what `convert` reaches, that they learn, and that they come back whole.

The cases are those of docs/architectures.md, which `python -m benchmarks.architectures` writes.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fourbit as fb

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks import _architecture_checks as checks  # noqa: E402
from benchmarks._architecture_checks import AS_FAR, CLEARLY  # noqa: E402
from benchmarks._architectures import CASES, Case  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    """As the margins were measured with, and without the library's messages about models that nobody has trained."""
    before, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)
    transformers.logging.set_verbosity(verbosity)


def _params(chosen=CASES):
    return [pytest.param(c, id=c.name, marks=() if c.fast else pytest.mark.slow) for c in chosen]


def _learning() -> list[Any]:
    """A transformer and a convolutional network every day: trainings take longer than all else."""
    return [pytest.param(c, id=c.name, marks=() if c.name in ("gpt2", "resnet") else pytest.mark.slow) for c in CASES]


def _build(case: Case):
    if case.name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {case.name}")
    return case.build()


def test_there_are_many_of_them():
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", _params())
def test_every_layer_that_multiplies_matrices_is_converted_or_named(case):
    model = _build(case)
    wanted = checks.expected_layers(model)
    found = checks.coverage(case)
    assert set(found.layers) | (set(found.other) & wanted) == wanted
    assert all(re.search(case.left, name) for name in found.other)
    assert found.share > 0.5
    assert set(fb.nn.quantized_layers(fb.convert(model, "ibm2020"))) == set(found.layers)


@pytest.mark.parametrize("case", _params())
def test_it_takes_a_step_with_int4_forward(case):
    model = fb.convert(_build(case), "int4-fwd")
    checks.loss_of(model, case.batch()).backward()
    used = [layer.quant.x_alpha for layer in fb.nn.quantized_layers(model).values()]
    assert len([alpha for alpha in used if alpha is not None and alpha.grad is not None and alpha.grad.isfinite()]) > 3


@pytest.mark.parametrize("case", _learning())
def test_it_learns_in_four_bits_as_far_as_in_float_and_comes_back_whole(case):
    plain = _build(case)
    first, last = checks.train(plain, case)
    assert last < (1 - CLEARLY) * first
    model = fb.convert(case.build(), "ibm2020")
    start, end = checks.train(model, case)
    assert start - end > AS_FAR * (first - last)
    assert checks.faults_of_saving(model) == []
    if case.generates:
        assert checks.faults_of_generating(model, case) == []
    assert checks.faults_of_restoring(model, case) == []


@pytest.mark.parametrize("case", _params([case for case in CASES if case.convolves]))
def test_fused_chains_change_no_more_than_the_order_of_sums(case):
    _build(case)
    assert checks.faults_of_fusing(case) == []


def test_timm():
    try:
        import timm
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")
    for name in ("resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4).train()
        kept = {key: p.detach().clone() for key, p in model.named_parameters()}
        images, classes = torch.randn(2, 3, 224, 224), torch.arange(2)
        fb.convert(model, "ibm2020")
        torch.nn.functional.cross_entropy(model(images), classes).backward()
        fb.restore(model)
        assert {key: p.shape for key, p in model.named_parameters()} == {key: p.shape for key, p in kept.items()}
        assert all(torch.equal(p, kept[key]) for key, p in model.named_parameters())
