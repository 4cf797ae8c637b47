"""Applying a recipe to a model, in place, and taking it back."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast, get_args

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from fourbit.errors import UserError
from fourbit.nn import (
    SWAPS,
    Composed,
    MatMul,
    Part,
    QuantizedLayer,
    obstacle,
    original_class,
    quantized_class,
    quantized_layers,
    torch_class_of,
)
from fourbit.ops import LayerSpec, Products
from fourbit.recipes._choice import Choice, left_out
from fourbit.recipes._rule import LayerInfo, Recipe, Rule
from fourbit.recipes._schedule import Scheduler

M = TypeVar("M", bound=nn.Module)

MATRIX_LIKE = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""Layers that multiply matrices: those of them that have no quantized class are reported, never silently skipped."""

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
"""Stay in full precision."""


@dataclass(frozen=True)
class Assignment:
    """One layer and the rule that it falls under; `rule` None: no rule matched, or it is not `convertible`, and `reason` says
    why.

    `part`: which product of the module, where it has several (`fourbit.nn.Composed`).
    """

    name: str
    module: nn.Module
    rule: Rule | None
    reason: str = ""
    part: str = ""
    convertible: bool = True

    @property
    def quantized(self) -> QuantizedLayer | None:
        """The quantized layer, once it is one."""
        if self.part:
            return self.module.part(self.part) if isinstance(self.module, Composed) else None
        return self.module if isinstance(self.module, QuantizedLayer) else None


class _Layer(NamedTuple):
    """Something with weights, or that multiplies matrices; `torch_class` None: it cannot be converted, for the `reason`;
    `place`: what has a position of its own (None: none)."""

    name: str
    module: nn.Module
    part: str
    torch_class: type[nn.Module] | None
    place: str | None
    reason: str = ""


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is of type {type(model).__name__}, but must be a torch.nn.Module.")


