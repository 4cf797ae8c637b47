"""What `explain` finds: layers and their products, calls outside them, weights, and the shares of each precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fourbit.ops import LayerSpec, ProductSize
from fourbit.quantizers import QuantSpec

GEMMS = {"fprop": ("x_fprop", "w_fprop"), "dgrad": ("g_dgrad", "w_dgrad"), "wgrad": ("g_wgrad", "x_wgrad")}
"""The three GEMMs and their operand slots."""


class Use(NamedTuple):
    """A product of one call, and which of its gradients are computed: of x (dgrad), of w (wgrad)."""

    size: ProductSize
    dgrad: bool
    wgrad: bool


@dataclass(frozen=True)
class LayerExplanation:
    """One layer: its rule, its spec, and the products of its fprop for the given input (None without an input, or where the
    layer did not run).

    `sizes`: of every call. `state`: the layer's exponent of GradScale and clip values, in words; empty for a layer that is not
    converted. `width`: bits of a number that is not quantized, as the model has it. `weights`: names of what it multiplies its
    inputs by, as in `Explanation.matrices`; empty for a product of two activations.
    """

    name: str
    type: str
    rule: str
    spec: LayerSpec | None
    note: str
    sizes: tuple[Use, ...] | None
    state: str = ""
    width: int = 32
    weights: tuple[str, ...] = ()

    @property
    def num_macs(self) -> Mapping[str, int] | None:
        """Multiply-accumulates per GEMM; None without an input."""
        return None if self.sizes is None else macs_of(self.sizes)

    def operand(self, slot: str) -> str:
        """Format and scale of a slot, in words."""
        if self.spec is None:
            return "full precision"
        value = getattr(self.spec, slot)
        resolved = self.spec.resolved(slot)
        if resolved is None:
            return "full precision"
        return f"{resolved.format.name} (reused)" if not isinstance(value, QuantSpec) else str(resolved)

    def precision(self, gemm: str) -> str:
        """Formats of the two operands of a GEMM, e.g. "fp4_r4_even x int4_sym"."""
        names = []
        for slot in GEMMS[gemm]:
            resolved = self.spec.resolved(slot) if self.spec else None
            names.append(resolved.format.name if resolved else "full")
        return " x ".join(names)

    def bits(self, gemm: str) -> str:
        """Widths of the two operands, wider first, e.g. "8 x 4"; `width` for full precision."""
        widths = []
        for slot in GEMMS[gemm]:
            resolved = self.spec.resolved(slot) if self.spec else None
            widths.append(resolved.format.bits if resolved else self.width)
        return " x ".join(str(b) for b in sorted(widths, reverse=True))


@dataclass(frozen=True)
class CallExplanation:
    """Products outside the layers: those of one operation in one module.

    Args:
        name: of the module in whose forward it runs; "" for the model itself.
        type: class of the module.
        operation: torch's name of it.
        reason: why it is no layer's.
        sizes: of every call.
        width: bits of the wider operand.
        weights: names of the parameters in it, those with two or more axes.
    """

    name: str
    type: str
    operation: str
    reason: str
    sizes: tuple[Use, ...]
    width: int
    weights: tuple[str, ...] = ()

    @property
    def num_macs(self) -> Mapping[str, int]:
        """Multiply-accumulates per GEMM. Of a product of two activations, dgrad and wgrad are its two gradients."""
        return macs_of(self.sizes)

    def precision(self, gemm: str) -> str:
        """As of a layer that is not quantized."""
        return "full x full"

    def bits(self, gemm: str) -> str:
        """Likewise."""
        return f"{self.width} x {self.width}"


def macs_of(uses: Iterable[Use]) -> dict[str, int]:
    """Multiply-accumulates per GEMM."""
    macs = dict.fromkeys(GEMMS, 0)
    for size, dgrad, wgrad in uses:
        for gemm, needed in zip(GEMMS, (True, dgrad, wgrad), strict=True):
            macs[gemm] += size.macs * needed
    return macs
