"""`explain`: which rule each layer falls under, its six operands, its MACs, and the share of MACs in each precision.

Of a model that is converted already, also what its layers have learned and decided so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fourbit import backends
from fourbit.errors import UserError
from fourbit.nn import SWAPS, Composed, Quantized
from fourbit.ops import SLOTS, Contraction, LayerSpec, ProductSize
from fourbit.quantizers import UNSET, ClipValue, LossScaled, QuantSpec
from fourbit.recipes._convert import Assignment, assign, original_class, resolve
from fourbit.recipes._rule import Recipe

FAST = (
    "where the platform's library rounds the results of a product to bfloat16 (some gradients of convolutions, on a CPU also "
    "products with FP8 gradients), that is accepted, a relative error of at most 2^-8 per result; on a GPU also float16 (2^-12)"
)
EXACT = "every result is rounded once, to the output format"

GEMMS = {"fprop": ("x_fprop", "w_fprop"), "dgrad": ("g_dgrad", "w_dgrad"), "wgrad": ("g_wgrad", "x_wgrad")}
"""The three GEMMs and their operand slots."""


@dataclass(frozen=True)
class LayerExplanation:
    """One layer: its rule, its spec, and the products of its fprop for the given input (None without an input).

    `sizes`: (the product, whether its dgrad is needed) of every call. `state`: the layer's exponent of GradScale and clip
    values, in words; empty for a layer that is not converted.
    """

    name: str
    type: str
    rule: str
    spec: LayerSpec | None
    note: str
    sizes: tuple[tuple[ProductSize, bool], ...] | None
    state: str = ""

    @property
    def num_macs(self) -> Mapping[str, int] | None:
        """Multiply-accumulates per GEMM; None without an input."""
        if self.sizes is None:
            return None
        macs = dict.fromkeys(GEMMS, sum(size.macs for size, _ in self.sizes))
        return macs | {"dgrad": sum(size.macs for size, needed in self.sizes if needed)}

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
        """Widths of the two operands, wider first, e.g. "8 x 4"; 32 for full precision."""
        widths = []
        for slot in GEMMS[gemm]:
            resolved = self.spec.resolved(slot) if self.spec else None
            widths.append(resolved.format.bits if resolved else 32)
        return " x ".join(str(b) for b in sorted(widths, reverse=True))


@dataclass(frozen=True)
class Explanation:
    """What a recipe does to a model. `print` it, or read `layers` and `shares`.

    `products`: how the backends may multiply, as the model was converted; None for a model that is not.
    """

    recipe: Recipe
    layers: tuple[LayerExplanation, ...]
    products: str | None = None

    @property
    def num_macs(self) -> int:
        """Multiply-accumulates of one training step over all layers and GEMMs."""
        return sum(sum(layer.num_macs.values()) for layer in self.layers if layer.num_macs)

    def shares(self, by: str = "bits") -> dict[str, float]:
        """Share of the MACs of a training step by operand width ("bits") or format ("precision"), largest first."""
        totals: dict[str, int] = defaultdict(int)
        for layer in self.layers:
            for gemm, macs in (layer.num_macs or {}).items():
                totals[getattr(layer, by)(gemm)] += macs
        whole = sum(totals.values())
        ranked = sorted(totals.items(), key=lambda item: -item[1])
        return {key: value / whole for key, value in ranked if value} if whole else {}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


Input = Tensor | tuple[int, ...] | tuple[Tensor, ...] | Mapping[str, Tensor]
"""A batch, its shape, or a batch of several tensors, in order or by the names of the model's arguments."""


def explain(model: nn.Module, recipe: str | Recipe, input: Input | None = None) -> Explanation:
    """What `convert(model, recipe)` does, without doing it.

    Args:
        model: not yet converted, or converted by the same recipe (then its scales and clip values are shown too); it is not
            changed.
        input: one batch (several tensors where the model takes several, a dict of them where it takes them by name), or its
            shape (random numbers then), to count multiply-accumulates with. dgrad of a layer whose input needs no gradient
            (the first one) counts 0, because it is never computed.

    Raises:
        UserError: as `convert`, and if the model does not run on the input.
    """
    recipe = resolve(recipe)
    assignments = assign(model, recipe)
    sizes = _sizes(model, assignments, input) if input is not None else {}
    converted = [layer for a in assignments if (layer := _converted(a)) is not None]
    products = converted[0].quant.products if converted else None
    return Explanation(recipe, tuple(_explain_layer(a, sizes.get(a.name)) for a in assignments), products)


