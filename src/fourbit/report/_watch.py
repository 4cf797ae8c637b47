"""Curves of runs that are going on: a picture that updates in a notebook, a line for each news anywhere else.

    fourbit.report.watch("runs/compare")                     # runs of another process; returns when they are over

    with fourbit.report.watching("runs/a"):                  # a run of this one
        fourbit.train.train(config)

Files are the interface: what is shown is read from the run folders again every few seconds.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fourbit.errors import UserError
from fourbit.report._curves import loss_curves, training_curves
from fourbit.report._groups import group_runs, metrics
from fourbit.report._metric import decimal, name, unit
from fourbit.report._read import Run, load_runs, number, text
from fourbit.report._style import DPI, style

PATIENCE_S = 60.0
"""A folder of several runs, of which all have ended, is over when nothing has happened for so long: the next may follow."""


def watch(path: str | Path, *, every: float = 2.0) -> None:
    """Show the curves of a run, or of all runs in a folder, until they are over or Ctrl-C (the notebook's stop) comes.

    In a notebook, one picture of training loss and metric is replaced whenever there is news. Elsewhere, in a terminal and in
    a pipe, each run has a line when there is news of it: step, loss, metric.

    Args:
        path: a run folder, or one with runs; it need not exist yet.
        every: seconds between two looks.

    Raises:
        UserError: a file there that no trainer wrote, or `every` is not above 0.
    """
    view = _View(Path(path), every)
    try:
        while not view.update():
            time.sleep(every)
    except KeyboardInterrupt:
        view.update()


@contextmanager
def watching(path: str | Path, *, every: float = 2.0) -> Iterator[None]:
    """`watch` while the block runs, in a thread of its own: for a run of this process. Errors end the view, not the block."""
    view, stop = _View(Path(path), every), threading.Event()

    def look() -> None:
        try:
            while not stop.is_set():
                stop.wait(every)
                view.update()
        except Exception as error:  # whatever it is, the run goes on
            print(f"fourbit: nothing more is shown of {path}: {error}", file=sys.stderr)

    thread = threading.Thread(target=look, name="fourbit.report.watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _View:
    """What has been shown so far."""

    def __init__(self, path: Path, every: float):
        if not every > 0:
            raise UserError(f"every is {every!r}, but must be a number of seconds above 0.")
        self.path = path
        self._display = _notebook_display()
        self._handle: Any = None
        self._lines: dict[Path, str] = {}
        self._changed = time.monotonic()

    def update(self) -> bool:
        """Look, and show what is new; returns whether the runs are over."""
        runs = _runs(self.path)
        lines = {run.path: _line(run) for run in runs}
        fresh = [line for path, line in lines.items() if self._lines.get(path) != line]
        if fresh:
            self._changed, self._lines = time.monotonic(), lines
            if self._display is None:
                print("\n".join(fresh), flush=True)
            else:
                self._show(_picture(runs), list(lines.values()))
        if not runs or any(run.final is None for run in runs):
            return False
        return (self.path / "config.json").exists() or time.monotonic() - self._changed > PATIENCE_S

    def _show(self, png: bytes | None, lines: list[str]) -> None:
        assert self._display is not None
        bundle: dict[str, Any] = {"text/plain": "\n".join(lines)}
        if png is not None:
            bundle["image/png"] = png
        if self._handle is None:
            self._handle = self._display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _notebook_display() -> Callable[..., Any] | None:
    """IPython's `display`, where pictures can be seen: in the kernel of a notebook, and not in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display  # type: ignore[import-not-found]

    return display


def _runs(path: Path) -> list[Run]:
    """None as long as there are none."""
    if not any(path.rglob("metrics.jsonl")):
        return []
    return load_runs([path])


def _line(run: Run) -> str:
    """The state of a run in a line."""
    parts = [text(run.path.name), f"step {run.num_steps}"]
    loss = number(run.steps[-1].get("loss")) if run.steps else run.train_loss
    if loss == loss:
        parts.append(f"loss {decimal(loss, 4)}")
    if run.metric and run.result == run.result:
        parts.append(f"test {name(run.metric)} {decimal(run.result)}{unit(run.metric)}")
    return "  ".join([*parts, *([run.status] if run.final is not None else [])])


def _picture(runs: list[Run]) -> bytes | None:
    """Loss and metric of all runs as PNG; None before the first step. Of several metrics, the first."""
    groups = group_runs(runs)
    with style():
        plot = next((plot for metric in metrics(groups) if (plot := training_curves(groups, metric))), None)
        figure: Figure | None = loss_curves(groups) if plot is None else plot.figure
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