def assign(
    model: nn.Module, recipe: Recipe, only: Choice | None = None, skip: Choice | None = None
) -> list[Assignment]:
    """Which rule each matrix-like layer falls under; changes nothing. Positions, and the rules that match something, are those
    of the whole model, whatever `only` and `skip` leave out.

    Raises:
        UserError: not a module, layers whose weights are not made yet, no convertible layer, or a rule that is not optional
            matches nothing, or nothing that is left; `only` or `skip` that chooses nothing, or leaves nothing to quantize.
    """
    _require_module(model)
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise UserError(f"{lazy} has no shape yet, as its layer is lazy: run the model on a batch first.")
    found = list(_layers(model))
    names = [layer.name for layer in found if layer.torch_class not in (None, MatMul)]
    if not names:
        raise UserError(f"nothing to convert: {_nothing_left(model, found)}")
    places = list(dict.fromkeys(layer.place for layer in found if layer.place is not None))
    index = {place: i for i, place in enumerate(places)}
    reasons = left_out({layer.name: layer.module for layer in found if layer.torch_class is not None}, only, skip)
    result, used, taken = [], set(), {}
    lost = False  # whether a layer that the recipe quantizes was left out
    for layer in found:
        module, torch_class = layer.module, layer.torch_class
        info = LayerInfo(layer.name, module, index.get(layer.place or "", -1), len(places))
        if isinstance(module, EMBEDDINGS):
            used.update(
                n for n, r in enumerate(recipe.rules, 1) if r.where is not None and r.matches(info, nn.Embedding)
            )
            continue
        if torch_class is None:
            reason = f"{layer.reason}, stays in full precision"
            result.append(Assignment(layer.name, module, None, reason, convertible=False))
            continue
        matching = [number for number, r in enumerate(recipe.rules, 1) if r.matches(info, torch_class)]
        rule = recipe.rules[matching[0] - 1] if matching else None
        used.update(matching[:1])
        for later in matching[1:]:
            taken.setdefault(later, set()).add(matching[0])
        if rule is None and torch_class is MatMul and layer.part:
            continue  # the products of attention are a layer only to a recipe that names them
        reason = reasons.get(layer.name, "")
        if reason:
            lost = lost or (rule is not None and rule.spec is not None)
            rule = None
        result.append(Assignment(layer.name, module, rule, reason or ("" if rule else "no rule matches"), layer.part))
    for number, rule in enumerate(recipe.rules, 1):
        if number in used or rule.optional:
            continue
        if number in taken:
            earlier = " and ".join(f"rule {n}, {recipe.rules[n - 1]}," for n in sorted(taken[number]))
            raise UserError(
                f"recipe {recipe.name!r}: rule {number}, {rule}, is left without a layer: {earlier} came first for all that "
                "it matches; put it before, narrow the earlier one, mark it optional=True, or remove it"
            )
        raise UserError(
            f"recipe {recipe.name!r}: rule {number}, {rule}, matches no layer of this model: "
            f"remove the rule, mark it optional=True, or choose another recipe{_nearest(rule, names)}"
        )
    if lost and not any(a.rule is not None and a.rule.spec is not None for a in result):
        raise UserError(
            f"only and skip leave nothing that recipe {recipe.name!r} quantizes: its rules keep the other layers in full "
            "precision; choose other layers"
        )
    return result


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """In order of definition. An embedding has a position, although it multiplies nothing: it is the first layer of its model.
    MatMul has no weights, and no position: it is never first and never last."""
    scripted: set[nn.Module] = set()
    projections: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        torch_class = torch_class_of(type(module))
        if isinstance(module, Part) or module in scripted:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.update(module.modules())
            if any(p.dim() > 1 for p in module.parameters()):
                yield _Layer(name, module, "", None, None, "TorchScript cannot be converted")
        elif isinstance(module, MatMul):
            yield _Layer(name, module, "", MatMul, None)
        elif isinstance(module, EMBEDDINGS):
            yield _Layer(name, module, "", None, name)
        elif torch_class is None and not isinstance(module, MATRIX_LIKE) and not _is_quantized_by_torch(module):
            continue
        elif found := projections.get(module) or obstacle(module):
            yield _Layer(name, module, "", None, None, f"{type(module).__name__} {found}")
            if isinstance(module, nn.MultiheadAttention):  # it need not call the layer behind it
                projections[module.out_proj] = f"belongs to {type(module).__name__}, which {found}"
        elif torch_class is not None and issubclass(SWAPS[torch_class], Composed):
            parts = cast("type[Composed]", SWAPS[torch_class]).parts(module)  # type: ignore[arg-type]
            if not parts:
                yield _Layer(name, module, "", None, None, f"{type(module).__name__} cannot be converted")
            for part, info in parts.items():
                full = f"{name}.{part}" if name else part
                place = f"{name}.{info.group}" if info.weight else None
                yield _Layer(full, module, part, torch_class if info.weight else MatMul, place)
        else:
            yield _Layer(name, module, "", _class_for_rules(torch_class), name)


def _class_for_rules(cls: type[nn.Module] | None) -> type[nn.Module] | None:
    """The projection behind attention belongs to the rules for it; other linear layers are linear layers."""
    if cls is NonDynamicallyQuantizableLinear:
        return nn.MultiheadAttention
    return nn.Linear if cls is not None and issubclass(cls, nn.Linear) else cls


def _is_quantized_by_torch(module: nn.Module) -> bool:
    cls = type(module)
    kinds = ("Linear", "Conv", "LSTM", "GRU")
    return (
        cls.__module__.startswith("torch.ao.nn.quantized")
        and cls.__name__.startswith(kinds)
        and hasattr(cls, "from_float")
    )


def _nothing_left(model: nn.Module, found: list[_Layer]) -> str:
    """Why there is no layer that can be converted."""
    reasons = list(dict.fromkeys(layer.reason for layer in found if layer.reason))
    if not reasons:
        known = ", ".join(cls.__name__ for cls in SWAPS if cls is not NonDynamicallyQuantizableLinear)
        return f"{type(model).__name__} has no layer of these types: {known}"
    more = f", and {len(reasons) - 3} other kinds of layers" if len(reasons) > 3 else ""
    return f"of the layers of {type(model).__name__}, {'; '.join(reasons[:3])}{more}"


