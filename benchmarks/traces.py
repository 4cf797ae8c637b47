"""Bit-exact traces of short training runs: what a change of the code must reproduce, or say why not.

    python -m benchmarks.traces --record before.json     # with the code as it was
    python -m benchmarks.traces --compare before.json    # with the code as it is: prints what differs, exit code 1

A trace has, for each training step, the loss, a digest of every gradient, and the bytes that autograd keeps. Float sums
depend on the processor, so both runs belong on one machine. Every instruction set of the kernels runs in a process of its
own (`FOURBIT_CPU_ISA`), and once more without kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends

NO_KERNELS = "reference"
INSTRUCTION_SETS = (NO_KERNELS, "portable", "avx2", "avx512", "avx512_vnni", "dot_product")
MOST = (
    "ibm2020",
    "ibm2020-dw8",
    "ibm2020-no-tpr",
    "ibm2020-channel-gradscale",
    "ibm2020-zerosum",
    "luq",
    "luq-smp2",
    "int4-fwd",
)
MAIN = ("ibm2020", "luq", "int4-fwd")
BLOCKS = (
    "nvfp4",
    "nvfp4-4over6",
    "mxfp4-rht-sr",
    "quartet",
    "tetrajet2",
    "ufp4",
    "mxfp8",
    "fp8-rowwise",
    "int4-lss",
    "int4-qat",
    "fourbit",
)
STEPS = 4

Make = Callable[[], tuple[nn.Module, tuple[int, ...]]]
Trace = list[dict[str, Any]]


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]):
        super().__init__()
        self.cells = kind(12, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


def _images(*layers: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*layers), (4, 8, 9, 9)


CASES: dict[str, tuple[Make, tuple[str, ...], dict[str, Any]]] = {
    # what it is: the network and the shape of its input, recipes, options of `convert`
    "CNN": (lambda: (fb.models.build("resnet20", num_classes=10), (4, 3, 16, 16)), MOST, {}),
    "CNN, not fused": (lambda: (fb.models.build("resnet20", num_classes=10), (4, 3, 16, 16)), MAIN, {"fuse": False}),
    "linear": (
        lambda: (
            nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 33), nn.GELU(), nn.Linear(33, 5)),
            (3, 7, 24),
        ),
        MOST,
        {},
    ),
    "linear, in blocks": (
        lambda: (
            nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64)),
            (4, 16, 64),
        ),
        BLOCKS,
        {},
    ),
    "images in blocks": (
        lambda: (
            nn.Sequential(
                *(layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU()))
            ),
            (16, 64, 8, 8),
        ),
        ("nvfp4", "mxfp4-rht-sr"),
        {},
    ),
    "LSTM, in blocks": (lambda: (_Recurrent(nn.LSTM), (3, 6, 12)), ("nvfp4",), {}),
    "LSTM": (lambda: (_Recurrent(nn.LSTM), (3, 6, 12)), MAIN, {}),
    "GRU": (lambda: (_Recurrent(nn.GRU), (3, 6, 12)), MAIN, {}),
    "attention": (
        lambda: (nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), (2, 9, 32)),
        (*MAIN, "ibm2020-attention"),
        {},
    ),
    "grouped and transposed": (
        lambda: _images(
            nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, groups=4), nn.ConvTranspose2d(16, 8, 3, 2), nn.Conv2d(8, 4, 1)
        ),
        MAIN,
        {},
    ),
    "strided": (
        lambda: _images(
            nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 1, 2)
        ),
        MAIN,
        {},
    ),
}
COMPILED = "linear, compiled"


def trace(case: str, recipe: str) -> Trace:
    """Losses, digests of gradients and saved bytes of the first steps."""
    make, _, options = CASES["linear" if case == COMPILED else case]
    torch.manual_seed(0)
    model, shape = make()
    model = fb.convert(model, recipe, **options)
    run = torch.compile(model, backend="aot_eager") if case == COMPILED else model
    optimizer = torch.optim.SGD(fb.param_groups(model, 1e-4), lr=0.05, momentum=0.9)
    x = torch.randn(shape)
    found: Trace = []
    for _ in range(STEPS):
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = run(x).square().mean()
        saved = sum(t.untyped_storage().nbytes() for t in kept.values())
        kept.clear()
        optimizer.zero_grad()
        loss.backward()
        gradients = {n: digest(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.item().hex(), "saved_bytes": saved, "gradients": gradients})
        optimizer.step()
    return found


def digest(t: Tensor) -> str:
    """A short name for the bits of a tensor."""
    return hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def traces() -> dict[str, Trace]:
    """All of them, with the kernels of this process."""
    torch.set_num_threads(1)
    cases = [(case, recipe) for case, (_, recipes, _) in CASES.items() for recipe in recipes]
    cases += [(COMPILED, recipe) for recipe in MAIN]
    return {f"{case} | {recipe}": trace(case, recipe) for case, recipe in cases}


def differences(before: dict[str, Trace], after: dict[str, Trace]) -> Iterator[str]:
    """What differs, one line for each trace: the first step, and what in it."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name}: only {'before' if name in before else 'after'}"
            continue
        for step, (a, b) in enumerate(zip(before[name], after[name], strict=True)):
            what = [key for key in ("loss", "saved_bytes") if a[key] != b[key]]
            both = a["gradients"].keys() | b["gradients"].keys()
            what += [f"d {n}" for n in sorted(both) if a["gradients"].get(n) != b["gradients"].get(n)]
            if what:
                yield f"{name}: step {step}: {', '.join(what[:6])}{' ...' if len(what) > 6 else ''}"
                break


def _in_process(isa: str) -> dict[str, Trace] | None:
    """The traces with one instruction set; None where this processor or this build has it not."""
    environment = os.environ | ({} if isa == NO_KERNELS else {"FOURBIT_CPU_ISA": isa})
    command = [sys.executable, "-m", "benchmarks.traces", "--this-process", isa]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        print(f"{isa}: left out: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Command line; returns its exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, help="the file to write")
    what.add_argument("--compare", type=Path, help="a file written before, on this machine")
    what.add_argument("--this-process", help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if arguments.this_process:
        if arguments.this_process == NO_KERNELS:
            with backends.without():
                print(json.dumps(traces()))
        else:
            print(json.dumps(traces()))
        return 0
    found = {isa: t for isa in INSTRUCTION_SETS if (t := _in_process(isa)) is not None}
    if arguments.record:
        arguments.record.write_text(json.dumps(found))
        print(f"{sum(map(len, found.values()))} traces on {', '.join(found)}: {arguments.record}")
        return 0
    before = json.loads(arguments.compare.read_text())
    lines = [f"{isa} | {line}" for isa in found for line in differences(before.get(isa, {}), found[isa])]
    print("\n".join(lines) or f"{sum(map(len, found.values()))} traces on {', '.join(found)}: every bit the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
