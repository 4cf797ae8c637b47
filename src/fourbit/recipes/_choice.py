"""Which layers of a model a recipe is for: `only` and `skip`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping

from torch import nn

from fourbit.errors import UserError

Choice = str | Callable[[str, nn.Module], bool]
"""A regular expression of which a layer's dotted name contains a match, or a predicate (name, module) -> bool."""


def left_out(layers: Mapping[str, nn.Module], only: Choice | None, skip: Choice | None) -> dict[str, str]:
    """The layers that are not to be converted, and why.

    Args:
        layers: all that can be converted, by name.

    Raises:
        UserError: `only` or `skip` is neither a regular expression nor a predicate, or chooses nothing; or together they leave
            no layer.
    """
    reasons = {}
    for argument, choice in (("only", only), ("skip", skip)):
        if choice is None:
            continue
        chosen = _chosen(argument, choice, layers)
        for name in layers:
            if (name in chosen) == (argument == "skip"):
                verb = "chosen by" if argument == "skip" else "not chosen by"
                reasons.setdefault(name, f"{verb} {_shown(argument, choice)}: stays in full precision")
    if len(reasons) == len(layers):
        raise UserError("only and skip leave no layer to convert: choose fewer with skip, or more with only")
    return reasons


def require_choice(argument: str, choice: Choice | None) -> None:
    """Reject what is neither a regular expression nor a predicate.

    Raises:
        UserError: with the argument's name.
    """
    if choice is None or callable(choice):
        return
    if not isinstance(choice, str) or not choice:
        raise UserError(
            f"{argument} is {choice!r}, but must be a regular expression over names of layers, or a predicate (name, module)"
        )
    try:
        re.compile(choice)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{argument} is {choice!r}, which is not a regular expression ({error}): escape special characters"
        ) from error


def _chosen(argument: str, choice: Choice, layers: Mapping[str, nn.Module]) -> set[str]:
    require_choice(argument, choice)
    if callable(choice):
        chosen = {name for name, module in layers.items() if choice(name, module)}
    else:
        chosen = {name for name in layers if re.search(choice, name)}
    if not chosen:
        near = difflib.get_close_matches(choice, layers, n=3, cutoff=0.3) if isinstance(choice, str) else []
        names = near or list(layers)[:3]
        raise UserError(
            f"{_shown(argument, choice)} chooses no layer that can be converted: give one that matches, such as "
            f"{', '.join(map(repr, names))}"
        )
    return chosen


def _shown(argument: str, choice: Choice) -> str:
    return f"{argument} {choice!r}" if isinstance(choice, str) else f"{argument} {getattr(choice, '__name__', choice)}"
