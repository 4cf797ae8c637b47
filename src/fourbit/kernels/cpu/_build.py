"""Compile the kernels: one C++ compiler, no headers but the standard library's, about ten seconds.

The installation runs this (hatch_build.py); by hand: `python -m fourbit.kernels.cpu._build`. It uses the standard library
only, so that it can be loaded before anything is installed. The quantizers are compiled once per instruction set, and the
library chooses at load time, so what is built on one x86 machine runs on another.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "_kernels.so"
HEADER = HERE / "csrc" / "common.h"

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
EXACT = ("-ffp-contract=off",)
"""The numbers are defined operation by operation: no fused multiply-add that the source does not spell out."""

X86 = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
}
PER_ISA = ("quantize.cpp", "norm.cpp", "accumulate.cpp", "cell.cpp", "blocks.cpp")
ONCE = ("library.cpp",)
INTEGERS = ("avx2_convolve.cpp", "avx2_multiply.cpp", "avx2_wgrad.cpp")
INTEGER_ISAS = {
    "avx2": X86["avx2"],
    "avx_vnni": (*X86["avx2"], "-mavxvnni"),
    "avx512_vnni": (*X86["avx512"], "-mavx512vnni"),
}
"""Sources of the products without bfloat16, and the instruction sets that they are compiled for."""
DOT_PRODUCT = ("convolve.cpp", "multiply.cpp")
DOT_PRODUCT_FLAGS = (*X86["avx512"], "-mavx512bf16", "-mavx512vnni", "-DFOURBIT_ISA=dot_product")
"""Sources, and the flags with which they have their kernels. A compiler that does not know the flags leaves sources empty."""


class BuildError(Exception):
    """No compiler, or it failed; the message says which."""


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(name.split()[0])
        if found:
            return name
    raise BuildError(f"no C++ compiler found ({named or 'c++, g++, clang++'}): install one, or set CXX")


def declarations(header: str) -> str:
    """What a header says, without its comments and with single spaces."""
    return " ".join(re.sub(r"//[^\n]*", "", header).split())


def abi_of(header: str) -> int:
    """The number by which a library and what calls it know that they were made from the same declarations."""
    return int.from_bytes(hashlib.sha256(declarations(header).encode()).digest()[:8], "big")


def abi_flag() -> str:
    """What library.cpp is compiled with: `fourbit_abi` returns it."""
    return f"-DFOURBIT_ABI={abi_of(HEADER.read_text())}u"


def build(target: Path = LIBRARY, extra: Sequence[str] = (), machine: str = "") -> Path:
    """Compile the library to `target`, replacing it at once when everything is done.

    Args:
        extra: flags for compiler and linker, such as -fsanitize=address.
        machine: what the compiler compiles for, as `platform.machine()` names it; by default this machine.

    Raises:
        BuildError: no compiler, or a failed compilation; an existing library stays.
    """
    if sys.platform == "win32":
        raise BuildError("the CPU kernels are not built on Windows: use WSL for the fast path")
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64", "i686")
    isas = X86 if x86 else {"portable": ()}
    defines = (abi_flag(), *(("-DFOURBIT_X86",) if x86 else ()))
    command = [*compiler().split(), *FLAGS, *EXACT, *defines, *extra]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(source, isa, flags) for source in PER_ISA for isa, flags in isas.items()]
        jobs += [(source, "", ()) for source in ONCE]
        for isa, flags in INTEGER_ISAS.items():
            known = flags if x86 and _accepts(command, flags) else ()
            jobs += [(source, isa, known) for source in INTEGERS]
        flags = DOT_PRODUCT_FLAGS if x86 and _accepts(command, DOT_PRODUCT_FLAGS) else ()
        jobs += [(source, "", flags) for source in DOT_PRODUCT]
        running, objects = [], []
        for source, isa, flags in jobs:
            output = Path(folder) / f"{source}.{isa}.o"
            define = (f"-DFOURBIT_ISA={isa}",) if isa else ()
            arguments = [*command, *flags, *define, "-c", str(HERE / "csrc" / source), "-o", str(output)]
            running.append(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True))
            objects.append(str(output))
        failures = [error for process in running if (error := process.communicate()[1]) and process.returncode]
        if failures:
            raise BuildError(f"{compiler()} failed: {failures[0].strip()[-2000:]}")
        linked = Path(folder) / "linked.so"
        static = () if sys.platform == "darwin" or extra else ("-static-libgcc", "-static-libstdc++")
        link = [*compiler().split(), "-shared", *extra, *static, *objects, "-o", str(linked)]
        done = subprocess.run(link, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise BuildError(f"linking failed: {done.stderr.strip()[-2000:]}")
        staged = target.with_suffix(".new")
        shutil.copyfile(linked, staged)
        os.replace(staged, target)
    return target


def _accepts(command: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether the compiler knows these flags."""
    arguments = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"fourbit: {error}")
