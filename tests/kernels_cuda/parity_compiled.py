"""Compile every kernel that the parity checks launch, for Hopper, on a machine without a GPU, and read the machine code.

    python tests/kernels_cuda/parity_compiled.py [--ptx FOLDER]

Triton brings its own assembler. What would change numbers must not occur: contracted multiply-adds, flushing of subnormals,
approximate division. Prints one line per variant and exits with 1 if one does not compile or is not clean.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import parity
import torch

from fourbit.kernels.cuda import _products, _quantize, _tiles
from fourbit.kernels.cuda._device import DEVICES

FORBIDDEN = re.compile(r"\b(fma\.rn\.f32|div\.full\.f32|div\.approx\S*|\w+\.ftz\S*)")
_NAMES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def compile_for_hopper(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], num_warps: int) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[i] if i < len(arguments) else constants[name]
        if i >= len(arguments) or value is None:
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptx", type=Path, help="folder for the assembler code")
    folder = parser.parse_args().ptx
    DEVICES["cpu"] = (9, 0)
    seen: dict[str, str] = {}

    def compile_only(
        kernel: Any, num_programs: int, on: Any, *arguments: Any, num_warps: int, **constants: Any
    ) -> None:
        kinds = [str(a.dtype) if isinstance(a, torch.Tensor) else a if a is None else a % 16 == 0 for a in arguments]
        name = f"{kernel.__name__} {kinds} {constants}"
        if name in seen:
            return
        seen[name] = "not compiled"
        built = compile_for_hopper(kernel, arguments, constants, num_warps)
        found = sorted(set(FORBIDDEN.findall(built.asm["ptx"])))
        seen[name] = f"holds {', '.join(found)}" if found else "ok"
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{len(seen):03}-{kernel.__name__}.ptx").write_text(f"// {name}\n" + built.asm["ptx"])

    _quantize.launch = _products.launch = _tiles.launch = compile_only  # type: ignore[assignment]
    parity.SIZES["compile"] = (4096,)
    for _, check in parity.checks("cpu", "compile"):
        try:
            check()
        except AssertionError:  # nothing ran, so numbers differ
            continue
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
            seen[f"{type(error).__name__} {len(seen)}"] = "failed"
    for name, result in seen.items():
        print(f"{result:8} {name}")
    wrong = sum(result != "ok" for result in seen.values())
    print(f"{len(seen)} variants, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
