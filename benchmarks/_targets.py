"""The figures that the project set itself, and what the results say about each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def _step(network: str, way: str, base: str | None) -> Callable[[dict[str, Any]], float | None]:
    """Time of a way over that of another; None: FP32 in the layout that is the network's base."""

    def value(data: dict[str, Any]) -> float | None:
        found = data["networks"].get(network)
        relative = ratio(found["times"], way, base or found["base"]) if found else None
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


_TITLES = {
    "resnet20": "ResNet-20",
    "resnet18": "ResNet-18",
    "mobilenet_v2": "MobileNetV2",
    "mlp": "MLP",
    "gpt": "GPT",
    "lstm": "LSTM",
}
_AVX512 = {
    # of FP32, and of bf16 autocast
    ("resnet20", "ResNet-20", "ours ibm2020"): (0.58, 0.90),
    ("resnet18", "ResNet-18", "ours ibm2020"): (0.50, 0.90),
    ("mobilenet_v2", "MobileNetV2", "ours ibm2020"): (0.80, 0.85),
    ("mlp", "MLP", "ours ibm2020"): (0.52, 1.0),
    ("mlp", "MLP", "ours luq"): (0.45, 0.9),
    ("gpt", "GPT", "ours ibm2020"): (0.58, 0.95),
    ("gpt", "GPT", "ours luq"): (0.45, None),
    ("lstm", "LSTM", "ours ibm2020"): (0.60, None),
    **{(network, title, "ours int4-fwd"): (0.85, None) for network, title in _TITLES.items()},
    ("gpt", "GPT", "ours nvfp4"): (0.90, None),
}
_AVX2 = {
    ("resnet20", "ResNet-20", "ours ibm2020"): (0.72, None),
    ("resnet18", "ResNet-18", "ours ibm2020"): (0.55, None),
    ("mobilenet_v2", "MobileNetV2", "ours ibm2020"): (0.95, None),
    ("mlp", "MLP", "ours ibm2020"): (0.70, None),
    ("mlp", "MLP", "ours luq"): (0.60, None),
    ("gpt", "GPT", "ours ibm2020"): (0.70, None),
    ("gpt", "GPT", "ours luq"): (0.60, None),
    ("lstm", "LSTM", "ours ibm2020"): (0.75, None),
    **{(network, title, "ours int4-fwd"): (1.0, None) for network, title in _TITLES.items()},
    ("gpt", "GPT", "ours nvfp4"): (1.15, None),
}


def _steps(limits: Mapping[tuple[str, str, str], tuple[float, float | None]]) -> tuple[Target, ...]:
    found = []
    for (network, title, way), (of_fp32, of_bf16) in limits.items():
        recipe = way.removeprefix("ours ")
        found.append(Target(f"{title} step, {recipe}, of FP32", "step", of_fp32, _step(network, way, None)))
        if of_bf16 is not None:
            of = _step(network, way, "bf16 autocast")
            found.append(Target(f"{title} step, {recipe}, of bf16 autocast", "step", of_bf16, of))
    return tuple(found)


def _passes(of_copy: float, luq: float) -> tuple[Target, ...]:
    blocks = (("", "to nearest, packed", 1.6), ("-rht", "rotated, packed", 2.2), ("-sr", "stochastic", 3.0))
    return (
        *(
            Target(f"{what}, time over a copy of the same bytes", "quantizers", of_copy, _of_copy(key))
            for what, key in (
                ("both gradient phases + amax", "pair"),
                ("PACT + pack + mask", "pact"),
                ("SAWB + pack", "sawb"),
            )
        ),
        Target("LUQ, time over a copy of the same bytes", "quantizers", luq, _of_copy("luq")),
        *(
            Target(
                f"{name.upper()} {what}, time over a copy of the same bytes", "quantizers", limit, _of_copy(name + end)
            )
            for name in ("mxfp4", "nvfp4")
            for end, what, limit in blocks
        ),
    )


TARGETS = {
    "": (
        Target(
            "fastest other library quantizing the same tensor to a 4-bit format, time over ours",
            "quantizers",
            20,
            _quantizer_peer,
            at_least=True,
            detail=_quantizer_peers,
        ),
        *_passes(1.2, 2.5),
        *_steps(_AVX512),
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
        Target(
            "first training step from a cold start, over FP32's", "cold_start", 2.0, cold_start.first_step_cost, "s"
        ),
    ),
    "avx2": (*_passes(1.3, 3.0), *_steps(_AVX2)),
}
"""By instruction set; "": AVX-512 with VNNI and BF16."""
