"""Training runs: one function, one folder of files.

    from fourbit.train import TrainConfig, train

    result = train(TrainConfig(model="digits_cnn", data="digits", recipe="ibm2020", epochs=5, out=Path("runs/a")))
    result.test_accuracy

A run writes `config.json`, `env.json`, `metrics.jsonl` and `checkpoint/` into its folder, and reports are made from those
files alone. A run that was interrupted goes on with `train(config, resume=True)` as if it had never stopped: the same
weights and the same metrics, to the bit. `compare` makes one run per recipe and seed, all of them from the same initial
weights and with the same order of the data.

Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fourbit.train._config import CompareConfig as CompareConfig
from fourbit.train._config import Settings as Settings
from fourbit.train._config import TrainConfig as TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fourbit.recipes import Recipe
    from fourbit.train._comparison import Comparison
    from fourbit.train._fidelity import Fidelity
    from fourbit.train._load import Trained
    from fourbit.train._result import Result


def train(config: TrainConfig, *, resume: bool = False) -> Result:
    """One training run.

    Args:
        config: what to train. `config.out` must be empty or missing, unless `resume`.
        resume: go on from the checkpoint in `config.out`; the configuration must be the one that it was made with.
            Processes that torchrun has started again do so anyway.

    Returns:
        How it ended. Ctrl-C and SIGTERM end it after the step in progress, with a checkpoint, as "interrupted".

    Raises:
        UserError: bad configuration or data, an `out` that is taken, a damaged checkpoint, a full disk. A folder that
            exists already is left as it was.
        NonFiniteError: the loss, a layer or a gradient became NaN or infinite, and `config.on_nonfinite` is "stop".
    """
    from fourbit.train._run import run

    return run(config, resume=resume)


def load(
    folder: Path,
    *,
    epoch: int | None = None,
    recipe: str | Recipe | None = None,
    data_dir: Path | None = None,
    fuse: bool | None = None,
    model: str | None = None,
) -> Trained:
    """The network of a run, with its data.

    Args:
        folder: of the run.
        epoch: of a checkpoint that was kept (`keep_every`); None: the newest one.
        recipe: convert to another recipe than the run's, with the run's float weights.
        data_dir: folder of the data; None: as in the run.
        fuse: see `fourbit.convert`; None: as in the run.
        model: of a run with a network of one's own, its name again (path/to/file.py:function). It is code, which is not run
            because a folder names it.

    Returns:
        Trained, with `model` and `task`; the model is in training mode.

    Raises:
        UserError: no run, no such checkpoint, or a damaged one.
    """
    from fourbit.train._load import load as load_run

    return load_run(folder, epoch, recipe, data_dir, fuse, model)


def gradient_fidelity(
    folder: Path,
    recipes: Sequence[str],
    *,
    data_dir: Path | None = None,
    threads: int | None = None,
    progress: bool = False,
    model: str | None = None,
) -> dict[str, dict[str, Fidelity]]:
    """How much of each weight's exact gradient recipes leave, on the weights of a run and one batch.

    For every recipe the reference is its own forward pass with gradients in full precision, so that only what it does to
    gradients counts.

        projection = <dw_q, dw> / |dw|^2        1: unbiased; below 1 the layer learns more slowly than its learning rate says
        cosine     = <dw_q, dw> / (|dw_q| |dw|)   1: the same direction

    Args:
        folder: of a run that has a checkpoint.
        recipes: names.
        data_dir: folder of the data; None: as in the run.
        threads: CPU threads, from now on; None: as they are.
        progress: show a bar, if the output is a terminal.
        model: as of `load`.

    Returns:
        {recipe: {layer: Fidelity}}, from the input to the output as the network lists its layers; without layers whose exact
        gradient is zero.

    Raises:
        UserError: an unknown recipe, or as `load`.
    """
    from fourbit.train._fidelity import fidelity

    return fidelity(folder, recipes, data_dir, threads, progress, model)


def collect(config: CompareConfig) -> Comparison:
    """The table of all runs in `config.out` that have ended, with any seed, if recipe and settings are those of the plan.
    Trains, prints and writes nothing.

    Raises:
        UserError: runs of different data.
    """
    from fourbit.train._compare import collect as collect_all

    return collect_all(config)


def compare(
    config: CompareConfig, *, check_data: Callable[[Any], None] | None = None, table: bool = True
) -> Comparison:
    """One run per recipe and seed, each in `config.out/<recipe>-seed<k>`, and a table of them all.

    Runs that are finished are left alone and unfinished ones go on, so an interrupted comparison is continued by
    calling it again. Raises as `train`; a run that diverges is noted in the table and the others go on.

    Args:
        check_data: is called with the data before the first run, and may raise a UserError.
        table: print the table, and write it to table.md and table.json.
    """
    from fourbit.train._compare import compare as run_all

    return run_all(config, check_data, table)
