"""The figures that the project set itself, and what the results say about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import cold_start, quantizers, step
from benchmarks._harness import ratio

COPY = "copy of as many bytes"


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Args:
        source: the benchmark that it is read from.
        limit: the figure; reached where the value is at most this, or at least where `at_least`.
        value: finds it in the results; None where they lack it.
    """

    what: str
    source: str
    limit: float
    value: Callable[[dict[str, Any]], float | None]
    unit: str = "x"
    at_least: bool = False
    detail: Callable[[dict[str, Any]], str] = lambda data: ""

    def row(self, data: dict[str, Any] | None) -> list[str]:
        """What, limit, value, verdict."""
        found = self.value(data) if data is not None else None
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}"
        if found is None or data is None:
            return [self.what, bound, "not measured", ""]
        reached = found >= self.limit if self.at_least else found <= self.limit
        detail = self.detail(data)
        return [
            self.what,
            bound,
            f"{found:.2f} {self.unit}" + (f" ({detail})" if detail else ""),
            "yes" if reached else "no",
        ]


def _of_copy(key: str) -> Callable[[dict[str, Any]], float | None]:
    def value(data: dict[str, Any]) -> float | None:
        operation = data["operations"].get(key)
        if operation is None:
            return None
        found = ratio(operation["sizes"][quantizers.headline(operation["sizes"])], "ours", COPY)
        return found.median if found else None

    return value


def _quantizer_peer(data: dict[str, Any]) -> float | None:
    found = quantizers.fastest_four_bit_peer(data)
    return min(times for _, times in found.values()) if found else None


def _quantizer_peers(data: dict[str, Any]) -> str:
    found = quantizers.fastest_four_bit_peer(data)
    return "; ".join(f"{key}: {peer} {times:.1f}" for key, (peer, times) in found.items())


def _step(network: str, base: str) -> Callable[[dict[str, Any]], float | None]:
    def value(data: dict[str, Any]) -> float | None:
        found = data["networks"].get(network)
        relative = ratio(found["times"], "ours ibm2020", base) if found else None
        return relative.median if relative else None

    return value


def _step_peer(data: dict[str, Any]) -> dict[str, tuple[str, float]]:
    found = {}
    for network in data["networks"].values():
        peer = step.fastest_peer(network)
        relative = ratio(network["times"], peer, "ours ibm2020") if peer else None
        if peer and relative:
            found[network["title"]] = peer, relative.median
    return found


def _least_step_peer(data: dict[str, Any]) -> float | None:
    found = _step_peer(data)
    return min(times for _, times in found.values()) if found else None


def _step_peers(data: dict[str, Any]) -> str:
    return "; ".join(f"{title}: {peer} {times:.1f}" for title, (peer, times) in _step_peer(data).items())


def _saved(data: dict[str, Any]) -> float | None:
    shares = [share for _, share in _saved_shares(data)]
    return max(shares) if shares else None


def _saved_shares(data: dict[str, Any]) -> list[tuple[str, float]]:
    found = []
    for network in data["networks"].values():
        saved, base = network["saved_bytes"], network["base"]
        ours = saved.get("ours ibm2020", {}).get("activations")
        of = saved.get(base, {}).get("activations")
        if ours and of:
            found.append((network["title"], ours / of))
    return found


def _saved_list(data: dict[str, Any]) -> str:
    return "; ".join(f"{title} {share:.3f}" for title, share in _saved_shares(data))


def _import_s(data: dict[str, Any]) -> float | None:
    found = cold_start.import_cost(data)
    return None if found is None else found[0]


def _import_detail(data: dict[str, Any]) -> str:
    found = cold_start.import_cost(data)
    return "" if found is None else f"and {found[1]:.2f} s at the first use of convert"


_STEPS = (
    ("resnet20", "ResNet-20", "fp32 channels_last", 0.55, 1.0),
    ("resnet18", "ResNet-18", "fp32 channels_last", 0.55, 1.0),
    ("mlp", "MLP", "fp32", 0.65, 1.05),
    ("gpt", "GPT", "fp32", 0.65, 1.05),
)

TARGETS = (
    Target("both gradient phases + amax, time over a copy of the same bytes", "quantizers", 1.4, _of_copy("pair")),
    Target("PACT + pack + mask, time over a copy of the same bytes", "quantizers", 1.5, _of_copy("pact")),
    Target("SAWB + pack, time over a copy of the same bytes", "quantizers", 1.5, _of_copy("sawb")),
    Target(
        "fastest other library quantizing the same tensor to a 4-bit format, time over ours",
        "quantizers",
        20,
        _quantizer_peer,
        at_least=True,
        detail=_quantizer_peers,
    ),
    *(
        Target(f"{title} step, of {other}", "step", limit, _step(network, other))
        for network, title, base, of_base, of_bf16 in _STEPS
        for other, limit in ((base, of_base), ("bf16 autocast", of_bf16))
    ),
    Target(
        "fastest other library that quantizes forward and backward, time over ours",
        "step",
        4,
        _least_step_peer,
        at_least=True,
        detail=_step_peers,
    ),
    Target("activations saved for backward by 4-bit layers, of FP32", "step", 0.17, _saved, detail=_saved_list),
    Target("import fourbit over import torch", "cold_start", 0.15, _import_s, "s", detail=_import_detail),
    Target("first training step from a cold start, over FP32's", "cold_start", 2.0, cold_start.first_step_cost, "s"),
)
