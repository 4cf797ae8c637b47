"""`export`: a model into a folder, with a card."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fourbit._files import problem
from fourbit.errors import UserError
from fourbit.exports._card import card
from fourbit.exports._fold import Folds, find_folds
from fourbit.exports._target import TARGETS, Target
from fourbit.exports._weights import evaluating


def export(
    model: nn.Module,
    folder: str | Path,
    to: str = "onnx",
    *,
    input_shape: Sequence[int] | None = None,
    recipe: str = "",
    results: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    fold_batch_norm: bool = False,
) -> Path:
    """Write a converted model as packed 4-bit weights with their scales, in a layout that other programs read.

    Args:
        model: converted, and trained, so that its scales are decided. It is left as it was.
        folder: new or empty.
        to: "onnx", "safetensors", "compressed-tensors" or "gguf" (`TARGETS`).
        input_shape: for ONNX, of one example: (3, 32, 32). None: as the network's first layer takes it.
        recipe, results, environment: for the card, README.md.
        fold_batch_norm: f = gamma / sqrt(var + eps) goes into the scales of the rows of the weight in front of each batch
            normalization, and (b - mean) f + beta is its bias. Codes keep their magnitudes. A warning names the normalizations
            that stay, with the reasons. The rounding of such a layer's result to 16 bits is left out.

    Returns:
        The folder.

    Raises:
        UserError: a layer that the layout cannot hold (the message says which recipes can), a package that is missing, a folder
            that is taken; batch normalization to be folded in a model that torch.fx cannot trace.

    >>> import torch, tempfile, fourbit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    >>> _ = fourbit.convert(model, "nvfp4-qat")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in export(model, folder, to="safetensors").iterdir())
    ['README.md', 'model.safetensors']
    """
    target: Target = TARGETS[to]
    folder = Path(folder)
    with evaluating(model) as layers:
        target.require(layers)
        folds = Folds()
        if fold_batch_norm:
            if target.fold_scales is None:
                raise UserError(
                    f"{target.name} cannot leave out modules of the model, as folded batch normalization is."
                )
            folds = find_folds(model, input_shape, target.fold_scales)
    fresh = not folder.exists()
    try:
        if not fresh and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty: name another folder for the export.")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            target.write(model, folder, input_shape, folds)
            text = card(model, target, recipe, results or {}, environment or {}, folds)
            (folder / "README.md").write_text(text, encoding="utf-8")
        except BaseException:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if fresh:
                folder.rmdir()
            raise
    except OSError as error:
        raise UserError(f"the export could not be written to {folder}: {problem(error, folder)}.") from error
    if folds.left:
        kept = "; ".join(f"{name} {reason}" for name, reason in folds.left.items())
        warnings.warn(f"batch normalization that is not folded: {kept}.", stacklevel=2)
    return folder
