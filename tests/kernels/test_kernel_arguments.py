"""Kernels are given what they read and write, whatever a user passes, and without memory they say so."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import needs_library, threads

from fourbit import formats, kernels
from fourbit.errors import UserError
from fourbit.kernels import _check
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._build import FLAGS, HERE, BuildError, abi_flag, compiler
from fourbit.kernels.cpu._library import Library
from fourbit.kernels.cuda import _device, _products, _quantize
from fourbit.ops import Finish, Layout, Raw
from fourbit.quantizers import FixedScale, Packed, QuantSpec, Request

X = torch.arange(24.0).view(2, 3, 4)
IMAGE = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)


def resized(num_bytes: int) -> torch.Tensor:
    """A tensor whose storage was taken away."""
    t = torch.ones(24)
    t.untyped_storage().resize_(num_bytes)
    return t


@pytest.mark.parametrize(
    "t",
    [
        X.double(),
        X[:, :, :3],
        X[:1].expand(2, 3, 4),
        X.flatten().as_strided((2, 3, 4), (4, 4, 1)),
        X[0],
        X.to("meta"),
        torch._neg_view(X),
        torch._efficientzerotensor(24),
        resized(0),
    ],
    ids=["dtype", "gaps", "repeats", "overlap", "too few", "meta", "negated", "zero tensor", "resized"],
)
def test_a_tensor_that_a_kernel_would_misread_has_no_address(t):
    with pytest.raises(UserError, match=r"mask of a kernel must have 24 elements of torch.float32 on cpu"):
        _check.pointer(t, "mask", torch.float32, 24)
    with pytest.raises(UserError, match="mask of a kernel"):
        _check.checked(t, "mask", torch.float32, 24, X)


def test_dense_tensors_of_any_order_have_an_address():
    for t in (X, X.transpose(0, 2), IMAGE, X[1:], torch.zeros(0), torch.ones(())):
        assert _check.pointer(t, "x", torch.float32, t.numel()) == t.data_ptr()
        assert _check.checked(t, "x", torch.float32, t.numel(), X) is t
    assert _check.optional(None, "x", torch.float32, 5) is None


def test_orders_that_a_kernel_assumes_are_asked_for():
    assert _check.pointer(IMAGE, "x", torch.float32, 24, _check.CHANNELS_LAST) == IMAGE.data_ptr()
    with pytest.raises(UserError, match="channels_last"):
        _check.pointer(IMAGE.contiguous(), "x", torch.float32, 24, _check.CHANNELS_LAST)
    with pytest.raises(UserError, match=r"as \(1, 2, 3, 4\) lies"):
        _check.pointer(IMAGE.contiguous(), "x", torch.float32, 24, like=IMAGE)
    one_row = X[:1, :1]  # the stride of an axis of length 1 means nothing
    _check.pointer(one_row, "x", torch.float32, 4, like=one_row.as_strided((1, 1, 4), (99, 7, 1)))


def test_memory_that_is_written_is_nobody_elses():
    whole = torch.zeros(20)
    _check.require_disjoint(whole[:10], "out", [(whole[10:], "x"), (whole[:10], "y")])
    with pytest.raises(UserError, match="out and x of a kernel share memory"):
        _check.require_disjoint(whole[:11], "out", [(whole[10:], "x")])


def test_every_address_is_taken_in_one_place():
    """Nothing else in the packages of kernels asks a tensor for its memory."""
    root = Path(kernels.__file__).parent
    for path in root.rglob("*.py"):
        if path.name != "_check.py":
            assert "data_ptr" not in path.read_text(), path


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The GPU's launchers on the CPU; what they would launch."""
    found: list[str] = []

    class Jit:
        def __getattr__(self, name: str) -> str:
            return name

    monkeypatch.setitem(_device.DEVICES, "cpu", (9, 0))
    _device.capability.cache_clear()
    for module in (_quantize, _products):
        monkeypatch.setattr(module, "kernels", Jit)
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: found.append(kernel))
    yield found
    _device.capability.cache_clear()


def test_launchers_for_a_gpu_take_what_goes_together(launches):
    """The stand-in for a GPU would otherwise prove nothing."""
    spec = QuantSpec("fp4_r4_even", FixedScale(0.5))
    assert _quantize.round_one(Request(X, spec, spec.format), torch.tensor(0.5)) is not None
    assert (
        _quantize.unpack(Packed(torch.zeros(32, dtype=torch.uint8), X.shape, X.stride(), True), torch.int8) is not None
    )
    finish = Finish(
        torch.tensor(0.5), None, False, None, torch.float32, Layout.of(X), torch.zeros(8, dtype=torch.uint8)
    )
    assert _products.epilogue(Raw(X.clone()), finish) is not None
    assert _quantize.moments(X) is not None
    assert launches == ["round_kernel", "unpack_kernel", "epilogue_kernel", "moments_kernel"]


