"""Loading the C++ library, and the choice of its instruction set.

What the library's functions take and return is read from its header (`_structures.py`). It brings no threads of its own
(`_threads.py`).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.backends import Status, forget_plans
from fourbit.errors import UserError, unknown
from fourbit.kernels.cpu._build import LIBRARY
from fourbit.kernels.cpu._structures import ABI, FUNCTIONS
from fourbit.kernels.cpu._threads import openmp_entries

ISAS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "dot_product")
"""Instruction sets, from the plainest to the widest; avx_vnni is AVX2 with dot products of integers, avx512_vnni AVX-512 with
them, and dot_product AVX-512 with those of bfloat16 as well."""


class Library:
    """The loaded library: an attribute for each function of its header, `fourbit_clip` as `clip`. Those that do the work take
    one structure, by reference."""

    def __init__(self, path: Path):
        self._dll = ctypes.CDLL(str(path))
        abi = self._dll.fourbit_abi
        abi.restype = FUNCTIONS["abi"].result
        if abi() != ABI:
            raise OSError("it was built from other sources")
        for name, (result, arguments, allocates) in FUNCTIONS.items():
            function = getattr(self._dll, f"fourbit_{name}")
            function.restype = result
            if not _is_one_structure(arguments):  # which is passed by reference, and would be checked for a microsecond
                function.argtypes = arguments
            if allocates:
                function.errcheck = self._check_memory
            setattr(self, f"_{name}" if name in ("isa", "use_isa") else name, function)
        entries = openmp_entries()
        self.threads = entries is not None
        if entries is not None:
            self.set_threads(*entries)
        self._look()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A function."""

    def _check_memory(self, result: Any, *_: Any) -> Any:
        if self.out_of_memory():
            raise MemoryError("a kernel of fourbit got no memory for its work")
        return result

    isa: str
    """Instruction set in use, one of ISAS; at first the fastest that the processor has."""
    has_products: bool
    """Whether the products and convolutions run with it: not with portable, and not with avx512 alone."""
    has_dot_product: bool
    """Whether they multiply bfloat16 by integers. Otherwise, they do what is made of integers in units of a number."""

    def _look(self) -> None:
        """Every product asks for these, so the library is asked once."""
        self.isa, products = self._isa().decode(), self.products()
        self.has_products, self.has_dot_product = products > 0, products == 2

    def use_isa(self, name: str) -> bool:
        """Use the kernels of another instruction set; False, and nothing changes, where there are none. Not while
        kernels run."""
        done = bool(self._use_isa(name.encode()))
        self._look()
        forget_plans()
        return done


def _is_one_structure(arguments: list[Any]) -> bool:
    return len(arguments) == 1 and hasattr(arguments[0], "contents")


SWITCHED_OFF = "switched off by FOURBIT_CPU_KERNELS=0"
ISA_VARIABLE = "FOURBIT_CPU_ISA"
"""Environment variable: the instruction set that the kernels keep to in this process."""


@lru_cache(maxsize=1)
def _load() -> tuple[Library | None, str]:
    asked = os.environ.get(ISA_VARIABLE)
    if asked and asked not in ISAS:
        raise unknown(f"value of {ISA_VARIABLE}", asked, ISAS)
    switch = os.environ.get("FOURBIT_CPU_KERNELS", "1")
    if switch == "0":
        return None, SWITCHED_OFF
    if switch != "1":
        warnings.warn(
            f"FOURBIT_CPU_KERNELS is {switch!r}, but can be 0 (off) or 1 (on): the kernels are on", stacklevel=3
        )
    path = Path(os.environ.get("FOURBIT_CPU_LIBRARY") or LIBRARY)
    if not path.exists():
        return None, "not built; build them with: python -m fourbit.kernels.cpu._build (needs a C++ compiler)"
    try:
        loaded = Library(path)
    except (OSError, AttributeError) as error:
        return None, f"{path.name} could not be used ({error}); build it again: python -m fourbit.kernels.cpu._build"
    if asked and not loaded.use_isa(asked):
        raise UserError(
            f"{ISA_VARIABLE} is {asked}, which this processor or build does not have: leave it out, or set it to {loaded.isa}."
        )
    return loaded, ""


def library() -> Library | None:
    """The library, loaded once; None, with one warning, where there is none."""
    loaded, reason = _load()
    if loaded is None and reason != SWITCHED_OFF:
        _warn(reason)
    return loaded


@lru_cache(maxsize=1)
def _warn(reason: str) -> None:
    warnings.warn(f"fourbit runs without its CPU kernels, several times slower: {reason}", stacklevel=3)


def status() -> Status:
    """For `fourbit doctor` and `explain`."""
    loaded, reason = _load()
    if loaded is None:
        return Status("cpu", False, reason, needed=reason != SWITCHED_OFF)
    threads = "torch's threads" if loaded.threads else "one thread (torch's OpenMP runtime was not found)"
    chosen = f" (set by {ISA_VARIABLE})" if os.environ.get(ISA_VARIABLE) else ""
    return Status("cpu", True, f"{loaded.isa}{chosen}, {threads}")
