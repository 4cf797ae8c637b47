"""What `explain` finds: layers and their products, calls outside them, weights, and the shares of each precision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fourbit.ops import LayerSpec, ProductSize
from fourbit.quantizers import QuantSpec
from fourbit.recipes._chains import ChainExplanation
from fourbit.recipes._rule import Recipe
from fourbit.recipes._weights import MatrixExplanation

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


@dataclass(frozen=True)
class Explanation:
    """What a recipe does to a model. `print` it, or read its fields, `shares` and `weight_shares`.

    Args:
        layers: what rules are about, and layers that cannot be converted.
        products: how the backends may multiply, as the model was converted; None for a model that is not.
        calls: all other products of the forward pass: of activations, or of parameters that are no layer's. Empty without an
            input.
        matrices: parameters with two or more axes, but for those of embeddings and normalizations: of the layers, and of
            other modules. With an input, of the latter only what is multiplied, or does not run.
        uncounted: operators of other libraries that take parameters, "module: operator": what they multiply is not known.
        find_chains: finds `chains`.
    """

    recipe: Recipe
    layers: tuple[LayerExplanation, ...]
    products: str | None = None
    calls: tuple[CallExplanation, ...] = ()
    matrices: tuple[MatrixExplanation, ...] = ()
    uncounted: tuple[str, ...] = ()
    find_chains: Callable[[], tuple[ChainExplanation, ...]] = tuple

    @cached_property
    def chains(self) -> tuple[ChainExplanation, ...]:
        """Convolutions, batch normalizations and what follows them, that are computed at once in training, and those that are
        not, with the reason. Empty without an input. A copy of the model takes two training steps when first asked."""
        return self.find_chains()

    @property
    def num_macs(self) -> int:
        """Multiply-accumulates of one training step: all GEMMs of all layers, and of the calls outside them."""
        return sum(sum(part.num_macs.values()) for part in (*self.layers, *self.calls) if part.num_macs)

    def shares(self, by: str = "bits") -> dict[str, float]:
        """Share of `num_macs`, the whole training step, by operand width ("bits") or format ("precision"), largest first."""
        totals: dict[str, int] = defaultdict(int)
        for part in (*self.layers, *self.calls):
            for gemm, macs in (part.num_macs or {}).items():
                totals[getattr(part, by)(gemm)] += macs
        return _shares(totals)

    def weight_shares(self) -> dict[str, float]:
        """Share of the numbers in `matrices` by their bits in fprop ("4", "16", "32"), largest first."""
        totals: dict[str, int] = defaultdict(int)
        for matrix in self.matrices:
            totals[str(matrix.bits)] += matrix.numel
        return _shares(totals)

    def __str__(self) -> str:
        from fourbit.recipes._explain_text import lines_of

        return "\n".join(lines_of(self))


def _shares(totals: Mapping[str, int]) -> dict[str, float]:
    whole = sum(totals.values())
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return {key: value / whole for key, value in ranked if value} if whole else {}