def test_launchers_for_a_gpu_refuse_or_decline_the_rest(launches):
    spec = QuantSpec("fp4_r4_even", FixedScale(0.5))
    for x in (X[:, :, :3], X[:1].expand(2, 3, 4), torch._neg_view(X), X.int()):
        assert _quantize.round_one(Request(x, spec, spec.format), torch.tensor(0.5)) is None
        assert _quantize.moments(x) is None
    other = Request(X.clone(), spec, formats.FP4_R4_ODD)
    assert _quantize.round_pair(Request(X, spec, spec.format), other, torch.tensor(0.5)) is None
    short, words = torch.zeros(31, dtype=torch.uint8), torch.zeros(32, dtype=torch.int32)
    for data, stride in ((short, X.stride()), (words, X.stride()), (short.new_zeros(32), (0, 0, 0))):
        with pytest.raises(UserError, match="of a kernel must have"):
            _quantize.unpack(Packed(data, X.shape, stride, True), torch.int8)
    plain = Finish(None, None, False, None, torch.bfloat16, Layout.of(X))
    full = torch.zeros(8, dtype=torch.uint8)
    for mask, codes, layout in (
        (full[:7], None, Layout.of(X)),
        (full, Packed(short, X.shape, X.stride(), True), Layout.of(X)),
        (full, None, Layout.of(X[0])),
    ):
        with pytest.raises(UserError, match="of a kernel"):
            _products.epilogue(Raw(X.clone()), Finish(*_fields(plain)[:5], layout, mask, codes))
    assert not launches


def _fields(finish: Finish) -> tuple:
    return finish.scale, finish.output, finish.keep_infinite, finish.late, finish.dtype


FAILING = """
#include <new>
#include "common.h"
namespace fourbit {
static void use_memory(int fails) {
  parallel_always(64, [](int64_t begin, int64_t end, int, void* p) {
    if (*static_cast<int*>(p) >= begin && *static_cast<int*>(p) < end) throw std::bad_alloc();
  }, &fails);
}
static Table make() {
  Table t{};
  t.norm_apply = [](auto*) -> float { use_memory(63); return 3.0f; };  // in the last thread of the team
  t.norm_backward = [](auto*) -> float { use_memory(-1); return 5.0f; };
  return t;
}
extern const Table portable_table;
const Table portable_table = make();
}  // namespace fourbit
"""
"""A library whose kernels run out of memory."""


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_kernel_without_memory_is_a_memory_error_and_not_the_end_of_the_process(tmp_path, num_threads):
    (tmp_path / "failing.cpp").write_text(FAILING)
    built = tmp_path / "failing.so"
    sources = (str(HERE / "csrc" / "library.cpp"), str(tmp_path / "failing.cpp"))
    try:
        flags = (*FLAGS, abi_flag(), "-O0", f"-I{HERE / 'csrc'}", "-shared")
        command = [*compiler().split(), *flags, *sources, "-o", str(built)]
    except BuildError as error:
        pytest.skip(str(error))
    subprocess.run(command, check=True)
    library = Library(built)
    with threads(num_threads):
        for _ in range(2):
            with pytest.raises(MemoryError, match="fourbit got no memory"):
                library.norm_apply(ctypes.byref(c.NormApply()))
            assert library.norm_backward(ctypes.byref(c.NormBackward())) == 5.0  # the next call knows nothing of it


@needs_library
def test_odd_arguments_are_refused_declined_or_computed_rightly():
    """Without the sanitizer, which has the larger share (test_kernel_sanitizers.py)."""
    script = str(Path(__file__).parent / "fuzz_arguments.py")
    ran = subprocess.run([sys.executable, script, "600", "10000"], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-3000:]
    counts = {tuple(line.split()[:-1]): int(line.split()[-1]) for line in ran.stdout.splitlines()}
    assert counts[("calls",)] == 600
    ends = {end: sum(n for key, n in counts.items() if key[1:2] == (end,)) for end in ("right", "refused", "declined")}
    assert all(share > 30 for share in ends.values()) and not re.search("nan", ran.stdout), ends