def _explain_layer(assignment: Assignment, sizes: list[tuple[ProductSize, bool]] | None) -> LayerExplanation:
    rule = assignment.rule
    label = (rule.label or str(rule)) if rule else "-"
    spec = rule.spec if rule else None
    layer = _converted(assignment)
    state = "" if layer is None else _state_of(layer)
    type_name = type(assignment.module).__name__
    found = None if sizes is None else tuple(sizes)
    return LayerExplanation(assignment.name, type_name, label, spec, assignment.reason, found, state)


def _converted(assignment: Assignment) -> Quantized | None:
    """The layer, if it is quantized as the recipe has it."""
    rule, layer = assignment.rule, assignment.quantized
    return layer if rule is not None and layer is not None and layer.spec == rule.spec else None


def _state_of(layer: Quantized) -> str:
    """Exponent and clip values as they are now."""
    quant, parts = layer.quant, []
    for operand in ("x", "w"):
        alpha, signed = getattr(quant, f"{operand}_alpha"), getattr(quant, f"{operand}_signed")
        if alpha is None:
            continue
        spec = getattr(layer.spec, f"{operand}_fprop")
        decided = f"{alpha.item():.4g} ({'signed' if signed else 'unsigned'})" if signed >= 0 else "not decided yet"
        assert isinstance(spec.scaling, ClipValue)
        parts.append(f"alpha of {operand} {decided}")
    if quant.g_exponent is not None:
        known = quant.g_exponent[quant.g_exponent != UNSET]
        low, high = (int(known.min()), int(known.max())) if known.numel() else (0, 0)
        power = f"2^{low}" if low == high else f"2^{low} to 2^{high}"
        parts.append(f"g times {power}" if known.numel() else "g not scaled yet")
    return ", ".join(parts)


def _contraction_of(module: nn.Module) -> Contraction | None:
    if isinstance(module, Quantized):
        return module.contraction()
    quantized_class = SWAPS.get(type(module))
    if quantized_class is None or not issubclass(quantized_class, Quantized):
        return None
    return quantized_class.contraction(module)  # type: ignore[arg-type]


