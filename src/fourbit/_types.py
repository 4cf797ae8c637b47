"""The types of a configuration's fields, checked: they may come from a program or a file."""

from __future__ import annotations

import functools
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from fourbit.errors import UserError

COUNTABLE = 2**63
"""Whole numbers lie below this."""

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    Path: "a pathlib.Path",
    types.NoneType: "None",
}


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The type of each field, None among several apart."""
    return typing.get_type_hints(cls)


def require_types(config: Any) -> None:
    """Reject a configuration with a field of another type than it is declared with. Choices (Literal) are checked elsewhere.

    Raises:
        UserError: the first such field.
    """
    for field, hint in hints_of(type(config)).items():
        value = getattr(config, field)
        if not fits(value, hint):
            raise UserError(f"{field} is {reprlib.repr(value)}, but must be {words(hint)}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inside)
    if origin is Literal:
        return True
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, inside[0]) for item in value)
    if hint is float:
        return isinstance(value, float) or fits(value, int)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < COUNTABLE
    if isinstance(value, str | Path) and "\0" in str(value):
        return False
    return isinstance(value, hint)


def words(hint: Any) -> str:
    """What a value of a type is called."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(each) for each in inside)
    if origin is tuple:
        return f"a tuple, each item {words(inside[0])}"
    return _WORDS[hint]
