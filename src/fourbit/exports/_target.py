"""The catalogue of layouts that a model can be exported in."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fourbit import recipes
from fourbit._registry import Registry
from fourbit.errors import UserError
from fourbit.exports._fold import FLOAT32, Folds
from fourbit.nn import QuantizedLayer
from fourbit.ops import LayerSpec


@dataclass(frozen=True)
class Target:
    """A layout.

    Args:
        name: what `to` and --to call it.
        summary: what it is, in one line.
        objection: why a layer with a spec cannot be written, to stand behind its name; "" where it can.
        write: writes the files of a model into a folder that is there; the third argument is `input_shape` of `export`, the
            last says which batch normalizations are folded.
        file: the largest of them.
        package: that it needs.
        fold_scales: the smallest and the largest scale that folding batch normalization may make; None: it cannot be folded.
    """

    name: str
    summary: str
    objection: Callable[[LayerSpec], str]
    write: Callable[[nn.Module, Path, Sequence[int] | None, Folds], None]
    file: str
    package: str
    fold_scales: tuple[float, float] | None = FLOAT32

    def require(self, layers: dict[str, QuantizedLayer]) -> None:
        """Reject a model before anything is written.

        Raises:
            UserError: with the layer, and with the recipes that can; or the package that is missing.
        """
        for name, layer in layers.items():
            if not layer.spec.is_identity and (objection := self.objection(layer.spec)):
                raise UserError(
                    f"{self.name} cannot hold {name}, whose {objection}. Recipes that can: {_listed(able(self))}."
                )
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            raise UserError(
                f"--to {self.name} needs the package {self.package}: pip install 'fourbit[export]'."
            ) from error


TARGETS: Registry[Target] = Registry("export format")


def register(target: Target) -> None:
    """Enter a layout."""
    TARGETS.add(target.name, target)


def able(target: Target) -> list[str]:
    """The recipes of the catalogue with 4-bit weights that a layout can hold, if the layers are of its kinds."""
    return [name for name in recipes.CATALOG if _fits(target, [rule.spec for rule in recipes.CATALOG[name].rules])]


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _fits(target: Target, specs: list[LayerSpec | None]) -> bool:
    quantized = [spec for spec in specs if spec is not None and spec.w_fprop is not None]
    in_four_bits = any(len(spec.w_fprop.format.grid) <= 16 for spec in quantized if spec.w_fprop is not None)
    return in_four_bits and not any(target.objection(spec) for spec in specs if spec is not None)
