"""The CPU kernels' instruction sets as a parameter of tests: `isa` in tests/conftest.py, and `instruction_set` for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fourbit.kernels.cpu import library
from fourbit.kernels.cpu._library import ISAS

PRODUCTS = ("gemm", "product", "lstm_run", "lstm_run_back")
"""Operations with kernels of the instruction sets below; for the others these are avx2 and avx512 once more."""
OF_PRODUCTS = ("avx_vnni", "avx512_vnni", "dot_product")


def isas(operation: str | None = None) -> list[str]:
    """Instruction sets that this machine and this build have, or those that have kernels of their own for an operation."""
    loaded = library()
    if loaded is None:
        return []
    before = loaded.isa
    found = [name for name in ISAS if loaded.use_isa(name)]
    loaded.use_isa(before)
    return [name for name in found if name not in OF_PRODUCTS or operation is None or operation in PRODUCTS]


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """The library's kernels of one instruction set (None: as they are), for this block."""
    loaded = library()
    if name is None or loaded is None:
        yield
        return
    before = loaded.isa
    assert loaded.use_isa(name)
    try:
        yield
    finally:
        loaded.use_isa(before)
