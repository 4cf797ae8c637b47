"""Every CUDA kernel against the eager reference, bit for bit: plain Python, so that it runs where there is no pytest.

    python tests/kernels_cuda/parity.py                 on the GPU
    TRITON_INTERPRET=1 python tests/kernels_cuda/parity.py --device cpu --sizes small      in Triton's interpreter

Prints one line per check and exits with 1 if one failed. Fresh memory is filled with NaN (integers with their largest number),
so that an element that a kernel does not write is seen, and inputs lie between infinities, so that one too many is seen too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Iterator

import parity_blocks
import parity_memory
import parity_stand_in as stand_in
import torch
from parity_inputs import DTYPES, Check, all_bfloat16, between_infinities, same, sample
from torch import Tensor

from fourbit import formats
from fourbit.formats import CATALOG, Format
from fourbit.kernels.cuda import _quantize
from fourbit.quantizers import Amax, ClipValue, FixedScale, QuantSpec, Request, Rounding, Sawb, Tile, pack
from fourbit.quantizers._request import _round
from fourbit.quantizers._statistics import Statistics

SIZES = {"small": (1, 31, 64, 65, 4097), "full": (1, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 1 << 20, 3_000_001)}


def compare_round(request: Request, scale: Tensor) -> None:
    ours = _quantize.round_one(request, scale)
    assert ours is not None, "the kernel declined"
    theirs = _round(request, scale, Statistics(request.x))
    number = ~request.x.isnan()
    assert ours.q is not None and theirs.q is not None
    assert ours.q.dtype == theirs.q.dtype and ours.q.stride() == theirs.q.stride()
    same(ours.q, theirs.q, "q", number)
    same(ours.amax, theirs.amax, "amax")
    assert (ours.mask is None) == (theirs.mask is None)
    if ours.mask is not None and theirs.mask is not None:
        same(ours.mask, theirs.mask, "mask")
    if ours.packed is not None:  # the reference leaves packing to who asked for it
        same(ours.packed.data, pack(ours.q, request.format).data, "packed codes")
        same(ours.packed.unpack(torch.float32), theirs.q.to(torch.float32), "unpacked codes", number)


def round_checks(device: str, sizes: tuple[int, ...]) -> Iterator[Check]:
    scale = torch.tensor(0.37, device=device)
    one = torch.ones((), device=device)
    everything = all_bfloat16(device)
    for format in CATALOG.values():
        if format.bits <= 8:
            spread = torch.tensor(format.max / 100, device=device)
            for s in (one, spread):
                request = Request(everything, QuantSpec(format), format)
                yield f"round {format}, all bfloat16, scale {float(s):.3g}", lambda r=request, s=s: compare_round(r, s)
            drawn = Request(everything, QuantSpec(format, rounding=Rounding.STOCHASTIC), format, key=12345)
            yield f"stochastic {format}, all bfloat16", lambda r=drawn: compare_round(r, one)
        request = Request(sample(5008, torch.float32, device), QuantSpec(format), format)
        yield f"round {format}, float32", lambda r=request: compare_round(r, scale)
    for n in sizes:
        for dtype in DTYPES:
            x = sample(n, dtype, device)
            for name, request in saving_requests(x):
                s = request.spec.scaling.of(Statistics(x), request.format, request.stored)
                yield f"{name}, {dtype}, {n}", lambda r=request, s=s: compare_round(r, s)
            for key in (1, -(2**62)):
                spec = QuantSpec(formats.FP4_R2, rounding=Rounding.STOCHASTIC)
                drawn = Request(x, spec, spec.format, key=key)
                yield f"stochastic fp4_r2, key {key}, {dtype}, {n}", lambda r=drawn: compare_round(r, scale)
    for name, x in layouts(device):
        for label, request in saving_requests(x):
            s = request.spec.scaling.of(Statistics(x), request.format, request.stored)
            yield f"{label}, {name}", lambda r=request, s=s: compare_round(r, s)


def saving_requests(x: Tensor) -> Iterator[tuple[str, Request]]:
    alpha = torch.tensor(2.5, device=x.device)
    pact, sawb = ClipValue(), Sawb(clipped=True)
    yield "PACT", Request(x, QuantSpec(formats.UINT4, pact), formats.UINT4, stored=alpha, save=True)
    yield "signed PACT", Request(x, QuantSpec(formats.UINT4, pact), formats.INT4_SYM, stored=alpha, save=True)
    yield "clipped SAWB", Request(x, QuantSpec(formats.INT4_SYM, sawb), formats.INT4_SYM, save=True)
    drawn = QuantSpec(formats.INT4, Amax(), rounding=Rounding.STOCHASTIC)
    yield "stochastic INT4", Request(x, drawn, formats.INT4, key=7, save=True)
    yield "PACT to E2M1", Request(x, QuantSpec(formats.FP4_E2M1, pact), formats.FP4_E2M1, stored=alpha, save=True)


def layouts(device: str) -> Iterator[tuple[str, Tensor]]:
    x = sample(2 * 3 * 5 * 7, torch.float32, device)
    yield "channels_last", between_infinities(x.view(2, 3, 5, 7).contiguous(memory_format=torch.channels_last))
    yield "transposed", x.view(14, 15).t()
    yield "0-d", between_infinities(torch.tensor(1.25, device=device))
    yield "not aligned", x[1:]


def pair_checks(device: str, sizes: tuple[int, ...]) -> Iterator[Check]:
    pairs = [
        (formats.FP4_R4_EVEN, formats.FP4_R4_ODD),
        (formats.FP4_R4_EVEN, formats.FP8_152),
        (formats.FP4_121, formats.FP4_R2),
    ]
    scale = torch.tensor(2.0**-5, device=device)

    def compare(x: Tensor, pair: tuple[Format, Format], fp8: bool) -> None:
        requests = [Request(x, QuantSpec(format), format) for format in pair]
        ours = _quantize.round_pair(requests[0], requests[1], scale)
        assert ours is not None, "the kernel declined"
        for mine, request in zip(ours, requests, strict=True):
            theirs = _round(request, scale, Statistics(x))
            assert mine.q is not None and theirs.q is not None
            assert (mine.q.dtype == torch.float8_e4m3fn) == fp8, f"carrier {mine.q.dtype}"
            same(mine.q.to(torch.float32), theirs.q, str(request.format), ~x.isnan())
            same(mine.amax, theirs.amax, "amax")

    for first, second in pairs:
        pair = (first, second)
        yield f"round_pair {first}, {second}, all bfloat16", lambda p=pair: compare(all_bfloat16(device), p, False)
        for n in sizes:
            yield (
                f"round_pair {first}, {second}, {n}",
                lambda p=pair, n=n: compare(sample(n, torch.float32, device), p, False),
            )
    for shape in ((1024, 1040), (2, 512, 1024)):
        x = sample(math.prod(shape), torch.bfloat16, device).view(shape)
        yield f"round_pair in FP8, {shape}", lambda x=x: compare(x, pairs[0], True)


def special_checks(device: str) -> Iterator[Check]:
    def nan_poisons() -> None:
        x = sample(200, torch.float32, device)
        x[77] = math.nan
        request = Request(x, QuantSpec(formats.UINT4), formats.UINT4, save=True)
        found = _quantize.round_one(request, torch.ones((), device=device))
        assert found is not None and bool(found.amax.isnan())

    def empty_declines() -> None:
        x = torch.empty(0, 3, device=device)
        assert (
            _quantize.round_one(Request(x, QuantSpec(formats.UINT4), formats.UINT4), torch.ones((), device=device))
            is None
        )
        assert _quantize.moments(x) is None

    def channels_decline() -> None:
        x = sample(12, torch.float32, device).view(3, 4)
        request = Request(x, QuantSpec(formats.INT4_SYM, FixedScale(), "channel"), formats.INT4_SYM, tile=Tile(1, None))
        assert _quantize.round_one(request, torch.ones(3, 1, device=device)) is None

    yield "amax of NaN is NaN", nan_poisons
    yield "empty tensors are declined", empty_declines
    yield "a scale per channel is declined", channels_decline


def checks(device: str, sizes: str) -> Iterator[Check]:
    """All checks, by name."""
    numbers = SIZES[sizes]
    yield from round_checks(device, numbers)
    yield from pair_checks(device, numbers)
    yield from parity_memory.statistics_checks(device, numbers)
    yield from parity_memory.unpack_checks(device, numbers)
    yield from parity_memory.epilogue_checks(device, tuple(n for n in numbers if n in (31, 64, 65, 4096, 3_000_001)))
    yield from special_checks(device)
    yield from parity_blocks.block_checks(device)


def run(device: str, sizes: str, quiet: bool = False, seconds: float = math.inf) -> dict[str, str]:
    """Run all checks; {name: "ok", what is wrong, or "not run" after so many seconds}."""
    end = time.monotonic() + seconds
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results = {}
    try:
        for name, check in checks(device, sizes):
            if time.monotonic() > end:
                results[name] = "not run"
                continue
            try:
                check()
                results[name] = "ok"
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                results[name] = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
            if not quiet or results[name] != "ok":
                print(f"{results[name][:200]:8} {name}", flush=True)
    finally:
        torch.use_deterministic_algorithms(False)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="full", choices=SIZES)
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        stand_in.for_a_gpu()
    results = run(arguments.device, arguments.sizes, arguments.quiet)
    wrong = sum(result not in ("ok", "not run") for result in results.values())
    print(f"{len(results)} checks, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
