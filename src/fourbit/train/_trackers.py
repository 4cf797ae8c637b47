"""The same numbers as in metrics.jsonl, in TensorBoard, Weights & Biases or Trackio: accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourbit.errors import UserError
from fourbit.train._folder import writing

PROJECT = "fourbit"
"""What runs are filed under in wandb and trackio."""
TENSORBOARD = "tb"
"""TensorBoard's folder in that of a run."""


class Board:
    """Writes scalars to trackers; does nothing when made with no names.

    Args:
        names: of `train._config.TRACKERS`.
        folder: of the run.
        step: steps done already; what an interrupted run has written to TensorBoard after them is hidden.
        config: of the run, for those that show it.

    Raises:
        UserError: a tracker is not installed, or does not start.
    """

    def __init__(self, names: Sequence[str], folder: Path, step: int = 0, config: Mapping[str, Any] | None = None):
        self._folder = folder
        self._trackers: list[Any] = []
        for name in names:
            try:
                self._trackers.append(_started(name, folder, step))
            except BaseException:
                self.close()
                raise
        for tracker in self._trackers:
            if tracker.name != "tensorboard":  # which would write them as a run of their own
                tracker.store_init_configuration(dict(config or {}))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One point per name; values that are None are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        with writing(self._folder / TENSORBOARD):
            for tracker in self._trackers:
                tracker.log(known, step=step)

    def close(self) -> None:
        """Write what is still in memory."""
        with writing(self._folder / TENSORBOARD):
            for tracker in self._trackers:
                tracker.finish()


def _started(name: str, folder: Path, step: int) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in {str(known) for known in get_available_trackers()}:
        install = "'fourbit[train]'" if name == "tensorboard" else name
        raise UserError(f"{name} is not installed: pip install {install}, or leave it out of --log-to.")
    cls = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = cls(TENSORBOARD, str(folder), purge_step=step + 1 if step else None)
    else:
        more = {"dir": str(folder)} if name == "wandb" else {"resume": "allow" if step else "never"}
        tracker = cls(PROJECT, name=folder.name, **more)
    try:
        with writing(folder / TENSORBOARD):
            tracker.start()
    except UserError:
        raise
    except Exception as error:  # no account, no network: each library has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} does not start ({reason}): correct that, or leave it out of --log-to.") from error
    return tracker