def _nearest(rule: Rule, names: Iterable[str]) -> str:
    near = {n for p in rule.patterns for n in difflib.get_close_matches(p, list(names), n=3, cutoff=0.3)}
    return f" (nearest layer names: {', '.join(sorted(near))})" if near else ""


def convert(
    model: M,
    recipe: str | Recipe,
    *,
    seed: int = 0,
    products: Products = "fast",
    fuse: bool = True,
    only: Choice | None = None,
    skip: Choice | None = None,
) -> M:
    """Train `model` by `recipe` from now on. In place; returns the model.

    Layers become the quantized class of the same name; subclasses without a `forward` of their own, and layers with a
    parametrized weight, one that is both. Parameters, their names, hooks and ties stay as they are, and the state_dict gains
    only `<layer>.quant.*`. Float checkpoints load into the result. Recipes with one loss scale for all layers
    (`...-global-scale`) need a `loss_scaler` in the training loop.

    Args:
        model: any module; layers of the types in `fourbit.nn.SWAPS` are considered, and what cannot be converted is named by
            `explain`.
        recipe: a Recipe, the name of one in the catalogue, or of a file that one was saved to (path/to/recipe.toml).
        seed: seeds the random words of stochastic rounding.
        products: "fast" lets a platform's library round the result of a product to bfloat16 where it cannot do otherwise
            (some gradients of convolutions, and products with FP8 gradients, on a CPU: a relative error of at most 2^-8 per
            result, where FP16 1-6-9 has 2^-10; docs/method.md has the table); "exact" rounds every result once, to the
            recipe's output format. On a CPU, forward products, and with 4-bit gradients all products of linear layers and 1x1
            convolutions, are exact in both; for a GPU see `fourbit.ops.Products`.
        fuse: compute each chain of convolution, batch normalization, residual, activation and quantization in as few passes as
            can be, in training, where a backend has the kernels. The model's `forward` runs as it is written either way.
        only, skip: layers to convert, and layers to leave in full precision: a regular expression of which the dotted name of
            a layer contains a match, or a predicate (name, module) -> bool. Whatever they say, `first` and `last` in a recipe
            are those of the whole model, and the random words of a layer are the same. `explain` takes them too.

    Raises:
        UserError: unknown recipe or kind of products, nothing to convert, a rule that matches nothing, `only` or `skip` that
            chooses nothing or leaves nothing to quantize, a rotation that does not divide the features of a layer, or a model
            that is already converted.

    >>> import fourbit as fb
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> type(fb.convert(net, "ibm2020")[1])
    <class 'fourbit.nn._layers.Linear'>
    """
    _require_module(model)
    recipe = resolve(recipe)
    if products not in get_args(Products):
        raise UserError(f"products must be 'fast' or 'exact', not {products!r}")
    if any(not isinstance(layer, MatMul) for layer in quantized_layers(model).values()):
        raise UserError("the model is already converted: call restore(model) first, or convert a fresh model")
    if any(t.is_meta for t in model.parameters()):
        raise UserError(
            "the model is on the meta device: give it real parameters first (to_empty, then load), then convert"
        )
    assignments = assign(model, recipe, only, skip)
    for assignment in assignments:
        _require_rotations(assignment, recipe)
    for index, assignment in enumerate(assignments):
        if assignment.rule is None or assignment.rule.spec is None:
            continue
        module, spec = assignment.module, assignment.rule.spec
        if assignment.part:
            _compose(module).attach(assignment.part, spec, seed, index, products)
            continue
        if not isinstance(module, QuantizedLayer):
            object.__setattr__(module, "__class__", quantized_class(type(module)))
        assert isinstance(module, QuantizedLayer)
        module.attach(spec, seed, index, products)
    for module in (
        model.modules()
    ):  # the projection behind attention is a layer of its own, but torch's attention does not call it
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, QuantizedLayer):
            _compose(module)
    _keep_off_fast_path(model)
    for name, layer in quantized_layers(model).items():
        layer.quant.fuse, layer.quant.awaits_scheduler = fuse, bool(recipe.phases)
        if layer.spec.w_fprop is not None and not isinstance(layer, MatMul):
            for upkeep in recipe.upkeep:
                upkeep.attach(layer, name)
    return model


