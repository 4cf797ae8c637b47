"""An `Explanation`: what `explain` finds, the shares of each precision, and all of it as text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from fourbit import backends
from fourbit.ops import SLOTS, LayerSpec
from fourbit.recipes._chains import ChainExplanation
from fourbit.recipes._explained import CallExplanation, LayerExplanation
from fourbit.recipes._kernels import KernelExplanation
from fourbit.recipes._rule import Recipe
from fourbit.recipes._weights import MatrixExplanation


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
        uncounted: operators of other libraries that take parameters, "module: operator": what they multiply is not known; or
            why nothing was counted, where a model does not run on its `dummy_inputs`.
        find_chains, find_kernels: find `chains` and `kernels`.
    """

    recipe: Recipe
    layers: tuple[LayerExplanation, ...]
    products: str | None = None
    calls: tuple[CallExplanation, ...] = ()
    matrices: tuple[MatrixExplanation, ...] = ()
    uncounted: tuple[str, ...] = ()
    find_chains: Callable[[], tuple[ChainExplanation, ...]] = tuple
    find_kernels: Callable[[], tuple[KernelExplanation, ...]] = tuple

    @cached_property
    def chains(self) -> tuple[ChainExplanation, ...]:
        """Convolutions, batch normalizations and what follows them, that are computed at once in training, and those that are
        not, with the reason. Empty without an input. A copy of the model takes two training steps when first asked."""
        return self.find_chains()

    @cached_property
    def kernels(self) -> tuple[KernelExplanation, ...]:
        """Which operations of each layer kernels do in training, forward and backward, and why the others do not; what a
        fused chain does between layers is not among them. Empty without an input. As for `chains`, a copy takes two steps."""
        return self.find_kernels()

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
        return "\n".join(lines_of(self))


def _shares(totals: Mapping[str, int]) -> dict[str, float]:
    whole = sum(totals.values())
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return {key: value / whole for key, value in ranked if value} if whole else {}


FAST = (
    "where the platform's library rounds the results of a product to bfloat16 (some gradients of convolutions, on a CPU also "
    "products with FP8 gradients), that is accepted, a relative error of at most 2^-8 per result; on a GPU also float16 (2^-12)"
)
EXACT = "every result is rounded once, to the output format"

_ALIKE = 4
"""So many entries that differ in the numbers of their names alone are one line."""

E = TypeVar("E", "LayerExplanation", "CallExplanation", "MatrixExplanation", "KernelExplanation")


def lines_of(explanation: Explanation) -> list[str]:
    """The recipe, its layers, what is outside them, shares, and how the products are computed."""
    recipe = explanation.recipe
    lines = [f"recipe {recipe.name}: {recipe.summary}"]
    if recipe.source:
        lines.append(f"source: {recipe.source}")
    lines += [str(each) for each in (*recipe.phases, *recipe.upkeep)]
    groups: dict[tuple[str, LayerSpec | None, str], list[LayerExplanation]] = defaultdict(list)
    for layer in explanation.layers:
        groups[layer.rule, layer.spec, layer.note].append(layer)
    whole = explanation.num_macs
    for (rule, spec, note), layers in groups.items():
        lines += ["", f"{rule}{f' ({note})' if note else ''}: {_count(layers, 'layer')}"]
        if spec is None:
            lines.append("    full precision")
        else:
            lines += [f"    {slot:8} {layers[0].operand(slot)}" for slot in SLOTS]
            if spec.accumulation is not None:
                lines.append(f"    sums     {spec.accumulation}")
            lines.append(f"    output   {spec.output.name if spec.output else 'float32'}")
        alike = _alike(layers, lambda layer: (layer.type, layer.sizes, layer.state))
        lines += _table(
            (name, layer.type, _macs(layer.num_macs, number, whole), layer.state) for name, layer, number in alike
        )
    lines += _outside(explanation)
    idle = [name for name, _, _ in _alike([layer for layer in explanation.layers if whole and layer.num_macs is None])]
    if idle:
        lines += ["", f"MACs not counted, and not part of the shares: {', '.join(idle)}"]
    if explanation.uncounted:
        lines += ["", f"products not known, and not part of the shares: {', '.join(explanation.uncounted)}"]
    if whole:
        lines += ["", f"MACs of a training step: {_si(whole)}, by operand bits:"]
        lines += [f"  {key:8} {share:7.2%}" for key, share in explanation.shares("bits").items()]
        lines.append("by format:")
        lines += [f"  {key:28} {share:7.2%}" for key, share in explanation.shares("precision").items()]
    lines += _weights(explanation)
    lines += _chains(explanation)
    return [*lines, "", *_execution(explanation)]


