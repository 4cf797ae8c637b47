"""Applying a recipe to a model, in place, and taking it back."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from torch import nn

from fourbit.errors import UserError
from fourbit.nn import SWAPS, MatMul, Quantized, quantized_layers
from fourbit.ops import LayerSpec, Products
from fourbit.recipes._fuse import fuse as fuse_chains
from fourbit.recipes._fuse import unfuse as unfuse_chains
from fourbit.recipes._rule import LayerInfo, Recipe, Rule

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


@dataclass(frozen=True)
class Assignment:
    """One layer and the rule that it falls under; `rule` None: no rule matched, or `reason` says why it cannot be."""

    name: str
    module: nn.Module
    rule: Rule | None
    reason: str = ""


def assign(model: nn.Module, recipe: Recipe) -> list[Assignment]:
    """Which rule each matrix-like layer falls under; changes nothing.

    Raises:
        UserError: not a module, no convertible layer, or a rule that is not optional matches nothing, or nothing that is left.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is of type {type(model).__name__}, but must be a torch.nn.Module.")
    found = [(n, m) for n, m in model.named_modules() if original_class(m) or isinstance(m, (*MATRIX_LIKE, MatMul))]
    inside = tuple(f"{name}." for name, m in found if isinstance(m, nn.MultiheadAttention))
    found = [(name, m) for name, m in found if not (inside and name.startswith(inside))]
    convertible = [(name, m) for name, m in found if original_class(m)]
    if not convertible:
        names = ", ".join(cls.__name__ for cls in SWAPS)
        raise UserError(f"nothing to convert: {type(model).__name__} has no layer of these types: {names}")
    index = {name: i for i, (name, _) in enumerate(convertible)}
    result, used, taken = [], set(), {}
    for name, module in found:
        torch_class = MatMul if isinstance(module, MatMul) else original_class(module)
        if torch_class is None:
            reason = f"{type(module).__name__} cannot be converted, stays in full precision"
            result.append(Assignment(name, module, None, reason))
            continue
        position = index.get(name, -1)  # MatMul has no weights and no position: never first, never last
        info = LayerInfo(name, module, position, len(convertible))
        matching = [number for number, r in enumerate(recipe.rules, 1) if r.matches(info, torch_class)]
        rule = recipe.rules[matching[0] - 1] if matching else None
        used.update(matching[:1])
        for later in matching[1:]:
            taken.setdefault(later, set()).add(matching[0])
        result.append(Assignment(name, module, rule, "" if rule else "no rule matches"))
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
            f"remove the rule, mark it optional=True, or choose another recipe{_nearest(rule, index)}"
        )
    return result


def _nearest(rule: Rule, names: Iterable[str]) -> str:
    near = {n for p in rule.patterns for n in difflib.get_close_matches(p, list(names), n=3, cutoff=0.3)}
    return f" (nearest layer names: {', '.join(sorted(near))})" if near else ""


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The torch class that has a quantized twin: the module's own class, or the one it was converted from."""
    cls = type(module)
    if cls in SWAPS:
        return cls
    return next((torch_class for torch_class, ours in SWAPS.items() if ours is cls), None)


def convert(model: M, recipe: str | Recipe, *, seed: int = 0, products: Products = "fast", fuse: bool = True) -> M:
    """Train `model` by `recipe` from now on. In place; returns the model.

    Layers become the quantized class of the same name; parameters, their names, hooks and ties stay as they are, and the
    state_dict gains only `<layer>.quant.*`. Float checkpoints load into the result. Recipes with one loss scale for all layers
    (`...-global-scale`) need a `loss_scaler` in the training loop.

    Args:
        model: any module; layers of the types in `fourbit.nn.SWAPS` are considered.
        recipe: a Recipe, or the name of one in the catalogue.
        seed: seeds the random words of stochastic rounding.
        products: "fast" lets a platform's library round the result of a product to bfloat16 where it cannot do otherwise
            (some gradients of convolutions, and products with FP8 gradients, on a CPU: a relative error of at most 2^-8 per
            result, where FP16 1-6-9 has 2^-10; docs/method.md has the table); "exact" rounds every result once, to the
            recipe's output format. On a CPU, forward products, and with 4-bit gradients all products of linear layers and 1x1
            convolutions, are exact in both; for a GPU see `fourbit.ops.Products`.
        fuse: run each chain of convolution, batch normalization, residual, activation and quantization as one, in training,
            where the model's code can be traced (torch.fx) and a backend has the kernels.

    Raises:
        UserError: unknown recipe or kind of products, nothing to convert, a rule that matches nothing, or a model that is
            already converted.

    >>> import fourbit as fb
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> type(fb.convert(net, "ibm2020")[1])
    <class 'fourbit.nn._layers.Linear'>
    """
    recipe = resolve(recipe)
    if products not in get_args(Products):
        raise UserError(f"products must be 'fast' or 'exact', not {products!r}")
    if any(not isinstance(layer, MatMul) for layer in quantized_layers(model).values()):
        raise UserError("the model is already converted: call restore(model) first, or convert a fresh model")
    if any(t.is_meta for t in model.parameters()):
        raise UserError(
            "the model is on the meta device: give it real parameters first (to_empty, then load), then convert"
        )
    for index, assignment in enumerate(assign(model, recipe)):
        if assignment.rule is None or assignment.rule.spec is None:
            continue
        module = assignment.module
        torch_class = original_class(module)
        if torch_class is not None:
            module.__class__ = SWAPS[torch_class]
        assert isinstance(module, Quantized)
        module.attach(assignment.rule.spec, seed, index, products)
    _keep_off_fast_path(model)
    if fuse:
        fuse_chains(model)
    return model


def _keep_off_fast_path(model: nn.Module) -> None:
    """In evaluation, torch's encoder layer reads the weights of its linear layers and skips their forward; hooks stop it."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in quantized_layers(module).values():
                if _nothing not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook that does nothing."""


def restore(model: M) -> M:
    """Undo `convert`: torch's own classes again, the quantization state dropped. In place; returns the model."""
    unfuse_chains(model)
    for layer in quantized_layers(model).values():
        torch_class = original_class(layer)
        for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is _nothing]:
            del layer._forward_pre_hooks[key]
        if torch_class is None:
            layer.attach(LayerSpec())
        else:
            del layer.quant
            layer.__class__ = torch_class  # type: ignore[assignment]
    return model


def resolve(recipe: str | Recipe) -> Recipe:
    """The Recipe of that name.

    Raises:
        UserError: no such name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    from fourbit.recipes.catalog import CATALOG

    return CATALOG[recipe]
