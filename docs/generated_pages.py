"""Pages that are made from the package itself: recipes, formats with their pictures, the commands, the Python interface."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from drawings import draw_all

WIDE = 110
"""Columns of a terminal's page."""

DRAWN = 6
"""Bits of the widest format whose numbers are drawn."""


def write_all(folder: Path) -> None:
    """Write every generated page into `folder`, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, write in (
        ("recipes", write_recipes),
        ("formats", write_formats),
        ("commands", write_commands),
        ("api", write_interface),
        ("drawings", draw_all),
    ):
        (folder / name).mkdir(parents=True)
        write(folder / name)


def printed(*words: str) -> str:
    """What a command prints, in a block of its own."""
    from fourbit.cli import main

    text = io.StringIO()
    os.environ["COLUMNS"] = str(WIDE)
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main(list(words))
    return "```text\n" + "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n") + "\n```\n"


def contents(names: Iterable[str]) -> str:
    """The hidden list of pages that a page stands above."""
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```", ""])


def write_recipes(folder: Path) -> None:
    """A table of the recipes, and a page of each with its rules."""
    from fourbit import recipes
    from fourbit.recipes.catalog import variants

    single = set(variants.NAMES)
    rows = [f"| [`{n}`]({n}.md) | {cell(recipes.get(n).summary)} |" for n in recipes.names() if n not in single]
    more = [f"| [`{n}`]({n}.md) | {cell(recipes.get(n).summary)} |" for n in recipes.names() if n in single]
    head = "| recipe | what it is |\n|---|---|\n"
    for name in recipes.names():
        page(folder / f"{name}.md", name, printed("recipes", name), f"\nUse: `fb.convert(model, {name!r})`.\n")
    text = (
        "A recipe says for each layer, and for each operand of its three products, what that operand is rounded to. "
        "`fourbit recipes NAME` prints one, `fourbit recipes save NAME` writes it to a file that you can change, and "
        "`fourbit recipes diff A B` compares two.\n\n" + head + "\n".join(rows) + "\n"
    )
    if more:
        text += (
            "\n## Recipes that differ in one thing\n\nFor experiments: each is another recipe but for what its name says.\n\n"
            + head
            + "\n".join(more)
            + "\n"
        )
    page(folder / "index.md", "Recipes", text, contents(recipes.names()))


def write_formats(folder: Path) -> None:
    """A table of the formats, and a page of each with its number line."""
    from fourbit.formats import BLOCKS, CATALOG
    from fourbit.report import draw_number_line

    rows, block_rows = [], []
    for name, each in CATALOG.items():
        picture = ""
        if each.bits <= DRAWN:
            draw_number_line(each).savefig(folder / f"{name}.svg", format="svg", metadata={"Date": None})
            picture = f"![The numbers of {name}]({name}.svg)\n\n"
        page(folder / f"{name}.md", name, picture, printed("formats", name))
        rows.append(f"| [`{name}`]({name}.md) | {each.bits} | {cell(each.summary)} |")
    for name, block in BLOCKS.items():
        page(folder / f"{name}.md", name, printed("formats", name))
        block_rows.append(f"| [`{name}`]({name}.md) | {block.bits:g} | {cell(block.summary)} |")
    page(
        folder / "index.md",
        "Formats",
        "A format is the list of its numbers: every other quantity, such as where rounding decides, follows from it.\n\n",
        "| format | bits | numbers |\n|---|---:|---|\n" + "\n".join(rows) + "\n",
        "\n## Formats of blocks\n\nNeighbours share a scale, which has a format of its own. "
        "Bits are per element, scales counted.\n\n",
        "| format | bits | definition |\n|---|---:|---|\n" + "\n".join(block_rows) + "\n\n",
        contents([*CATALOG, *BLOCKS]),
    )


def write_commands(folder: Path) -> None:
    """The help of every command."""
    from fourbit.cli._app import app

    names = [name for name in app if not name.startswith("-")]
    parts = [f"\n## fourbit {name}\n\n{printed(name, '--help')}" for name in names]
    page(folder / "index.md", "Commands", *parts)


def write_interface(folder: Path) -> None:
    """The public names with their docstrings, by the module that they are written in."""
    packages: dict[str, str] = {
        "fourbit": "What a script needs, as `import fourbit as fb`",
        "fourbit.formats": "Number formats, without torch",
        "fourbit.quantizers": "Scales, rounding, tiles",
        "fourbit.ops": "Products of quantized operands",
        "fourbit.nn": "Layers and observation",
        "fourbit.recipes": "Rules, selectors, phases",
        "fourbit.models": "Networks by name",
        "fourbit.data": "Data sets by name",
        "fourbit.train": "The trainer",
        "fourbit.report": "Reports and pictures",
        "fourbit.exports": "Trained models for other programs",
        "fourbit.conform": "Checks of any quantizer",
        "fourbit.backends": "Which kernels compute what",
        "fourbit.integrations.transformers": "transformers' Trainer",
        "fourbit.integrations.lightning": "Lightning",
        "fourbit.integrations.ddp": "Gradients between processes",
    }
    shown: set[int] = set()
    for package, title in packages.items():
        page(folder / f"{package}.md", package, f"{title}.\n\n", *documented(package, shown))
    rows = "\n".join(f"| [`{package}`]({package}.md) | {title} |" for package, title in packages.items())
    page(
        folder / "index.md",
        "Python interface",
        f"| module | what it holds |\n|---|---|\n{rows}\n\n",
        contents(packages),
    )


def documented(package: str, shown: set[int]) -> list[str]:
    """A directive for each public class and function of a module; `shown` has what earlier pages have."""
    import importlib

    module = importlib.import_module(package)
    names = [n for n in getattr(module, "__all__", vars(module)) if not n.startswith("_")]
    found = []
    for name in names:
        each = getattr(module, name)
        if inspect.isclass(each) or inspect.isfunction(each):
            if not f"{each.__module__}.".startswith(f"{package}."):
                continue  # what the module merely imports
            kind = "autoclass" if inspect.isclass(each) else "autofunction"
            options = "   :members:\n" if kind == "autoclass" and not issubclass(each, tuple) else ""
            other = "   :no-index:\n" if id(each) in shown else ""
            shown.add(id(each))
            found.append(f"```{{eval-rst}}\n.. {kind}:: {package}.{name}\n{other}{options}```\n\n")
    return found


def page(path: Path, title: str, *parts: str) -> None:
    """Write a page in Markdown."""
    path.write_text(f"# {title}\n\n" + "".join(parts))


def cell(text: str) -> str:
    """Text in a table."""
    return text.replace("|", "\\|").replace("\n", " ")
