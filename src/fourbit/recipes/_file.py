"""Recipes as files: TOML, with the names and defaults of the classes.

    name = "mine"

    [[rules]]
    label = "first and last"
    where = "first(1) | last(1)"
    spec = "full precision"

    [[rules]]
    label = "every other layer"
    spec.x_fprop = { format = "int4_sym", scaling = { type = "Amax" }, granularity = "row" }
    spec.w_fprop = { format = "int4_sym", scaling = { type = "Sawb" } }
    spec.g_dgrad = "full precision"

A field that is left out has its default. Reading one executes nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import operator
import reprlib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from fourbit import _files
from fourbit._types import fits, hints_of, words
from fourbit.errors import UserError, unknown
from fourbit.formats import CATALOG as FORMATS
from fourbit.formats import Format
from fourbit.nn import SWAPS, MatMul, OsciReset, OutControl, QEma, QRamping
from fourbit.nn._upkeep import UpkeepSpec
from fourbit.ops import REUSE, Accumulation, LayerSpec
from fourbit.ops._spec import Reuse
from fourbit.quantizers import (
    Amax,
    BlockScale,
    ClipValue,
    FixedScale,
    GradScale,
    LossScaled,
    QuantSpec,
    Sawb,
    StepSize,
)
from fourbit.quantizers._scaling import Scaling
from fourbit.recipes import _rule
from fourbit.recipes._rule import Recipe, Selector

SUFFIX = ".toml"
FULL = "full precision"
"""None, where it stands for no quantization."""

NONE = "none"
"""None elsewhere."""

KINDS: dict[type, dict[str, type]] = {
    Scaling: {
        cls.__name__: cls for cls in (FixedScale, Amax, Sawb, ClipValue, GradScale, LossScaled, BlockScale, StepSize)
    },
    UpkeepSpec: {cls.__name__: cls for cls in (QEma, QRamping, OsciReset, OutControl)},
}
"""Classes that a table names by its `type`, by what they have in common."""
_KIND = {Scaling: "scaling", UpkeepSpec: "upkeep"}
SELECTORS: dict[str, Callable[..., Selector]] = {
    function.__name__: function
    for function in (
        _rule.first,
        _rule.last,
        _rule.last_share,
        _rule.name,
        _rule.kernel_size,
        _rule.depthwise,
        _rule.widens,
    )
}
_TABLES = (LayerSpec, QuantSpec, Accumulation)


def is_file(recipe: str) -> bool:
    """Whether the name of a recipe is that of a file."""
    return recipe.endswith(SUFFIX)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        UserError: no such file, or something in it is wrong; the message says where.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise UserError(f"the recipe {path} cannot be read ({reason}): check the name of the file.") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """The recipe in the text of such a file; `source` names it in errors.

    Raises:
        UserError: something in it is wrong; the message says where.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{source} is not a TOML file ({error}): correct that place.") from error
    try:
        return _decoded(document, Recipe, "recipe")
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def recipe_text(recipe: Recipe) -> str:
    """The file of a recipe.

    Raises:
        UserError: it has a format, a class or a selector that has no name.
    """
    document = _encoded(recipe)
    rules, several = document.pop("rules"), {name: document.pop(name, []) for name in ("phases", "upkeep")}
    lines = [f"{key} = {_toml(value)}" for key, value in document.items()]
    for name, tables in several.items():
        for table in tables:
            lines += ["", f"[[{name}]]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    for rule in rules:
        spec = rule.pop("spec")
        lines += ["", "[[rules]]", *(f"{key} = {_toml(value)}" for key, value in rule.items())]
        if isinstance(spec, str):
            lines.append(f"spec = {_toml(spec)}")
        else:
            lines += [f"spec.{key} = {_toml(value)}" for key, value in spec.items()] or ["spec = {}"]
    return "\n".join(lines) + "\n"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe to a file, all of it or nothing.

    Raises:
        UserError: it cannot be written down, or not there.
    """
    text = recipe_text(recipe)
    try:
        _files.replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} could not be written: {_files.problem(error, path)}.") from error


# to plain values


def _encoded(value: Any) -> Any:
    """The fields of a dataclass that differ from their defaults, as TOML has them."""
    found: dict[str, Any] = {"type": type(value).__name__} if isinstance(value, tuple(KINDS)) else {}
    for field in dataclasses.fields(value):
        item, default = getattr(value, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if item is default or (type(item) is type(default) and item == default):
            continue
        hint = hints_of(type(value))[field.name]
        found[field.name] = _plain(item, FULL if any(c in _members(hint) for c in _TABLES) else NONE)
    return found


def _plain(item: Any, none: str) -> Any:
    if item is None:
        return none
    if isinstance(item, Format):
        if FORMATS.get(item.name) != item:
            raise UserError(f"the format {item.name} is not in the catalogue, and cannot be written by its name")
        return item.name
    if isinstance(item, Selector):
        _selector(str(item))
        return str(item)
    if isinstance(item, Enum):
        return item.value
    if isinstance(item, type):
        if _classes().get(item.__name__) is not item:
            raise UserError(f"a rule is for {item.__name__}, which is none of the layers that are converted")
        return item.__name__
    if dataclasses.is_dataclass(item):
        return _encoded(item) or {}
    return [_plain(each, none) for each in item] if isinstance(item, tuple) else item


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


# from plain values


def _decoded(table: Any, cls: type, place: str) -> Any:
    """A dataclass from its table."""
    if not isinstance(table, dict):
        raise UserError(f"{place} is {reprlib.repr(table)}, but must be a table with the fields of a {cls.__name__}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = hints_of(cls)
    values = {}
    for key, item in table.items():
        if key not in fields:
            raise UserError(f"{place}: {unknown(f'field of {cls.__name__}', key, fields)}")
        values[key] = _value(item, hints[key], f"{place}.{key}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise UserError(f"{place} has no {name}: add it.")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that it is."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _value(item: Any, hint: Any, place: str) -> Any:
    """A field's value from what the file has."""
    members = _members(hint)
    if item in (FULL, NONE) and isinstance(item, str) and types.NoneType in members:
        return None
    if item == REUSE.value and Reuse in members:
        return REUSE
    for cls in members:
        if cls is Format:
            return _named(item, FORMATS, "format", place)
        if cls in KINDS:
            if isinstance(item, str):
                item = {"type": item}
            if not isinstance(item, dict) or "type" not in item:
                example = next(iter(KINDS[cls]))
                raise UserError(
                    f'{place} is {reprlib.repr(item)}, but must be a table with a type, as {{ type = "{example}" }}.'
                )
            chosen = _named(item["type"], KINDS[cls], _KIND[cls], place)
            return _decoded({key: value for key, value in item.items() if key != "type"}, chosen, place)
        if cls is Selector:
            return _selector(item, place)
        if isinstance(cls, type) and issubclass(cls, Enum) and cls is not Reuse:
            return _named(item, {each.value: each for each in cls}, cls.__name__.lower(), place)
        if dataclasses.is_dataclass(cls) and isinstance(item, dict):
            return _decoded(item, cls, place)  # type: ignore[arg-type]
        if typing.get_origin(cls) is Literal and item in typing.get_args(cls) and isinstance(item, str):
            return item
        if typing.get_origin(cls) is tuple and isinstance(item, list):
            inside = typing.get_args(cls)[0]
            if typing.get_origin(inside) is type:
                return tuple(_named(each, _classes(), "layer", place) for each in item)
            return tuple(_value(each, inside, f"{place}[{n}]") for n, each in enumerate(item))
    plain = [cls for cls in members if cls in (int, float, bool, str)]
    for cls in plain:
        if fits(item, cls):
            return item
    must = [words(cls) for cls in plain]
    must += [", ".join(map(repr, typing.get_args(cls))) for cls in members if typing.get_origin(cls) is Literal]
    must += [f"a table of a {cls.__name__}" for cls in members if dataclasses.is_dataclass(cls)]  # type: ignore[union-attr]
    must += ["a list" for cls in members if typing.get_origin(cls) is tuple]
    must += [repr(FULL) for cls in (types.NoneType,) if cls in members]
    raise UserError(f"{place} is {reprlib.repr(item)}, but must be {' or '.join(must)}.")


def _named(item: Any, catalogue: Mapping[str, Any], kind: str, place: str) -> Any:
    if not isinstance(item, str) or item not in catalogue:
        raise UserError(f"{place}: {unknown(kind, item, catalogue)}")
    return catalogue[item]


@functools.cache
def _classes() -> dict[str, type]:
    """The layers that rules can be for, by name."""
    return {cls.__name__: cls for cls in (*SWAPS, MatMul)}


_OPERATIONS = {ast.BitOr: operator.or_, ast.BitAnd: operator.and_}


def _selector(text: Any, place: str = "selector") -> Selector:
    """The selector of an expression such as "first(1) | ~kernel_size(1)", of the functions of `SELECTORS` and constants."""
    wrong = UserError(
        f"{place} is {reprlib.repr(text)}, but must be made of {', '.join(SELECTORS)}, with | & ~ between them, as in "
        '"first(1) | last(1)".'
    )

    def made(node: ast.expr) -> Selector:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](made(node.left), made(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~made(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            function, values = SELECTORS.get(node.func.id), [ast.literal_eval(a) for a in node.args]
            if function is not None and all(isinstance(v, int | float | str) for v in values):
                hints = [h for n, h in typing.get_type_hints(function).items() if n != "return"]
                if len(values) <= len(hints) and all(fits(v, h) for v, h in zip(values, hints, strict=False)):
                    return function(*values)
        raise wrong

    if not isinstance(text, str) or len(text) > 10_000:
        raise wrong
    try:
        return made(ast.parse(text.strip(), mode="eval").body)
    except UserError:
        raise
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise wrong from None


def differences(first: Recipe, second: Recipe) -> list[str]:
    """What two recipes have different, a line each: the path to a field, and both values."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in dict.fromkeys((*a, *b)):
                walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        elif isinstance(a, list) and isinstance(b, list) and all(isinstance(each, dict) for each in (*a, *b)):
            for number in range(max(len(a), len(b))):
                first, second = (side[number] if number < len(side) else None for side in (a, b))
                walk(first, second, f"{path}[{number + 1}]")
        elif a != b:
            sides = ("(default)" if side is None else _toml(side) for side in (a, b))
            found.append(f"{path}: {' -> '.join(sides)}")

    walk(_encoded(first), _encoded(second), "")
    return found
