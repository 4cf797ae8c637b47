"""How a model was converted, in words that a checkpoint holds: what a run that goes on, and `from_pretrained`, convert by."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fourbit import recipes
from fourbit.errors import UserError
from fourbit.nn import MatMul, quantized_layers
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
    only: Choice | None = None,
    skip: Choice | None = None,
    allow_converted: bool = False,
    **options: Any,
) -> Settings:
    """`fourbit.convert`; returns what a file is to say of it.

    Args:
        allow_converted: take a model that is converted already, by the same recipe and choice of layers.

    Raises:
        UserError: as `fourbit.convert`, or the model was converted otherwise.
    """
    chosen: dict[str, Any] = {"only": only, "skip": skip}
    seen = {name: _Recorded(choice) for name, choice in chosen.items() if callable(choice)}
    converted = any(not isinstance(layer, MatMul) for layer in quantized_layers(model).values())
    if allow_converted and converted:
        _require_converted(model, recipe, **(chosen | seen))
    else:
        recipes.convert(model, recipe, **options, **(chosen | seen))
    words = {name: seen[name].expression() if name in seen else choice for name, choice in chosen.items()}
    kept = {name: value for name, value in options.items() if name in ("seed", "products")}
    return Settings(recipe, **kept, **words)


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

    def __init__(self, predicate: Any):
        functools.update_wrapper(self, predicate)
        self._predicate, self._names = predicate, []

    def __call__(self, name: str, module: nn.Module) -> bool:
        chosen = bool(self._predicate(name, module))
        if chosen:
            self._names.append(name)
        return chosen

    def expression(self) -> str:
        return f"^({'|'.join(map(re.escape, self._names))})$"
