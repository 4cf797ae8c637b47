"""Layers and short training runs on the CUDA kernels against the eager reference: plain Python.

    python tests/kernels_cuda/parity_layers.py                 on the GPU
    TRITON_INTERPRET=1 python tests/kernels_cuda/parity_layers.py --device cpu      in Triton's interpreter

Operands are equal bit for bit (see parity.py); sums are not, since tensor cores add in another order, and what is "fast" is
rounded otherwise. So results are compared by |a - b| / |b| in the Euclidean norm.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import parity_stand_in as stand_in
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends
from fourbit.kernels.cuda import _device, _products, _quantize
from fourbit.ops import LayerSpec
from fourbit.recipes import catalog

Check = tuple[str, Callable[[], None]]
SPECS: dict[str, LayerSpec] = {
    "ibm2020": catalog.TPR,
    "FP8 gradients": catalog.FP8_GRADIENTS,
    "FP16": catalog.FP16,
    "INT4 forward": catalog.INT4_FORWARD,
    "LUQ": fb.recipes.get("luq").rules[-1].spec,
    "LUQ, two samples": fb.recipes.get("luq-smp2").rules[-1].spec,
    "channel GradScale": replace(
        catalog.TPR,
        g_dgrad=replace(catalog.TPR.g_dgrad, granularity="channel"),
        g_wgrad=replace(catalog.TPR.g_wgrad, granularity="channel"),
    ),
}
TOLERANCE = {"exact": 1e-3, "fast": 1.2e-2}


def layers(small: bool) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    yield "Linear", lambda: nn.Linear(96, 64), (3, 40, 96)
    yield "Linear, odd", lambda: nn.Linear(37, 11), (13, 37)
    yield (
        "Linear, FP8",
        lambda: nn.Linear(128, 64) if small else nn.Linear(2048, 1024),
        (64, 128) if small else (2, 1024, 2048),
    )
    yield "Conv2d 3x3", lambda: nn.Conv2d(16, 24, 3, padding=1), (4, 16, 9, 9)
    yield "Conv2d 3x3, stride 2", lambda: nn.Conv2d(16, 24, 3, 2, 1, bias=False), (4, 16, 9, 9)
    yield "Conv2d 1x1", lambda: nn.Conv2d(32, 24, 1, bias=False), (4, 32, 6, 6)
    yield "Conv2d depthwise", lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (4, 16, 9, 9)
    yield "Conv1d", lambda: nn.Conv1d(16, 24, 3), (4, 16, 20)
    yield "ConvTranspose2d", lambda: nn.ConvTranspose2d(16, 24, 3, 2), (4, 16, 5, 5)


def one_pass(
    make: Callable[[], nn.Module], shape: tuple[int, ...], spec: LayerSpec, products: str, device: str,
    off: AbstractContextManager[None], dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Results of the third of three training steps on fixed data, so that exponents are known."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).abs().to(device, dtype).requires_grad_()
    with off:
        fb.convert(model, fb.Recipe("one", (fb.Rule(spec),)), products=products)
        for _ in range(3):
            model.zero_grad()
            x.grad = None
            with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float32):
                y = model(x)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, y.dtype) * 1e-3
            y.backward(g)
    found = {"y": y, "dx": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    state = {f"state {n}": b for n, b in model.named_buffers()}
    return {name: t.detach().double() for name, t in (found | state).items() if t is not None}


_used: list[str] = []
"""Names of the kernels that were launched."""


def count_launches() -> None:
    for module in (_quantize, _products):

        def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
            _used.append(kernel.__name__)
            _device.launch(kernel, *arguments, **options)

        module.launch = launch


def compare(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    spec: LayerSpec,
    products: str,
    device: str,
    dtype: torch.dtype,
) -> None:
    cpu_off = backends.without("cpu") if device == "cpu" else nullcontext()
    before = len(_used)
    ours = one_pass(make, shape, spec, products, device, cpu_off, dtype)
    after = len(_used)
    theirs = one_pass(make, shape, spec, products, device, backends.without(), dtype)
    assert before < after == len(_used), "the kernels were not used, or by the reference"
    tolerance = TOLERANCE[products] + (4e-3 if dtype != torch.float32 else 0.0)
    for name, wanted in theirs.items():
        error = float((ours[name] - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if name.startswith("state"):
            assert error == 0, f"{name}: {ours[name].flatten()[:4].tolist()} instead of {wanted.flatten()[:4].tolist()}"
        # the clip value's gradient is a sum with cancellation
        limit = tolerance * (10 if name.endswith("alpha") else 1)
        assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.1e}"


def layer_checks(device: str, small: bool) -> Iterator[Check]:
    for name, make, shape in layers(small):
        for label, spec in SPECS.items():
            if label != "ibm2020" and name not in ("Linear", "Conv2d 3x3") and small:
                continue
            for products in ("fast", "exact"):
                for dtype in (torch.float32, torch.bfloat16):
                    plain = dtype == torch.float32 and (products == "fast" or not small)
                    if plain or label == "ibm2020":
                        what = f"{name}, {label}, {products}, {str(dtype).removeprefix('torch.')}"
                        arguments = (make, shape, spec, products, device, dtype)
                        yield what, lambda a=arguments: compare(*a)


def _digits(device: str, recipe: str | None, steps: int, wait_is_an_error: bool = False) -> list[float]:
    """Losses of a small network on ten noisy prototypes."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    ).to(device)  # fmt: skip
    if recipe:
        fb.convert(model, recipe)
    optimizer = torch.optim.SGD(fb.param_groups(model, 1e-4), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 1, 8, 8, generator=generator)
    losses = []
    for step in range(steps):
        label = torch.randint(0, 10, (64,), generator=generator)
        image = prototypes[label] + 0.3 * torch.randn(64, 1, 8, 8, generator=generator)
        image, label = image.to(device), label.to(device)
        if wait_is_an_error and step == 5:
            torch.cuda.set_sync_debug_mode("error")
        loss = F.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if wait_is_an_error:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def training_checks(device: str, small: bool) -> Iterator[Check]:
    steps = 8 if small else 80

    def learns(recipe: str) -> None:
        cpu_off = backends.without("cpu") if device == "cpu" else nullcontext()
        with cpu_off:
            ours = _digits(device, recipe, steps)
        with backends.without():
            theirs = _digits(device, recipe, steps)
        plain = _digits(device, None, steps)
        first = max(abs(a - b) / b for a, b in zip(ours[:4], theirs[:4], strict=True))
        assert first < 0.05, f"losses leave the reference's at once: {ours[:4]}, {theirs[:4]}"
        last = [sum(losses[-5:]) / 5 for losses in (ours, theirs, plain)]
        if not small:
            assert last[0] < 0.5 * ours[0], f"the loss does not fall: {ours[0]:.3f} to {last[0]:.3f}"
            assert last[0] < last[1] + 0.15 and last[0] < last[2] + 0.3, f"kernels, reference, fp32: {last}"

    def waits_for_nothing(recipe: str) -> None:
        _digits(device, recipe, 8, wait_is_an_error=True)

    for recipe in ("ibm2020", "luq"):
        yield f"training, {recipe}", lambda r=recipe: learns(r)
    if device == "cuda":
        for recipe in ("ibm2020", "ibm2020-dw8", "ibm2020-1x1fp8", "luq", "int4-fwd"):
            yield f"a training step waits for nothing, {recipe}", lambda r=recipe: waits_for_nothing(r)


def run(device: str, small: bool, quiet: bool = False, seconds: float = math.inf) -> dict[str, str]:
    """Run all checks; {name: "ok", what is wrong, or "not run" after so many seconds}."""
    end = time.monotonic() + seconds
    torch.backends.cudnn.allow_tf32 = False  # the reference in float32
    count_launches()
    results = {}
    for name, check in (*training_checks(device, small), *layer_checks(device, small)):
        if time.monotonic() > end:
            results[name] = "not run"
            continue
        try:
            check()
            results[name] = "ok"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            results[name] = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        if not quiet or results[name] != "ok":
            print(f"{results[name][:300]:8} {name}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        stand_in.for_a_gpu()
    results = run(arguments.device, arguments.device == "cpu", arguments.quiet)
    wrong = sum(result not in ("ok", "not run") for result in results.values())
    print(f"{len(results)} checks, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
