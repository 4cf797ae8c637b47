"""Commands that show what there is to choose from: formats, recipes, models, data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from fourbit.cli._app import app
from fourbit.cli._terminal import make_table, say, show
from fourbit.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


@app.command
def formats(name: str | None = None, *, png: Path | None = None) -> None:
    """List the number formats and block-scaled formats, or show one code by code.

    Args:
        name: Format to show in full: every code with its value (of wide formats: every binade), and where rounding decides.
        png: Draw the format to this file.
    """
    from fourbit.cli._format_pages import list_formats, show_block_format, show_format
    from fourbit.formats import BLOCKS, get

    if name is not None and name in BLOCKS:
        if png is not None:
            raise UserError(
                f"{name} is block-scaled and has no picture: draw its elements, {BLOCKS[name].element.name}."
            )
        return show_block_format(BLOCKS[name])
    if name is not None:
        return show_format(get(name), png)
    if png is not None:
        raise UserError("--png needs the name of a format, as in: fourbit formats fp4_r4_even --png grid.png.")
    return list_formats()


recipes_app = App(name="recipes", help="List the recipes, show the rules of one, write one to a file, or compare two.")
app.command(recipes_app)


@recipes_app.command
def save(name: str, *, to: Path | None = None) -> None:
    """Write a recipe to a file, to change it and train with it: fourbit train --recipe FILE.

    Args:
        name: Recipe, or file of one.
        to: File; its name ends in .toml. None: NAME.toml here.
    """
    from fourbit.recipes import get, write_recipe

    recipe = get(name)
    path = Path(f"{recipe.name}.toml") if to is None else to
    if path.suffix != ".toml":
        raise UserError(f"{path} is not the name of a recipe's file: give one that ends in .toml.")
    if path.exists():
        raise UserError(f"{path} exists: choose another --to.")
    write_recipe(recipe, path)
    say(f"saved: {path}")


@recipes_app.command
def diff(first: str, second: str) -> None:
    """Show what two recipes have different.

    Args:
        first: Recipe, or file of one.
        second: Recipe, or file of one.
    """
    from fourbit.recipes import differences, get

    say("\n".join(differences(get(first), get(second))) or "no difference")


@recipes_app.default
def recipes(name: str | None = None) -> None:
    """List the recipes, or show the rules of one.

    Args:
        name: Recipe to show in full, or file of one.
    """
    from fourbit.ops import SLOTS
    from fourbit.recipes import CATALOG, get

    if name is None:
        table = make_table("recipe", "what it does", "source")
        for each in CATALOG.values():
            table.add_row(each.name, each.summary, each.source)
        return show(table)
    recipe = get(name)
    say(f"{recipe.name}: {recipe.summary}\nsource: {recipe.source or '-'}\nthe first rule that matches a layer wins:")
    for number, rule in enumerate(recipe.rules, 1):
        say(f"\n{number}. {rule}{' (may match nothing)' if rule.optional else ''}")
        if rule.spec is None:
            say("   full precision")
            continue
        for slot in SLOTS:
            value = getattr(rule.spec, slot)
            say(f"   {slot:8} {'full precision' if value is None else value}")
        say(f"   output   {rule.spec.output or 'float32'}")
    for each in (*recipe.phases, *recipe.upkeep):
        say(f"\n{each}")
    return None


@app.command
def models() -> None:
    """List the networks."""
    from fourbit.models._base import MODELS

    show(_documented("model", MODELS))


@app.command
def data() -> None:
    """List the data sets."""
    from fourbit.data._load import hub_loader
    from fourbit.data._registered import DATASETS

    show(_documented("data set", {**DATASETS, "hf:OWNER/NAME": hub_loader("hf:OWNER/NAME")}))


def _documented(kind: str, functions: Mapping[str, object]) -> Table:
    """Names, and the first sentence of the docstring of what is registered under them."""
    table = make_table(kind, "description")
    for name, function in functions.items():
        table.add_row(name, " ".join((function.__doc__ or "").strip().split("\n\n")[0].split()))
    return table
