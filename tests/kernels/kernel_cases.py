"""What the parity tests share: every registered kernel on every instruction set, inputs to try it on, comparisons.

A kernel's tests are not written for that kernel: they find it in `backends.kernels()`, call it, and compare what it returns
with the reference. A new backend is tested as soon as it is registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from instruction_sets import instruction_set, isas
from torch import Tensor

from fourbit import backends, formats
from fourbit.kernels.cpu import library
from fourbit.quantizers import Quantized, Request, Rounded, run
from fourbit.quantizers._statistics import Statistics

SIZES = (0, 1, 63, 64, 65, 127, 1000, 2**14 - 1, 2**14, 2**14 + 1, 100003)
"""Around blocks of 64, around the 2^14 elements from which several threads work, and one that several threads share."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW = [format for format in formats.CATALOG.values() if format.bits <= 8]
ALL_BFLOAT16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
needs_library = pytest.mark.skipif(library() is None, reason="the CPU kernels are not built")


@contextmanager
def threads(num: int) -> Iterator[None]:
    """As many threads for torch and the kernels, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_dot_product(isa: str | None) -> bool:
    """Whether the library's own products and convolutions run with this instruction set (None: that in use)."""
    loaded = library()
    with instruction_set(isa):
        return loaded is not None and loaded.has_dot_product


def has_products(isa: str | None) -> bool:
    """The same of all products, those of integers only among them."""
    loaded = library()
    with instruction_set(isa):
        return loaded is not None and loaded.has_products


def isas_with_products() -> list[str | None]:
    """For tests of the library's own products; [None] where it has none, to skip them."""
    return [isa for isa in isas() if has_products(isa)] or [None]


needs_products = pytest.mark.skipif(isas_with_products() == [None], reason="the library has no products here")


def skip_without_products(implementation: Implementation) -> None:
    """Ends a test of the library's own products where it has none."""
    if implementation.isa is not None and not has_products(implementation.isa):
        pytest.skip(f"{implementation.isa} has no products")


def skip_if_none(taken: int) -> None:
    """Ends a test of products that no kernel took: there is nothing to compare."""
    if not taken:
        pytest.skip("no kernel takes these products on this processor")


@dataclass(frozen=True)
class Implementation:
    """A registered kernel, on one instruction set of the CPU."""

    kernel: backends.Kernel[..., Any]
    isa: str | None

    def __call__(self, *arguments: Any) -> Any:
        """What the kernel returns."""
        with instruction_set(self.isa):
            return self.kernel(*arguments)

    def __str__(self) -> str:
        return f"{self.kernel.backend}-{self.kernel.plan.__name__}{f'-{self.isa}' if self.isa else ''}"


def implementations(operation: str) -> list[Implementation]:
    """The kernels of one operation, of the backends that this machine has: another test may have imported others."""
    available = {status.name for status in backends.statuses() if status.available}
    found: list[Implementation] = []
    for kernel in backends.kernels():
        if kernel.operation == operation and kernel.backend == "cpu":
            found += [Implementation(kernel, isa) for isa in isas(operation)]
        elif kernel.operation == operation and kernel.backend in available:
            found.append(Implementation(kernel, None))
    return found


def each_implementation(operation: str) -> Any:
    """Parametrizes `implementation` over the kernels of one operation."""
    return pytest.mark.parametrize("implementation", implementations(operation), ids=str)


def reference(request: Request) -> tuple[Tensor, Quantized]:
    """The scale that a kernel is given, and what the reference makes of the request."""
    with backends.without():
        scale = request.spec.scaling.of(Statistics(request.x), request.format, request.stored)
        return scale, run(request)


def assert_same(actual: Tensor, expected: Tensor, where: Tensor | None = None) -> None:
    """Same dtype, shape and numbers, to the last bit; NaN equals NaN. Grids have one zero: its sign does not matter.

    `where`: only there.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    wrong = ~same if where is None else ~same & where
    assert not wrong.any(), (int(wrong.sum()), actual[wrong][:4], expected[wrong][:4])


def assert_same_rounding(actual: Rounded, expected: Quantized, x: Tensor) -> None:
    """Codes, packed codes, mask and amax. What a NaN becomes is nobody's business: the scale is NaN then."""
    number = ~x.isnan()
    if actual.q is not None:
        assert_same(actual.q, expected.tensor.q, number)
        assert actual.q.stride() == expected.tensor.q.stride()
    assert_same(*(torch.as_tensor(found.amax, dtype=torch.float32) for found in (actual, expected)))
    assert (actual.mask is None) == (expected.mask is None)
    if actual.mask is not None:
        assert_same(actual.mask, expected.mask)
    if actual.packed is not None:  # otherwise who asked for it packs
        assert expected.packed is not None
        assert (actual.packed.shape, actual.packed.stride) == (expected.packed.shape, expected.packed.stride)
        assert actual.packed.signed == expected.packed.signed
        if number.all():
            assert_same(actual.packed.data, expected.packed.data)
        with backends.without():
            assert_same(actual.packed.unpack(torch.int8), expected.packed.unpack(torch.int8), number)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The numbers of a 4-d tensor in memory orders that layers meet, the last two with gaps or repeats."""
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": x.repeat_interleave(2, dim=3)[..., ::2],
        "expanded": x[:1].expand(x.shape),
        "offset": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }


def numbers(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers over many binades, with zeros, subnormals and extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * torch.exp2(torch.randn(size, generator=generator) * 4)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 0.5, -0.5, 1.0, 64.0, 2.0**-149])
    spread = torch.arange(size) % 17 == 3
    x[spread] = special[torch.arange(int(spread.sum())) % len(special)]
    most = min(3e38, torch.finfo(dtype).max)
    return x.clamp(-most, most).to(dtype)
