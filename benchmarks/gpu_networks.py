"""Steps of whole networks on a GPU, in alternating turns, with memory and a profile. See gpu_check.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from gpu_speed import DEVICE, Row
from torch import Tensor, nn

import fourbit as fb
from fourbit import models
from fourbit.recipes import catalog


class Block(nn.Module):
    """Attention and MLP with residuals, normalised before."""

    def __init__(self, width: int, heads: int = 32):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _stack(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return nn.Sequential(*(Block(width) for _ in range(layers)))


def _step(
    model: nn.Module, x: Tensor, loss_of: Callable[[Tensor], Tensor], autocast: bool = True
) -> Callable[[], float]:
    optimizer = torch.optim.SGD(fb.param_groups(model, 1e-4), lr=1e-3, momentum=0.9)

    def step() -> float:
        """Bytes kept for backward."""
        with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
            before = torch.cuda.memory_allocated()
            loss = loss_of(model(x))
            kept = torch.cuda.memory_allocated() - before
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return kept

    return step


def _compare(steps: dict[str, Callable[[], float]], turns: int = 7) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    kept, peak = {}, {}
    for turn in range(turns + 3):
        for name, step in steps.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            start = time.perf_counter()
            kept[name] = step()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
            peak[name] = torch.cuda.max_memory_allocated() - base
    first = statistics.median(times[next(iter(steps))])
    return [
        {
            "what": name,
            "ms": statistics.median(values) * 1e3,
            "ratio": statistics.median(values) / first,
            "kept for backward MiB": kept[name] / 2**20,
            "peak of a step MiB": peak[name] / 2**20,
        }
        for name, values in times.items()
    ]


def _profile(step: Callable[[], float], top: int = 12) -> list[Row]:
    """Where the time of a step goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        {
            "kernel": e.key[:90],
            "calls": e.count,
            "ms": e.self_device_time_total / 1e3,
            "share": e.self_device_time_total / total,
        }
        for e in events[:top]
    ]


def transformer(width: int = 4096, layers: int = 4, tokens: int = 1024) -> list[Row]:
    """A stack of blocks on eight sequences, against bfloat16."""
    x = torch.randn(8, tokens, width, device=DEVICE)
    everywhere = fb.Recipe("4-bit", (fb.Rule(catalog.TPR),))
    contestants = {
        "bf16 autocast": _stack(width, layers),
        "fp32 weights, 4-bit everywhere": fb.convert(_stack(width, layers), everywhere),
        "ibm2020 (first and last FP16)": fb.convert(_stack(width, layers), "ibm2020"),
    }
    steps = {name: _step(model, x, lambda y: y.float().square().mean()) for name, model in contestants.items()}
    half = _stack(width, layers).to(torch.bfloat16)
    steps["bf16 weights"] = _step(half, x.to(torch.bfloat16), lambda y: y.float().square().mean(), autocast=False)
    rows = _compare(steps)
    return rows + _profile(steps["fp32 weights, 4-bit everywhere"])


def resnet50(batch: int = 128, size: int = 224) -> list[Row]:
    """ResNet-50 in channels_last against bfloat16 autocast."""
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    label = torch.randint(0, 1000, (batch,), device=DEVICE)

    def network(recipe: str | None) -> nn.Module:
        torch.manual_seed(0)
        model = (
            models.build("resnet50", num_classes=1000, image_size=size).to(DEVICE).to(memory_format=torch.channels_last)
        )
        return fb.convert(model, recipe) if recipe else model

    torch.backends.cudnn.benchmark = True
    steps = {
        name: _step(network(recipe), x, lambda y: F.cross_entropy(y.float(), label))
        for name, recipe in (("bf16 autocast", None), ("ibm2020", "ibm2020"))
    }
    return _compare(steps, 5) + _profile(steps["ibm2020"])
