"""How a model was converted, in words that a checkpoint holds: what a run that goes on, and `from_pretrained`, convert by."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import nn

from fourbit import recipes
from fourbit.errors import UserError
from fourbit.nn import MatMul, quantized_layers
from fourbit.ops import Products
from fourbit.recipes import Choice
from fourbit.recipes._convert import assign


@dataclass(frozen=True)
class Settings:
    """Arguments of `fourbit.convert` that change numbers. A predicate in `only` or `skip` is here the regular expression of
    the names that it has chosen."""

    recipe: str
    seed: int = 0
    products: str = "fast"
    only: str | None = None
    skip: str | None = None

    def __post_init__(self) -> None:
        """Files of other people may hold anything; what the rest is, `fourbit.convert` looks at itself."""
        for name, kind, words in (("recipe", str, "a name"), ("seed", int, "a whole number")):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise UserError(f"{name} is {value!r}, but must be {words}: correct the configuration.")

    def as_dict(self) -> dict[str, Any]:
        """For files: without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def require(self, saved: Mapping[str, Any], where: str) -> None:
        """Reject a checkpoint that was trained otherwise. A seed or products that it does not name were not known to it.

        Raises:
            UserError: with the first setting that differs.
        """
        for name, mine in asdict(self).items():
            before = saved.get(name, None if name in ("only", "skip") else mine)
            if before != mine:
                raise UserError(
                    f"{where} was trained with {name}={before!r}, not with {name}={mine!r}: give it what it was trained with."
                )


def convert(
    model: nn.Module,
    recipe: str,
    *,
    seed: int = 0,
    products: str = "fast",
    fuse: bool = True,
    only: Choice | None = None,
    skip: Choice | None = None,
    allow_converted: bool = False,
) -> Settings:
    """`fourbit.convert`; returns what a file is to say of it.

    Args:
        allow_converted: take a model that is converted already, by the same recipe and choice of layers.

    Raises:
        UserError: as `fourbit.convert`, or the model was converted otherwise.
    """
    seen_only, seen_skip = _recorded(only), _recorded(skip)
    converted = any(not isinstance(layer, MatMul) for layer in quantized_layers(model).values())
    if allow_converted and converted:
        _require_converted(model, recipe, seen_only, seen_skip)
    else:
        kind = cast("Products", products)  # refused there if it is none
        recipes.convert(model, recipe, seed=seed, products=kind, fuse=fuse, only=seen_only, skip=seen_skip)
    return Settings(recipe, seed, products, _expression(seen_only), _expression(seen_skip))


def _require_converted(model: nn.Module, recipe: str, only: Choice | None, skip: Choice | None) -> None:
    """A phase has specs of its own: of a recipe with phases, layers alone are compared."""
    found = recipes.get(recipe)
    for a in assign(model, found, only, skip):
        wanted = a.rule.spec if a.rule is not None else None
        spec = None if a.quantized is None else a.quantized.spec
        if (spec is None) != (wanted is None) or (spec != wanted and not found.phases):
            raise UserError(
                f"the model is converted already, and {a.name or 'its layer'} otherwise than by {recipe} with this only and "
                "skip: name no recipe, or give a model that is not converted."
            )


class _Recorded:
    """A predicate that keeps the names which it has chosen."""

    def __init__(self, predicate: Callable[[str, nn.Module], bool]):
        functools.update_wrapper(self, predicate)
        self._predicate = predicate
        self.names: list[str] = []

    def __call__(self, name: str, module: nn.Module) -> bool:
        chosen = bool(self._predicate(name, module))
        if chosen:
            self.names.append(name)
        return chosen


def _recorded(choice: Choice | None) -> Choice | None:
    return _Recorded(choice) if callable(choice) else choice


def _expression(choice: Choice | None) -> str | None:
    if isinstance(choice, _Recorded):
        return f"^({'|'.join(map(re.escape, choice.names))})$"
    return choice  # type: ignore[return-value]