def _outside(explanation: Explanation) -> list[str]:
    """Products that are no layer's, by operation and reason."""
    calls, whole = explanation.calls, explanation.num_macs
    if not calls or not whole:
        return []
    total = sum(sum(call.num_macs.values()) for call in calls)
    lines = ["", f"outside all rules: {_count(calls, 'call')}, {total / whole:.1%} of the MACs", "    full precision"]
    rows = []
    for name, call, number in _alike(calls, lambda c: (c.type, c.operation, _pattern(c.reason), c.sizes)):
        reason = _pattern(call.reason) if number > 1 else call.reason
        rows.append((name or "the model", call.operation, _macs(call.num_macs, number, whole), reason))
    return lines + _table(rows)


def _weights(explanation: Explanation) -> list[str]:
    """Shares of the weights, and the names of those that no rule is about."""
    if not explanation.matrices:
        return []
    total = sum(matrix.numel for matrix in explanation.matrices)
    shares = ", ".join(f"{share:.2%} in {bits} bits" for bits, share in explanation.weight_shares().items())
    lines = ["", f"matrix weights, without embeddings: {_si(total)}, {shares}"]
    outside = [matrix for matrix in explanation.matrices if matrix.reason]
    if outside:
        lines.append("of them under no rule:")
        alike = _alike(outside, lambda m: (m.numel, m.reason))
        lines += _table((name, f"{m.numel * n / total:.1%}", m.reason) for name, m, n in alike)
    return lines


def kernel_lines(explanation: Explanation) -> list[str]:
    """Kernels by layer: what they do, and in a sentence why the reference does the rest."""
    lines = ["kernels in a training step, by layer:"]
    for name, entry, _ in _alike(explanation.kernels, lambda k: (k.taken, k.declined)):
        lines.append(f"  {name or 'not known'}: {', '.join(entry.taken) or 'none'}")
        lines += [f"    not {why}" for why in entry.declined]
    return lines if explanation.kernels else [*lines, "  no layer in low precision"]


def _alike(entries: Iterable[E], key: Callable[[E], Hashable] = lambda entry: None) -> list[tuple[str, E, int]]:
    """Name, first entry and number of those that differ in the numbers of their names alone, where they are many."""
    groups: dict[Hashable, list[E]] = defaultdict(list)
    for entry in entries:
        groups[_pattern(entry.name), key(entry)].append(entry)
    found = []
    for group in groups.values():
        if len(group) < _ALIKE:
            found += [(entry.name, entry, 1) for entry in group]
        else:
            found.append((f"{_pattern(group[0].name)} ({len(group)})", group[0], len(group)))
    return found


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """All columns but the last aligned."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True) if w).rstrip() for row in cells]


def _macs(macs: Mapping[str, int] | None, number: int, whole: int) -> str:
    if not macs or not whole:
        return ""
    per_gemm = ", ".join(f"{gemm} {_si(n * number)}" for gemm, n in macs.items())
    return f"{per_gemm} MACs ({sum(macs.values()) * number / whole:.1%})"


def _count(entries: Iterable[object], what: str) -> str:
    number = len(list(entries))
    return f"{number} {what}{'s' if number > 1 else ''}"


def _chains(explanation: Explanation) -> list[str]:
    """Which chains are fused in training, which are not, and why."""
    chains = explanation.chains
    if not chains:
        return []
    fused = sum(chain.fused for chain in chains)
    alike: dict[str, int] = defaultdict(int)
    for chain in chains:
        alike[_pattern(str(chain))] += 1
    lines = ["", f"chains computed at once in training: {fused} of {len(chains)}"]
    shown = set()
    for chain in chains:
        pattern = _pattern(str(chain))
        if alike[pattern] < _ALIKE:
            lines.append(f"  {chain}")
        elif pattern not in shown:
            lines.append(f"  {pattern} ({alike[pattern]})")
            shown.add(pattern)
    return lines


def _execution(explanation: Explanation) -> list[str]:
    """By what and how the products are computed, and what a training loop has to do about it."""
    lines = [f"kernels: {status}" for status in backends.statuses()] or ["kernels: none"]
    if explanation.products is None:
        lines.append(f"products: fast, unless convert(..., products='exact'). fast: {FAST}. exact: {EXACT}.")
    else:
        lines.append(f"products: {explanation.products}: {FAST if explanation.products == 'fast' else EXACT}.")
    specs = [layer.spec for layer in explanation.layers if layer.spec is not None]
    if any(spec.needs_loss_scale for spec in specs):
        lines.append(
            "one loss scale for all layers: `fourbit train` applies it; a loop of your own needs fourbit.loss_scaler(model)."
        )
    return lines


def _si(n: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            return f"{n:.3g}{unit}"
        n /= 1000
    return str(n)
