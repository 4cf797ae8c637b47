"""What a person sees of a run: a bar in a terminal, one line per epoch anywhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WIDTH = 120
"""Width of lines that do not go to a terminal, so that they are not wrapped at 80 columns."""


def make_console() -> Console:
    """Standard output; plain text without wrapping where it is not a terminal."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


class Display:
    """Shows the progress of one run.

    Args:
        total_steps: optimizer steps of the whole run.
        epochs: its epochs.
        bar: whether to show the bar, if the output is a terminal.
        active: False shows nothing at all (other processes than the first).
        title: stands before the epoch.
    """

    def __init__(self, total_steps: int, epochs: int, *, bar: bool = True, active: bool = True, title: str = ""):
        self.console = make_console()
        self.epochs, self.active, self.title = epochs, active, title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (bar and active and self.console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total_steps, status="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, epoch: int, figures: str, rate: float, items: str) -> None:
        """Move the bar. The figures are means since the last line of metrics.jsonl, the rate is in items per second."""
        self._bar.update(
            self._task,
            completed=step,
            description=f"{self.title} epoch {epoch + 1}/{self.epochs}".strip(),
            status=f"{figures}  {rate:.0f} {items}/s",
        )

    def say(self, line: str) -> None:
        """Print a line; above the bar if there is one."""
        if self.active:
            self.console.print(line, markup=False, soft_wrap=True)
