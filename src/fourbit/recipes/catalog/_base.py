"""The registry that the files of this package enter their recipes into."""

from __future__ import annotations

from fourbit._registry import Registry
from fourbit.recipes._rule import Recipe

CATALOG: Registry[Recipe] = Registry("recipe")
"""Every recipe of this package, by name."""
