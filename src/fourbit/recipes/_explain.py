"""`explain`: which rule each layer falls under, its six operands, its MACs, what is outside every rule, and the share of MACs
and weights in each precision.

Of a model that is converted already, also what its layers have learned and decided so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.nn import SWAPS, Composed, MatMul, QuantizedLayer, torch_class_of
from fourbit.ops import Contraction
from fourbit.recipes._chains import chains_of
from fourbit.recipes._choice import Choice
from fourbit.recipes._convert import Assignment, assign, convert, resolve
from fourbit.recipes._count import Call, Counts, counting
from fourbit.recipes._dummy import dummy_batch
from fourbit.recipes._explained import CallExplanation, LayerExplanation, Use
from fourbit.recipes._explanation import Explanation
from fourbit.recipes._input import Input, batch_for, run_on
from fourbit.recipes._kernels import kernels_of
from fourbit.recipes._rule import Recipe
from fourbit.recipes._weights import ACTIVATIONS, Owners, matrices_of, weights_of


def explain(
    model: nn.Module,
    recipe: str | Recipe,
    input: Input | None = None,
    *,
    only: Choice | None = None,
    skip: Choice | None = None,
) -> Explanation:
    """What `convert(model, recipe)` does, without doing it, and what it leaves out.

    Args:
        model: not yet converted, or converted by the same recipe (then its scales and clip values are shown too); it is not
            changed.
        input: one batch (a tuple where the model takes several arguments, a dictionary where it takes them by name), or its
            shape (random numbers then), to count multiply-accumulates with. None: the `dummy_inputs` of a model of
            transformers; of another model nothing is run or counted. Gradients of operands that need none (the input of the
            first layer, frozen weights) count 0, because they are never computed.
        only, skip: as of `convert`.

    Raises:
        UserError: as `convert`, and if the model does not run on the input.
    """
    recipe = resolve(recipe)
    assignments = _as_they_are(assign(model, recipe, only, skip))
    owners = Owners(model, assignments)
    run, failure = None, ()
    given = dummy_batch(model) if input is None else input
    try:
        run = None if given is None else _run(model, assignments, owners, given)
    except UserError as error:
        if input is not None:
            raise
        failure = (str(error).replace("an input", "its dummy_inputs", 1) + " (give a batch as input)",)
    sizes = run.sizes if run else {}
    layers = tuple(_explain_layer(a, sizes.get(a.name)) for a in assignments)
    converted = [layer for a in assignments if (layer := _converted(a)) is not None]
    return Explanation(
        recipe,
        layers,
        converted[0].quant.products if converted else None,
        run.calls if run else (),
        matrices_of(owners, run.counts if run else None, sizes),
        tuple(f"{owners.names[m] or 'the model'}: {op}" for m, op in run.counts.unknown) if run else failure,
        tuple
        if given is None or run is None
        else lambda: chains_of(model, lambda twin: convert(twin, recipe, only=only, skip=skip), given),
        tuple
        if given is None or run is None
        else lambda: kernels_of(model, lambda twin: convert(twin, recipe, only=only, skip=skip), given),
    )


def _as_they_are(assignments: list[Assignment]) -> list[Assignment]:
    """Of a model that is converted, without a rule for what was put in later."""
    if all(a.quantized is None or isinstance(a.quantized, MatMul) for a in assignments):
        return assignments
    reason = "put in after the model was converted (restore(model) and convert again), or left out by its only or skip"
    return [
        replace(a, rule=None, reason=reason)
        if a.quantized is None and a.rule is not None and a.rule.spec is not None
        else a
        for a in assignments
    ]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """What a forward pass stores on modules is afterwards what it was."""
    before = [(m, dict(vars(m))) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _explain_layer(assignment: Assignment, sizes: list[Use] | None) -> LayerExplanation:
    rule = assignment.rule
    label = (rule.label or str(rule)) if rule else "-"
    spec = rule.spec if rule else None
    layer = _converted(assignment)
    state = "" if layer is None else _state_of(layer)
    type_name = type(assignment.module).__name__
    found = None if sizes is None else tuple(sizes)
    width = 8 * next((p.element_size() for p in assignment.module.parameters() if p.is_floating_point()), 4)
    weights = tuple(name for name, _, _ in weights_of(assignment))
    return LayerExplanation(assignment.name, type_name, label, spec, assignment.reason, found, state, width, weights)


def _converted(assignment: Assignment) -> QuantizedLayer | None:
    """The layer, if it is quantized as the recipe has it."""
    rule, layer = assignment.rule, assignment.quantized
    return layer if rule is not None and layer is not None and layer.spec == rule.spec else None


def _state_of(layer: QuantizedLayer) -> str:
    """Exponent and clip values as they are now."""
    return ", ".join(filter(None, map(str, layer.quant.scalings.values())))


class _Run(NamedTuple):
    """What a forward pass has shown: the products of the layers by name, those outside, and which parameters they took."""

    sizes: Mapping[str, list[Use]]
    calls: tuple[CallExplanation, ...]
    counts: Counts


def _run(model: nn.Module, assignments: list[Assignment], owners: Owners, input: Input) -> _Run:
    """Layers that can be converted tell the sizes of their products themselves; all others are counted as they run."""
    found: dict[str, list[Use]] = defaultdict(list)
    handles = []

    def hook(name: str, contraction: Contraction) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            x, *others = (*inputs, *named.values())
            w = others[0] if isinstance(module, MatMul) else cast(Tensor, module.weight)
            found[name].append(Use(contraction.size(x.shape, w.shape, output.shape), x.requires_grad, w.requires_grad))

        return record

    def composed_hook(prefix: str, cls: type[Composed]) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            for part, size, needed in cls.sizes(module, inputs, named):  # type: ignore[arg-type]
                found[f"{prefix}{part}"].append(Use(size, needed, _is_learned(cls, module, part)))

        return record

    composed = {a.module: a.name.removesuffix(a.part) for a in assignments if a.part}
    for module, prefix in composed.items():
        torch_class = torch_class_of(type(module))
        assert torch_class is not None
        record = composed_hook(prefix, cast("type[Composed]", SWAPS[torch_class]))
        handles.append(module.register_forward_hook(record, with_kwargs=True))
    inside = {child for module in composed for child in module.modules()}
    covered = set(composed)
    for a in assignments:
        contraction = None if a.module in inside or not a.convertible else _contraction_of(a.module)
        if contraction is not None:
            handles.append(a.module.register_forward_hook(hook(a.name, contraction), with_kwargs=True))
            covered.add(a.module)
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]  # frozen TorchScript has none
    try:
        for module, _ in modes:
            module.training = False
        x = batch_for(model, input)
        with torch.enable_grad(), _unchanged(model), counting(model, covered) as counts:
            run_on(model, x)
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    calls = _calls(counts.calls, owners, found)
    return _Run(found, (*calls, *_unnamed_parts(assignments, composed, found)), counts)


def _contraction_of(module: nn.Module) -> Contraction | None:
    if isinstance(module, QuantizedLayer):
        return module.contraction()
    torch_class = torch_class_of(type(module))
    assert torch_class is not None
    return cast("type[QuantizedLayer]", SWAPS[torch_class]).contraction(module)  # type: ignore[arg-type]


def _is_learned(cls: type[Composed], module: nn.Module, part: str) -> bool:
    """Whether the weight of a part needs a gradient."""
    info = cls.parts(module).get(part)  # type: ignore[arg-type]
    if info is None:
        return cast(Tensor, module.get_submodule(part).weight).requires_grad
    return not info.weight or getattr(module, info.weight).requires_grad


def _calls(calls: list[Call], owners: Owners, sizes: dict[str, list[Use]]) -> list[CallExplanation]:
    """The products outside the layers; those of layers that cannot be converted are added to `sizes`."""
    found: dict[tuple[nn.Module, str, str], list[Call]] = defaultdict(list)
    for call in calls:
        layer = owners.layers.get(call.module)
        if layer is not None and not layer.convertible:
            sizes.setdefault(layer.name, []).append(Use(call.size, call.x, call.w))
        else:
            found[call.module, call.operation, owners.reason(call)].append(call)
    return [
        CallExplanation(
            owners.names[module],
            type(module).__name__,
            operation,
            reason,
            tuple(Use(call.size, call.x, call.w) for call in group),
            max(call.bits for call in group),
            tuple(sorted({name for call in group for name in call.weights})),
        )
        for (module, operation, reason), group in found.items()
    ]


def _unnamed_parts(
    assignments: list[Assignment], composed: Mapping[nn.Module, str], sizes: dict[str, list[Use]]
) -> list[CallExplanation]:
    """The products of activations inside attention layers, which are layers only to a recipe that names them."""
    modules = {prefix: module for module, prefix in composed.items()}
    found = []
    for name in sizes.keys() - {a.name for a in assignments}:
        prefix = next(p for p in modules if name.startswith(p) and "." not in name.removeprefix(p))
        width = 8 * next((p.element_size() for p in modules[prefix].parameters()), 4)
        reason = f"{ACTIVATIONS}, for rules with fourbit.nn.MatMul"
        found.append(CallExplanation(name, type(modules[prefix]).__name__, "matmul", reason, tuple(sizes[name]), width))
    return sorted(found, key=lambda call: list(sizes).index(call.name))
