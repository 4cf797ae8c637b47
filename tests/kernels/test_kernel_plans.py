"""Operations are declared once, and kernels answer before they work: with a plan, or with a sentence."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_cases import needs_library
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit as fb
from fourbit import backends, formats
from fourbit.backends import OPERATIONS, Call, Operation
from fourbit.ops import GEMM, PRODUCT, Finish, Gemm, Layout, LinearMap, Operand
from fourbit.quantizers import ROUND, UNPACK, FixedScale, QuantSpec, Request, pack

SPEC = QuantSpec("int4_sym", FixedScale(0.5))


def test_every_operation_has_a_reference_that_is_there_or_says_why_not():
    backends.kernels()
    for name, operation in OPERATIONS.items():
        assert operation.name == name
        if operation.reference.startswith("("):
            assert len(operation.reference) > 20
            continue
        module, _, last = f"fourbit.{operation.reference}".rpartition(".")
        owner, _, method = module.rpartition(".")
        found = (
            getattr(importlib.import_module(owner), method) if method[0].isupper() else importlib.import_module(module)
        )
        assert callable(getattr(found, last)), operation.reference


def test_an_operation_is_declared_once():
    with pytest.raises(ValueError, match="registered twice"):
        Operation("round", reference="nowhere")


class Computations(TorchDispatchMode):
    """The operations that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def backward_gemm(which: str, rows: int = 16) -> tuple[Gemm, Finish]:
    """A product of a linear layer's backward pass, whose saved operand is packed."""
    form, other = formats.get("fp4_r4_even"), formats.get("int4_sym")
    g = torch.randn(rows, 32).sign().to(torch.bfloat16)
    saved = torch.randint(-7, 8, (32, 48) if which == "dgrad" else (rows, 48), dtype=torch.int8)
    out = torch.empty((rows, 48) if which == "dgrad" else (32, 48))
    a, b = Operand(g, None, form, True), Operand(pack(saved, other), torch.tensor(0.5), other, True)
    gemm = Gemm(which, LinearMap(), a, b, Layout.of(out), torch.float32, "exact")  # type: ignore[arg-type]
    return gemm, Finish(gemm.scale, None, False, None, torch.float32, Layout.of(out))


@needs_library
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_a_plan_allocates_unpacks_and_reads_nothing(which):
    gemm, finish = backward_gemm(which)
    x = torch.randn(64)
    request = Request(x, SPEC, SPEC.format, save=True)

    def ask() -> list[dict[str, str]]:
        found = [PRODUCT.answers(gemm, finish), GEMM.answers(gemm), ROUND.answers(request, scale)]
        return [*found, UNPACK.answers(gemm.b.q, torch.int8)]  # type: ignore[arg-type]

    scale = torch.tensor(0.5)
    ask()  # what the formats alone decide is found once
    with Computations() as computed:
        answers = ask()
    assert computed.names == []
    assert all("cpu" in answer for answer in answers) and answers[2]["cpu"] == answers[3]["cpu"] == ""


@needs_library
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_a_product_unpacks_its_saved_operand_once(which):
    gemm, _ = backward_gemm(which)
    with backends.watching() as calls:
        fb.ops.finish(fb.ops._product.multiply(gemm), Finish(gemm.scale, None, False, None, torch.float32, gemm.layout))
    assert sum(n for call, n in calls.items() if call.operation == "unpack" and not call.declined) == 1


@needs_library
@pytest.mark.parametrize(
    ("x", "scale", "said"),
    [
        (torch.ones(8, dtype=torch.float64), torch.tensor(0.5), "float32, bfloat16 and float16 are read"),
        (torch.ones(4, 4)[:, :2], torch.tensor(0.5), "do not fill one piece of memory"),
        (torch.ones(8), torch.ones(8), "not one scale"),
    ],
)
def test_a_kernel_says_in_a_sentence_why_it_declines(x: Tensor, scale: Tensor, said):
    request = Request(x, SPEC, SPEC.format)
    assert said in ROUND.answers(request, scale)["cpu"]
    with backends.watching() as calls:
        assert ROUND(request, scale) is None
    assert [call for call in calls if call.backend == "cpu"] == [
        Call("round", "cpu", ROUND.answers(request, scale)["cpu"])
    ]


@needs_library
def test_calls_of_a_layer_are_counted_while_somebody_watches_and_change_no_number():
    layer = fb.nn.Linear(64, 64, spec=fb.LayerSpec(x_fprop=SPEC, w_fprop=SPEC))
    x = torch.randn(32, 64)
    with backends.watching() as calls:
        y = layer(x)
    assert calls[Call("round", "cpu", "")] == 2
    assert torch.equal(layer(x), y)
    with backends.without(), backends.watching() as calls:
        layer(x)
    assert not calls
