"""The same numbers as in metrics.jsonl, as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourbit.errors import UserError
from fourbit.train._folder import writing


class Board:
    """Writes scalars to a folder; does nothing when made with `folder` None.

    Args:
        folder: where to.
        step: steps done already; what an interrupted run wrote after them is hidden.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self._folder, self._writer = folder, None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tensorboard is not installed: pip install 'fourbit[train]', or add --no-tensorboard."
            ) from error
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One point per name; values that are None are left out."""
        if self._writer is None or self._folder is None:
            return
        with writing(self._folder):
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None and self._folder is not None:
            with writing(self._folder):
                self._writer.close()
