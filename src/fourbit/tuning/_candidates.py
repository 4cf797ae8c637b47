"""The GEMMs that could be computed in 8 bits: how, how many multiply-accumulates that concerns, and what energy it costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from fourbit.errors import UserError
from fourbit.hardware import Product, estimate
from fourbit.ops import REUSE, LayerSpec
from fourbit.quantizers import GradScale, QuantSpec
from fourbit.recipes import GEMMS, Explanation, LayerExplanation, Recipe, Rule, explain, name
from fourbit.recipes._convert import Assignment, assign
from fourbit.recipes._input import Input
from fourbit.tuning._products import products_of

HIGH_BITS = 8
"""An operand with so many bits is not in 4-bit arithmetic any more."""


@dataclass(frozen=True, order=True)
class Candidate:
    """One GEMM ("fprop", "dgrad", "wgrad") of one layer."""

    layer: str
    gemm: str

    def __str__(self) -> str:
        return f"{self.layer}:{self.gemm}"


def alternative(recipe: Recipe) -> LayerSpec:
    """The spec of a recipe's last rule: what it does with most layers.

    Raises:
        UserError: none of its operands has 8 bits or more.
    """
    spec = recipe.rules[-1].spec
    found = [] if spec is None else [s for slot in ("x_fprop", "w_fprop", "g_dgrad") if (s := spec.resolved(slot))]
    if spec is None or len(found) < 3 or any(s.format.bits < HIGH_BITS for s in found):
        raise UserError(
            f"{recipe.name} has no operands with 8 bits to take: name a recipe that has (--high hfp8, fp8-tensorwise, mxfp8)."
        )
    return spec


def raised(spec: LayerSpec, gemm: str, high: LayerSpec) -> LayerSpec | None:
    """`spec` with the operands of a GEMM from `high`; None where it has them already, or where its layout does not allow it.

    What is reused from the forward pass stays so; a gradient that shares its scale (GradScale) keeps the scaling and gets the
    format alone.
    """
    changes: dict[str, object] = {}
    for slot in GEMMS[gemm]:
        own, other = spec.resolved(slot), high.resolved(slot)
        if own is None or other is None or own.format.bits >= HIGH_BITS:
            continue
        if getattr(spec, slot) is REUSE and slot != "g_wgrad":
            continue
        shared = isinstance(own.scaling, GradScale)
        changes[slot] = replace(own, format=other.format) if shared else other
    if "g_dgrad" in changes and spec.g_wgrad is REUSE:
        changes["g_wgrad"] = spec.g_dgrad
    if not changes:
        return None
    try:
        return replace(spec, **changes)  # type: ignore[arg-type]
    except UserError:
        return None


def is_low(spec: QuantSpec | None) -> bool:
    """Whether an operand has less than 8 bits."""
    return spec is not None and spec.format.bits < HIGH_BITS


class Candidates:
    """All of a model under a recipe.

    Args:
        model: in full precision; it is not changed.
        input: one batch, as the model takes it.

    Raises:
        UserError: no layer in 4 bits, or none that could have 8.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, high: LayerSpec, input: Input, only: str | None, skip: str | None
    ):
        self.recipe, self.high = recipe, high
        self._units: dict[tuple[object, ...], bool] = {}
        self._assigned: dict[str, Assignment] = {
            a.name: a for a in assign(model, recipe, only, skip) if a.rule is not None and a.rule.spec is not None
        }
        self.explanation: Explanation = explain(model, recipe, input, only=only, skip=skip)
        self._layers = {layer.name: layer for layer in self.explanation.layers if layer.spec is not None}
        low = [n for n, layer in self._layers.items() if self._low_macs(layer)]
        if not low:
            raise UserError(f"{recipe.name} has no layer of this model in 4 bits: there is nothing to choose from.")
        pairs = [Candidate(n, gemm) for n in low for gemm in GEMMS]
        self.all = [c for c in pairs if self._macs_of(c) > 0]
        if not self.all:
            raise UserError(
                f"no product of {recipe.name} can take operands with 8 bits in place of its own (rotations or blocks forbid "
                "it): take another recipe, or another --high."
            )

    @property
    def assignments(self) -> list[Assignment]:
        """The layers that the recipe quantizes, each with its rule."""
        return list(self._assigned.values())

    def spec(self, layer: str, gemms: Iterable[str]) -> LayerSpec:
        """A layer's spec with these GEMMs in 8 bits."""
        spec = self._layers[layer].spec
        assert spec is not None
        for gemm in sorted(gemms, key=list(GEMMS).index):
            spec = raised(spec, gemm, self.high) or spec
        return spec

    def rules(self, chosen: Iterable[Candidate]) -> list[tuple[Rule, tuple[Candidate, ...]]]:
        """A rule for each layer that something is chosen of, in the order of the network, and what it stands for."""
        found = []
        for layer in self._layers:
            own = tuple(c for c in self.all if c.layer == layer and c in set(chosen))
            if own:
                before = self._assigned[layer].rule
                assert before is not None
                label = f"8 bits: {', '.join(c.gemm for c in own)}"
                rule = Rule(self.spec(layer, (c.gemm for c in own)), before.types, name(_exactly(layer)), label=label)
                found.append((rule, own))
        return found

    def recipe_with(self, chosen: Iterable[Candidate], title: str = "") -> Recipe:
        """The recipe with these in 8 bits, as rules before its own; of those, one that no layer is left for may match none."""
        chosen = list(chosen)
        left = {id(a.rule) for layer, a in self._assigned.items() if layer not in {c.layer for c in chosen}}
        taken = {id(a.rule) for a in self._assigned.values()} - left
        own = tuple(replace(rule, optional=True) if id(rule) in taken else rule for rule in self.recipe.rules)
        rules = tuple(rule for rule, _ in self.rules(chosen))
        return replace(self.recipe, name=title or self.recipe.name, rules=(*rules, *own))

    def share(self, chosen: Iterable[Candidate]) -> float:
        """Of all multiply-accumulates of a step, those that `chosen` takes to 8 bits."""
        gemms: dict[str, list[str]] = {}
        for c in chosen:
            gemms.setdefault(c.layer, []).append(c.gemm)
        added = sum(
            self._low_macs(self._layers[layer])
            - self._low_macs(replace(self._layers[layer], spec=self.spec(layer, of)))
            for layer, of in gemms.items()
        )
        return added / self.explanation.num_macs

    def joules(self, chosen: Iterable[Candidate]) -> float | None:
        """Energy of a step on the hardware model's machine. Where it has no unit that multiplies one operand in 8 bits by
        one in 4, both count as 8 bits, which such a unit can hold; None where it has none for that either."""
        layers = tuple(self._with(layer, list(chosen)) for layer in self.explanation.layers)
        try:
            products = products_of(replace(self.explanation, layers=layers))
            return estimate([p if self._has_unit(p) else self._widened(p) for p in products]).joules
        except UserError:
            return None

    @cached_property
    def energies(self) -> Mapping[Candidate, float] | None:
        """What each candidate adds to the energy of a step, as a share; None if that is not known of all of them."""
        base = self.joules(())
        now = {c: self.joules((c,)) for c in self.all}
        if base is None or any(joules is None for joules in now.values()):
            return None
        return {c: max((joules - base) / base, 1e-9) for c, joules in now.items() if joules is not None}

    def cost(self, candidate: Candidate) -> float:
        """What it adds to the energy of a step, as a share; its share of the multiply-accumulates without energies."""
        return self.share((candidate,)) if self.energies is None else self.energies[candidate]

    def _has_unit(self, p: Product) -> bool:
        kind = (p.gemm, p.a, p.b, p.block, p.depthwise, p.stochastic, p.power)
        if kind not in self._units:
            try:
                estimate([p])
                self._units[kind] = True
            except UserError:
                self._units[kind] = False
        return self._units[kind]

    def _widened(self, p: Product) -> Product:
        a, b = (self.high.resolved(slot) for slot in GEMMS[p.gemm])
        return p if a is None or b is None else replace(p, a=a.format.name, b=b.format.name)

    def _with(self, layer: LayerExplanation, chosen: list[Candidate]) -> LayerExplanation:
        gemms = [c.gemm for c in chosen if c.layer == layer.name]
        return replace(layer, spec=self.spec(layer.name, gemms)) if gemms else layer

    def _macs_of(self, candidate: Candidate) -> float:
        return self.share((candidate,))

    @staticmethod
    def _low_macs(layer: LayerExplanation) -> int:
        macs: Mapping[str, int] = layer.num_macs or {}
        spec = layer.spec
        if spec is None:
            return 0
        return sum(count for gemm, count in macs.items() if all(is_low(spec.resolved(slot)) for slot in GEMMS[gemm]))


def _exactly(layer: str) -> str:
    return f"^{re.escape(layer)}$"
