"""The recipes by name. A new recipe is one constant in a file of this package, with its citation.

paper      the paper's method, its variations, and LUQ
blocks     block-scaled 4-bit formats: MXFP4, NVFP4 and what follows them
variants   block-scaled recipes that differ in one thing each, for experiments
baselines  8 bits, and 4 bits in the forward pass alone
"""

from __future__ import annotations  # noqa: I001, recipes are listed in the order of these imports

from fourbit.recipes._file import is_file, read_recipe
from fourbit.recipes._rule import Recipe
from fourbit.recipes.catalog._base import CATALOG as CATALOG
from fourbit.recipes.catalog.paper import FP8_GRADIENTS as FP8_GRADIENTS
from fourbit.recipes.catalog.paper import FP16 as FP16
from fourbit.recipes.catalog.paper import IBM2020 as IBM2020
from fourbit.recipes.catalog.paper import IBM2020_DW8 as IBM2020_DW8
from fourbit.recipes.catalog.paper import IBM2020_NO_TPR as IBM2020_NO_TPR
from fourbit.recipes.catalog.paper import INT4_FORWARD as INT4_FORWARD
from fourbit.recipes.catalog.paper import LUQ as LUQ
from fourbit.recipes.catalog.paper import TPR as TPR
from fourbit.recipes.catalog.blocks import MXFP4 as MXFP4
from fourbit.recipes.catalog.blocks import NVFP4 as NVFP4
from fourbit.recipes.catalog.variants import MXFP4_CEIL as MXFP4_CEIL
from fourbit.recipes.catalog.baselines import MXFP8 as MXFP8


def get(recipe: str) -> Recipe:
    """The recipe of that name, or in that file (path/to/recipe.toml).

    Raises:
        UserError: no such name (the message has the nearest ones) or file, or something wrong in the file.
    """
    return read_recipe(recipe) if is_file(recipe) else CATALOG[recipe]


def names() -> list[str]:
    """Names of all recipes."""
    return list(CATALOG)