def batch_for(model: nn.Module, input: Input) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    """The batch itself, or random numbers of that shape, where the model is.

    Raises:
        UserError: `model` is not a module, `input` no batch and no shape, or no memory holds it.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {_what(model)}, but must be a torch.nn.Module.")
    if isinstance(input, Tensor):
        return input
    if isinstance(input, Mapping) and input and all(isinstance(t, Tensor) for t in input.values()):
        return dict(input)
    found = tuple(input) if isinstance(input, tuple | list) else ()
    tensors = tuple(t for t in found if isinstance(t, Tensor))
    if found and len(tensors) == len(found):
        return tensors
    sizes = tuple(n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0)
    if not sizes or len(sizes) != len(found):
        raise UserError(f"the input is {_what(input)}, but must be a batch, or the shape of one: (128, 3, 32, 32).")
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    try:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(device)
    except RuntimeError as error:
        raise UserError(
            f"a batch of shape {sizes} cannot be made ({first_line(error)}): take a smaller one."
        ) from error


def run_on(model: nn.Module, batch: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> None:
    """A forward pass, for what can be seen of it.

    Raises:
        UserError: the model does not take such a batch.
    """
    named = batch if isinstance(batch, dict) else {}
    inputs = batch if isinstance(batch, tuple) else (batch,) if isinstance(batch, Tensor) else ()
    try:
        model(*inputs, **named)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in (*inputs, *named.values()))
        raise UserError(f"the model does not run on an input of shape {shapes}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error of torch says, without the stack of C++ calls that may follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _what(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float | tuple | list | None) else type(value).__name__


def _sizes(model: nn.Module, assignments: list[Assignment], input: Input) -> dict[str, list[tuple[ProductSize, bool]]]:
    found: dict[str, list[tuple[ProductSize, bool]]] = defaultdict(list)
    handles = []

    def hook(name: str, contraction: Contraction):
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            w = inputs[1] if len(inputs) > 1 else module.weight
            found[name].append((contraction.size(x, w, output), x.requires_grad))  # type: ignore[arg-type]

        return record

    def composed_hook(prefix: str):
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            torch_class = original_class(module)
            assert torch_class is not None
            layer = cast("type[Composed]", SWAPS[torch_class])
            for part, size, needed in layer.sizes(module, inputs, named):  # type: ignore[arg-type]
                found[f"{prefix}{part}"].append((size, needed))

        return record

    composed = {a.module: a.name.removesuffix(a.part) for a in assignments if a.part}
    for module, prefix in composed.items():
        handles.append(module.register_forward_hook(composed_hook(prefix), with_kwargs=True))
    inside = {child for module in composed for child in module.modules()}
    for a in assignments:
        contraction = None if a.module in inside else _contraction_of(a.module)
        if contraction is not None:
            handles.append(a.module.register_forward_hook(hook(a.name, contraction)))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        x = batch_for(model, input)
        with torch.enable_grad():
            run_on(model, x)
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    return found


def _lines(explanation: Explanation) -> list[str]:
    recipe = explanation.recipe
    lines = [f"recipe {recipe.name}: {recipe.summary}"]
    if recipe.source:
        lines.append(f"source: {recipe.source}")
    groups: dict[tuple[str, LayerSpec | None, str], list[LayerExplanation]] = defaultdict(list)
    for layer in explanation.layers:
        groups[layer.rule, layer.spec, layer.note].append(layer)
    whole = explanation.num_macs
    for (rule, spec, note), layers in groups.items():
        lines += ["", f"{rule}{f' ({note})' if note else ''}: {len(layers)} layer{'s' if len(layers) > 1 else ''}"]
        if spec is None:
            lines.append("    full precision")
        else:
            lines += [f"    {slot:8} {layers[0].operand(slot)}" for slot in SLOTS]
            if spec.accumulation is not None:
                lines.append(f"    sums     {spec.accumulation}")
            lines.append(f"    output   {spec.output.name if spec.output else 'float32'}")
        width = max(len(layer.name) for layer in layers)
        for layer in layers:
            macs = ""
            if layer.num_macs and whole:
                total = sum(layer.num_macs.values())
                per_gemm = ", ".join(f"{gemm} {_si(n)}" for gemm, n in layer.num_macs.items())
                macs = f"  {per_gemm} MACs ({total / whole:.1%})"
            lines.append(f"  {layer.name:{width}}  {layer.type}{macs}{f'  {layer.state}' if layer.state else ''}")
    uncounted = [layer.name for layer in explanation.layers if whole and layer.num_macs is None]
    if uncounted:
        lines += ["", f"MACs not counted, and not part of the shares: {', '.join(uncounted)}"]
    if whole:
        lines += ["", f"MACs of a training step: {_si(whole)}, by operand bits:"]
        lines += [f"  {key:8} {share:7.2%}" for key, share in explanation.shares("bits").items()]
        lines.append("by format:")
        lines += [f"  {key:28} {share:7.2%}" for key, share in explanation.shares("precision").items()]
    return [*lines, "", *_execution(explanation)]


def _execution(explanation: Explanation) -> list[str]:
    """By what and how the products are computed, and what a training loop has to do about it."""
    lines = [f"kernels: {status}" for status in backends.statuses()] or ["kernels: none"]
    if explanation.products is None:
        lines.append(f"products: fast, unless convert(..., products='exact'). fast: {FAST}. exact: {EXACT}.")
    else:
        lines.append(f"products: {explanation.products}: {FAST if explanation.products == 'fast' else EXACT}.")
    specs = [layer.spec for layer in explanation.layers if layer.spec is not None]
    if any(s.g_scaling is not None and isinstance(s.g_scaling.scaling, LossScaled) for s in specs):
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
