"""Wrong and odd arguments for every kernel: each call ends in a clean error, is declined, or gives what the reference gives.

    python fuzz_arguments.py CALLS SEED

Run by test_kernel_arguments.py, and under AddressSanitizer, which ends the process at the first access beyond a tensor, by
test_kernel_sanitizers.py.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from fuzz_cases import CASES, cells, moments, products, rounding, sequences, unpacking
from fuzz_stand_in import standing_in
from fuzz_values import CLEAN, SPECS, Fuzz, same
from instruction_sets import instruction_set, isas
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends
from fourbit.quantizers import ClipValue, quantize
from fourbit.recipes import catalog


def call_kernel(f: Fuzz) -> tuple[str, str]:
    """One registered kernel, called directly."""
    case = f.one(*CASES)
    f.for_kernels = case in (rounding, unpacking, moments, cells)
    operation, arguments, check = case(f)
    kernel = next(k for k in backends.kernels() if (k.operation, k.backend) == (operation, "cpu"))
    with standing_in() if case in (products, sequences) else contextlib.nullcontext(False) as zeros:
        try:
            found = kernel(*arguments)
        except CLEAN:
            return operation, "refused"
    if found is None:
        return operation, "declined"
    if zeros:
        return operation, "given its arguments"
    check(found)
    return operation, "right"


def call_quantize(f: Fuzz) -> tuple[str, str]:
    """fourbit.quantize with kernels and without."""
    x, spec = f.tensor(f.shape(f.one(0, 1, 2, 4)), f.one(torch.float32, torch.bfloat16, torch.float16)), f.one(*SPECS)
    stored = torch.tensor(1.4) if isinstance(spec.scaling, ClipValue) else None
    axis = f.one(0, 1, -1)

    def once() -> Tensor | None:
        try:
            return quantize(x, spec, sums=axis, stored=stored, key=7).q
        except CLEAN:
            return None

    return "quantize", compare(once)


def compare(once: Callable[[], Any]) -> str:
    """With kernels and without: the same, or refused by both."""
    found = once()
    with backends.without():
        expected = once()
    assert (found is None) == (expected is None), (found, expected)
    if found is None:
        return "refused"
    for one, other in zip(*((t,) if isinstance(t, Tensor) else t for t in (found, expected)), strict=True):
        same(one, other, 0.25)  # a sum in another order may fall to another number of the grid
    return "right"


LAYERS: tuple[tuple[Callable[..., nn.Module], tuple[int, ...]], ...] = (
    (lambda **k: fb.nn.Linear(6, 4, **k), (5, 6)),
    (lambda **k: fb.nn.Linear(16, 16, **k), (2, 3, 16)),
    (lambda **k: fb.nn.Conv2d(4, 16, 3, padding=1, **k), (2, 4, 5, 5)),
    (lambda **k: fb.nn.Conv2d(3, 5, 1, stride=2, **k), (2, 3, 6, 6)),
    (lambda **k: fb.nn.Conv2d(4, 4, 2, groups=2, **k), (1, 4, 5, 4)),
    (lambda **k: fb.nn.Conv1d(3, 4, 3, **k), (2, 3, 5)),
    (lambda **k: fb.nn.LSTM(5, 7, **k), (4, 3, 5)),
    (lambda **k: fb.nn.GRU(5, 7, **k), (4, 3, 5)),
)


def call_layer(f: Fuzz) -> tuple[str, str]:
    """A layer's forward and backward pass with kernels and without."""
    make, shape = f.one(*LAYERS)
    spec = f.one(catalog.TPR, catalog.LUQ.rules[-1].spec, catalog.IBM2020.rules[0].spec)
    x = f.tensor(shape)
    odd_gradient, seed = f.random.random() < 0.3, f.random.randrange(10**6)

    def once() -> tuple[Tensor, ...] | None:
        torch.manual_seed(seed)
        again = Fuzz(seed)
        layer = make(spec=spec)
        try:
            given = x.detach().requires_grad_()
            y = layer(given)
            y = y[0] if isinstance(y, tuple) else y
            g = again.tensor(tuple(y.shape), odd=1.0) if odd_gradient else torch.randn_like(y)
            y.backward(g)
        except CLEAN:
            return None
        return (y.detach(), *(t.grad for t in (given, *layer.parameters()) if t.grad is not None))

    return type(make(spec=spec)).__name__, compare(once)


def main(calls: int, seed: int) -> None:
    """Prints how many calls of each kind there were, and how they ended."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    counts: Counter[tuple[str, str]] = Counter()
    for i in range(calls):
        f = Fuzz(seed + i)
        share = f.random.random()
        call = call_layer if share < 0.02 else call_quantize if share < 0.2 else call_kernel
        try:
            with instruction_set(f.one(*isas())):
                counts[call(f)] += 1
        except BaseException:
            print(f"again: python fuzz_arguments.py 1 {seed + i} ({call.__name__})", file=sys.stderr)
            raise
    for (what, end), count in sorted(counts.items()):
        print(f"{what} {end} {count}")
    print(f"calls {sum(counts.values())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
