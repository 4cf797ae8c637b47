"""What is measured on a GPU: quantizers, matrix products, a Transformer block stack, ResNet-50, memory. See gpu_check.py.

Each function returns rows for a table. Times are CUDA events around replays of a graph (quantizers and products: no gaps
between launches) or around whole steps (networks: what a user sees), medians, contestants in alternating turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import backends, formats
from fourbit.kernels.cuda import _multiply, _products
from fourbit.ops import Finish, Layout, Raw
from fourbit.quantizers import Amax, ClipValue, GradScale, QuantSpec, Request, Rounding, Sawb, pack, pack_mask, run
from fourbit.quantizers._request import _round
from fourbit.quantizers._statistics import Statistics

Row = dict[str, Any]
DEVICE = "cuda"


def seconds_of(function: Callable[[], Any], samples: int = 15, graph: bool = True) -> float:
    """Device time of one call: the median over replays of a graph that holds several (or over plain calls)."""
    if not graph:
        return _median(function, samples)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    recorded, repeats = torch.cuda.CUDAGraph(), 5
    with torch.cuda.graph(recorded):
        for _ in range(repeats):
            function()
    return _median(recorded.replay, samples) / repeats


def _median(function: Callable[[], Any], samples: int) -> float:
    function()
    times = []
    for _ in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def host_seconds(function: Callable[[], Any], calls: int = 200) -> float:
    """Time that a call takes of the host."""
    for _ in range(10):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls


def _quantizers(n: int) -> dict[str, tuple[float, Callable[[], Any]]]:
    """{name: (bytes that must move per element, function)}."""
    x32 = torch.randn(n, device=DEVICE)
    x16 = x32.to(torch.bfloat16)
    matrix = x16.view(-1, 4096) if n >= 4096 * 1024 else None
    alpha = torch.tensor(2.0, device=DEVICE)
    exponent = torch.tensor(4, dtype=torch.int32, device=DEVICE)
    codes = pack(torch.randint(0, 16, (n,), dtype=torch.uint8, device=DEVICE), formats.UINT4)
    mask = pack_mask(x32 > 0)
    sums = torch.randint(-1000, 1000, (n,), dtype=torch.int32, device=DEVICE)
    scale = torch.tensor(0.01, device=DEVICE)

    def request(x: Tensor, format: str, scaling: Any, stored: Tensor | None = None, save: bool = False, **options: Any):
        spec = QuantSpec(formats.get(format), scaling, **options)
        return Request(x, spec, spec.format, None, stored, 1 if spec.stochastic else None, save)

    def both(*arguments: Any, **options: Any) -> Callable[[], Any]:
        """The scale from the data, and rounding."""
        made = request(*arguments, **options)
        return lambda: run(made)

    def one(*arguments: Any, **options: Any) -> Callable[[], Any]:
        """Rounding with a scale that is there."""
        made = request(*arguments, **options)
        known = made.spec.scaling.of(Statistics(made.x), made.format, made.stored)
        return lambda: backends.OPERATIONS["round"](made, known) or _round(made, known, Statistics(made.x))

    def pair(x: Tensor) -> Callable[[], Any]:
        made = [request(x, f"fp4_r4_{phase}", GradScale(), exponent) for phase in ("even", "odd")]
        known = made[0].spec.scaling.of(Statistics(x), made[0].format, exponent)

        def eager() -> list[Any]:
            return [_round(m, known, Statistics(x)) for m in made]

        return lambda: backends.OPERATIONS["round_pair"](*made, known) or eager()

    target = torch.empty_like(x32)
    finish = Finish(scale, formats.FP16_169, False, None, torch.bfloat16, Layout.of(sums))
    masked = Finish(scale, formats.FP16_169, False, scale, torch.float32, Layout.of(x32), mask, codes)
    found = {
        "copy, float32": (8.0, lambda: target.copy_(x32)),
        "PACT + pack + mask, float32": (5.625, one(x32, "uint4", ClipValue(), alpha, True)),
        "PACT + pack + mask, bfloat16": (3.625, one(x16, "uint4", ClipValue(), alpha, True)),
        "SAWB + pack (two reads), float32": (9.5, both(x32, "int4_sym", Sawb(), save=True)),
        "radix-4, both phases + amax, float32": (8.0, pair(x32)),
        "radix-4, both phases + amax, bfloat16": (6.0, pair(x16)),
        "radix-2 stochastic (two reads), float32": (9.0, both(x32, "fp4_r2", Amax(), rounding=Rounding.STOCHASTIC)),
        "FP8 1-5-2, float32": (6.0, one(x32, "fp8_152", GradScale(), exponent)),
        "FP16 1-6-9, float32": (8.0, one(x32, "fp16_169", GradScale(), exponent)),
        "table (int4_midrise; two reads), float32": (10.0, both(x32, "int4_midrise", Amax())),
        "unpack to bfloat16": (2.5, lambda: codes.unpack(torch.bfloat16)),
        "unpack to int8": (1.5, lambda: codes.unpack(torch.int8)),
        "epilogue int32 to bfloat16": (6.0, lambda: _products.epilogue(Raw(sums), finish)),
        "epilogue float32, masked, clip gradient": (8.625, lambda: _products.epilogue(Raw(x32), masked)),
    }
    if matrix is not None:
        found["radix-4 in FP8, second transposed, bfloat16"] = (4.0, pair(matrix))
    return found


def quantizers(exponents: tuple[int, ...] = (12, 20, 24, 26, 28)) -> list[Row]:
    """GB/s of each quantizer, and as a share of a copy's."""
    rows = []
    for exponent in exponents:
        copy = 0.0
        for name, (size, function) in _quantizers(1 << exponent).items():
            seconds = seconds_of(function)
            speed = size * (1 << exponent) / seconds / 1e9
            copy = speed if name.startswith("copy") else copy
            row = {
                "what": name,
                "elements": f"2^{exponent}",
                "us": seconds * 1e6,
                "GB/s": speed,
                "of copy": speed / copy,
            }
            if exponent == 12:
                row["host us"] = host_seconds(function) * 1e6
            if exponent == 24 and not name.startswith(("copy", "epilogue")):
                with backends.without():
                    row["eager us"] = seconds_of(function, 5, graph=False) * 1e6
            rows.append(row)
        torch.cuda.empty_cache()
    return rows