def _compose(module: nn.Module) -> Composed:
    """The module as a layer made of parts, which quantize nothing yet."""
    if not isinstance(module, Composed):
        object.__setattr__(module, "__class__", quantized_class(type(module)))
        assert isinstance(module, Composed)
        for name in module.parts():
            module.attach(name, LayerSpec())
    return module


_NESTED = "_fourbit_use_nested_tensor"


def _keep_off_fast_path(model: nn.Module) -> None:
    """In evaluation, torch's encoder layer reads the weights of its linear layers and skips their forward; hooks stop it. The
    encoder makes nested tensors for that path, which the layers themselves cannot take."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and quantized_layers(module):
            module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in quantized_layers(module).values():
                if _nothing not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook that does nothing."""


def restore(model: M) -> M:
    """Undo `convert`: torch's own classes again, the quantization state dropped. In place; returns the model."""
    for module in model.modules():
        if _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)
    for module in [m for m in model.modules() if isinstance(m, Composed)]:
        before = original_class(type(module))
        module.detach_parts()
        if before is not None:
            object.__setattr__(module, "__class__", before)
    for layer in quantized_layers(model).values():
        before = original_class(type(layer))
        for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is _nothing]:
            del layer._forward_pre_hooks[key]
        if before is None:
            layer.attach(LayerSpec())
        else:
            del layer.quant
            object.__setattr__(layer, "__class__", before)
    return model


def _require_rotations(assignment: Assignment, recipe: Recipe) -> None:
    """Reject rotations that do not divide the features of a layer, before anything is converted.

    Raises:
        UserError: with the layer, and what to do.
    """
    module, spec = assignment.module, assignment.rule.spec if assignment.rule else None
    if spec is None or assignment.part:
        return
    groups = getattr(module, "groups", 1)
    for slot, names in (("x_fprop", ("in_features", "in_channels")), ("g_dgrad", ("out_features", "out_channels"))):
        transform = spec.transform(slot)
        size = next((getattr(module, name) for name in names if hasattr(module, name)), None)
        if transform is None or not isinstance(size, int):
            continue
        try:
            transform.require_divides(size // groups, f"{slot.partition('_')[2]} of {assignment.name} sums over")
        except UserError as error:
            raise UserError(
                f"recipe {recipe.name!r}: {error}; or keep the layer in full precision, by a rule before: "
                f"Rule(None, where=name({assignment.name!r}))"
            ) from None


def scheduler(model: nn.Module, recipe: str | Recipe, total_steps: int) -> Scheduler | None:
    """What carries out the phases and the upkeep of a recipe; None where it has none. In a training loop:

    scheduler = fb.scheduler(model, recipe, total_steps)    # once, after convert
    ...
    if scheduler:
        scheduler.at(step)                                  # before the forward pass of each step, also after a resume
        share = scheduler.rate(step)
        if share is not None:                               # the phase has a learning rate of its own
            for group in optimizer.param_groups:
                group["lr"] = share * base_lr

    A recipe with `QRamping` also needs `scheduler.attach(optimizer)`, once. What upkeep remembers is in the model's state_dict.
    A recipe with an event needs `scheduler.at(step, backward)`, where `backward()` computes the gradients of the step's batch;
    a checkpoint then has `scheduler.state_dict()`, and a resume loads it.

    Args:
        model: just converted by the recipe.
        total_steps: optimizer steps of the whole training.

    Raises:
        UserError: a phase never starts in so few steps.
    """
    found = resolve(recipe)
    return Scheduler(model, found.phases, total_steps) if found.phases or found.upkeep else None


def resolve(recipe: str | Recipe) -> Recipe:
    """The Recipe of that name, or in that file.

    Raises:
        UserError: as `recipes.get`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    from fourbit.recipes.catalog import get

    return get(recipe)
