"""What all figures share: the registry, the runs that they look into, and the folder that they write to."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit._files import replace_file
from fourbit._registry import Registry
from fourbit.errors import UserError, unknown
from fourbit.reproduce._row import HALF_ONLY, SCALES, ScaleName, said_of
from fourbit.reproduce._sizes import require_whole
from fourbit.reproduce.questions import NETWORKS
from fourbit.train import CompareConfig, compare

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Interrupted(Exception):
    """A training run was stopped; the same call goes on with it."""


@dataclass(frozen=True)
class Drawn:
    """A figure that is finished, or `interrupted` before, and the folder of the runs that it shares with others."""

    name: str
    folder: Path
    runs: Path
    text: str
    interrupted: bool = False


@dataclass(frozen=True)
class Studio:
    """Where a figure is made.

    Args:
        scale: see `fourbit.reproduce.paper`.
        folder: of the figure.
        runs: folder of the training runs, shared by all figures of the scale.
        data_dir, threads, progress: as of `fourbit.train.Settings`.
        seeds: of the runs, where a figure uses several.
        trained: what `train` was asked for, in words.
    """

    scale: ScaleName
    folder: Path
    runs: Path
    data_dir: Path | None = None
    threads: int | None = None
    progress: bool = False
    seeds: tuple[int, ...] = (0,)
    trained: list[str] = field(default_factory=list)

    def train(
        self, network: str, recipes: Sequence[str], seeds: Sequence[int] | None = None
    ) -> dict[tuple[str, int], Path]:
        """The folder of each run, trained as far as it is not yet."""
        settings: dict[str, Any] = dict(NETWORKS[network][self.scale])
        config = CompareConfig(
            **settings,
            data_dir=self.data_dir,
            threads=self.threads,
            progress=self.progress,
            recipes=tuple(recipes),
            seeds=tuple(self.seeds if seeds is None else seeds),
            out=self.runs / settings["model"],
        )
        self.trained.append(said_of(settings, config.seeds))
        comparison = compare(config, check_data=require_whole if self.scale == "paper" else None, table=False)
        if comparison.interrupted:
            raise Interrupted
        for row in comparison.rows:
            if row.diverged:
                raise UserError(
                    f"{row.recipe} diverged with seed {row.diverged[0]}, and this figure looks into runs that ended: choose "
                    "other --seeds."
                )
        return {(run.recipe, run.seed): run.out for run in config.runs() if run.out is not None}

    def epochs(self, network: str) -> int:
        """Of a run of `train`."""
        return NETWORKS[network][self.scale]["epochs"]

    def picture(self, figure: Figure, name: str) -> str:
        """Save a picture; the line that shows it in Markdown."""
        from fourbit.report import DPI

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        with _writing(self.folder):
            replace_file(self.folder / f"{name}.png", buffer.getvalue())
        return f"![{name}]({name}.png)"


Maker = Callable[[Studio], str]
FIGURES: Registry[Maker] = Registry("figure")
PAPER: dict[str, str] = {}
"""What the paper's figure shows, in its numbers (~: read off a plot); missing for figures of our own."""


def register(name: str, paper: str = "") -> Callable[[Maker], Maker]:
    """Enter a figure, with what the paper's own shows."""
    if paper:
        PAPER[name] = paper
    return FIGURES.register(name)


def color(recipe: str) -> str | None:
    """Dark grey for full precision, as in all reports; None, the next of the palette, for others."""
    from fourbit.report import REFERENCE_COLOR

    return REFERENCE_COLOR if recipe in ("fp32", "exact") else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def draw(
    name: str,
    *,
    scale: ScaleName = "small",
    data_dir: Path | None = None,
    out: Path = Path("runs/reproduce"),
    threads: int | None = None,
    progress: bool = False,
    seeds: Sequence[int] = (0,),
) -> Drawn:
    """Make a figure: its pictures, and a text with its numbers, NAME.md.

    Args:
        name: of a figure.
        scale: paper, small or smoke.
        data_dir: folder of the data set; the scale smoke needs none.
        out: the figure gets the folder NAME-SCALE in it, the runs networks-SCALE.
        threads, progress: of the training runs.
        seeds: of the runs, where a figure uses several.

    Raises:
        UserError: an unknown figure or scale, or as `fourbit.train.compare`.
    """
    maker = FIGURES[name]
    if not seeds:
        raise UserError("seeds is empty: name at least one.")
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if scale == "converged":
        raise UserError(f"figures have the scales paper, small and smoke; {HALF_ONLY}.")
    folder = out / f"{name}-{scale}"
    data_dir = None if scale == "smoke" else data_dir
    studio = Studio(scale, folder, out / f"networks-{scale}", data_dir, threads, progress, tuple(seeds))
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        paper = f"In the paper: {PAPER[name]}.\n\n" if name in PAPER else ""
        text = f"# {title(name)}\n\n{paper}{maker(studio)}\n"
        text += "".join(f"\nTrained: {each}.\n" for each in dict.fromkeys(studio.trained))
        if scale == "smoke" and studio.trained:
            text += "\nA smoke run is short, on small images: its numbers say nothing about accuracy.\n"
    except Interrupted:
        return Drawn(name, folder, studio.runs, "", interrupted=True)
    except UserError:
        with suppress(OSError):
            folder.rmdir()  # if there is nothing in it
        raise
    with _writing(folder):
        replace_file(folder / f"{name}.md", text.encode())
    return Drawn(name, folder, studio.runs if studio.trained else folder, text)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the figure could not be written to {folder}: {error.strerror or error}.") from error


def title(name: str) -> str:
    """What a figure shows, in a line."""
    return (FIGURES[name].__doc__ or "").strip().splitlines()[0].rstrip(".")