SHAPES = ((8192, 4096, 4096), (8192, 16384, 4096), (4096, 4096, 8192), (16384, 512, 512))


def products(shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> list[Row]:
    """TFLOP/s of the matrix products that layers use."""
    rows = []
    for m, n, k in shapes:
        a, b = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
        a8, b8 = (t.clamp(-3, 3).mul(2).to(torch.int8) for t in (a, b))
        a16, b16 = a.to(torch.bfloat16), b.to(torch.bfloat16)
        af, bf = (t.clamp(-3, 3).round().to(torch.float8_e4m3fn) for t in (a, b))
        one = torch.ones((), device=DEVICE)

        def fp8(fast: bool, out: torch.dtype, af: Tensor = af, bf: Tensor = bf, one: Tensor = one) -> Tensor:
            return torch._scaled_mm(af, bf.t(), one, one, out_dtype=out, use_fast_accum=fast)

        def in_tf32(a: Tensor = a, b: Tensor = b) -> Tensor:
            with _multiply.tf32():
                return a @ b.t()

        contestants = {
            "bfloat16 to bfloat16": lambda a=a16, b=b16: a @ b.t(),
            "bfloat16 to float32": lambda a=a16, b=b16: torch.mm(a, b.t(), out_dtype=torch.float32),
            "int8 to int32": lambda a=a8, b=b8: torch._int_mm(a, b.t()),
            "FP8 to float32": lambda f=fp8: f(False, torch.float32),
            "FP8 to float32, fast accumulation": lambda f=fp8: f(True, torch.float32),
            "FP8 to bfloat16": lambda f=fp8: f(False, torch.bfloat16),
            "TF32": in_tf32,
        }
        exact = af.double() @ bf.double().t() if m * n < 2**26 else None
        for name, function in contestants.items():
            row: Row = {"what": name, "M x N x K": f"{m} x {n} x {k}"}
            try:
                row["TFLOP/s"] = 2 * m * n * k / seconds_of(function) / 1e12
                if name.startswith("FP8") and exact is not None:
                    row["relative error"] = float((function().double() - exact).norm() / exact.norm())
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
    return rows
