"""A comparison of recipes: one run per recipe and seed, then one table.

Every run has a folder of its own, so an interrupted comparison is continued by starting it again: finished runs are read,
unfinished ones resumed. Differences to fp32 are taken seed by seed, between runs that began with the same weights and saw
the same batches, which removes most of what the seeds contribute to the spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourbit import data as datasets
from fourbit._statistics import half_interval
from fourbit.errors import NonFiniteError, UserError
from fourbit.train import _checkpoint
from fourbit.train._comparison import Comparison, Row, mean
from fourbit.train._config import CompareConfig, TrainConfig, label_of
from fourbit.train._display import make_console
from fourbit.train._folder import (
    DATA,
    RunFolder,
    has_run,
    last_record,
    read_json,
    records,
    require_free,
    require_same,
    require_same_data,
    same_length,
)
from fourbit.train._result import Result
from fourbit.train._run import finished, run
from fourbit.train._table import write_tables
from fourbit.train._validate import validated, validated_comparison
from fourbit.train.tasks import metric_of

REFERENCE = "fp32"

CheckData = Callable[[Any], None]


def compare(config: CompareConfig, check_data: CheckData | None = None, table: bool = True) -> Comparison:
    """See `fourbit.train.compare`. The table is printed, and written to table.md and table.json."""
    runs = validated_comparison(config)
    for each in runs:
        _check_folder(each)
    _noted(config)
    _check_data(config, runs, check_data)
    console = make_console()
    results: list[tuple[TrainConfig, Result]] = []
    for number, each in enumerate(runs, 1):
        assert each.out is not None
        title = f"[{number}/{len(runs)}] {each.recipe} seed {each.seed}"
        known = finished(RunFolder(each.out))
        if known is None or not same_length(each.out, each) or _retries(each, known):
            console.print(title, markup=False)
            try:
                known = run(each, resume=has_run(each.out), title=title, beside=_noted(config))
            except NonFiniteError as error:
                console.print(f"diverged: {error}", markup=False, soft_wrap=True)
                known = finished(RunFolder(each.out))
                assert known is not None
        if not known.finished:
            return Comparison(config.out, metric_of(config), (), interrupted=True)
        results.append((each, known))
    comparison = Comparison(config.out, metric_of(config), _rows(config, results))
    if table:
        write_tables(comparison, console)
    return comparison


def collect(config: CompareConfig) -> Comparison:
    """See `fourbit.train.collect`."""
    _noted(config)
    found = {_named(path) for path in config.out.glob("*-seed*")}
    labels = {label_of(recipe) for recipe in config.recipes}
    seeds = sorted({seed for recipe, seed in found if recipe in labels and seed is not None})
    config = replace(config, seeds=tuple(seeds))
    results = []
    for each in map(validated, config.runs()):
        assert each.out is not None
        try:
            require_same(each.out, each)
        except UserError:
            continue
        known = finished(RunFolder(each.out))
        if known is not None and same_length(each.out, each):
            results.append((each, known))
    rows = tuple(row for row in _rows(config, results) if row.values or row.diverged)
    return Comparison(config.out, metric_of(config), rows)


def _named(folder: Path) -> tuple[str, int | None]:
    """Recipe and seed of a run of a comparison."""
    recipe, _, seed = folder.name.rpartition("-seed")
    return recipe, int(seed) if seed.isdigit() else None


def _noted(config: CompareConfig) -> Path | None:
    """A run in the folder that notes the identity of the configured data; None if there is none.

    Raises:
        UserError: there are two, of different identities.
    """
    found: dict[str, Path] = {}
    for path in sorted(config.out.glob("*-seed*/config.json")):
        try:
            written = read_json(path)
        except UserError:
            continue
        if written.get("data") == config.data and DATA in written:
            found.setdefault(written[DATA], path.parent)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(
            f"{one} and {other} were made with different examples, labels or vocabulary of {config.data} and cannot be "
            "compared: move one of them away, or choose another --out."
        )
    return next(iter(found.values()), None)


def _check_folder(config: TrainConfig) -> None:
    """Reject a folder that holds something else than this run, before any run starts."""
    assert config.out is not None
    if has_run(config.out):
        require_same(config.out, config)
    else:
        require_free(config.out)


def _check_data(config: CompareConfig, runs: Sequence[TrainConfig], check_data: CheckData | None) -> None:
    """Ask `check_data`, and where finished runs read another place than this comparison, see whether both hold the same."""
    elsewhere = []
    for each in runs:
        assert each.out is not None
        if finished(RunFolder(each.out)) is not None:
            read = read_json(each.out / "config.json").get("data_dir")
            if config.data_dir is not None and (read is None or Path(read) != config.data_dir):
                elsewhere.append(each)
    if not elsewhere and check_data is None:
        return
    found = datasets.load(config.data, config.data_dir, **config.data_options())
    if check_data is not None:
        check_data(found)
    if elsewhere:
        identity = datasets.identity(found)
        for each in elsewhere:
            assert each.out is not None
            require_same_data(each.out, each, identity)


def _retries(config: TrainConfig, known: Result) -> bool:
    """Whether a run that diverged is asked to treat NaN in another way now, and can go on."""
    assert config.out is not None
    other = read_json(config.out / "config.json").get("on_nonfinite") != config.on_nonfinite
    begins = _checkpoint.exists(RunFolder(config.out).checkpoint) or not records(config.out, "epoch")
    return known.stopped == "diverged" and other and begins


def _rows(config: CompareConfig, results: Sequence[tuple[TrainConfig, Result]]) -> tuple[Row, ...]:
    metric = metric_of(config)
    measured = {
        (c.recipe, c.seed): value
        for c, r in results
        if r.stopped != "diverged" and (value := metric.of(r.test_loss, r.test_accuracy, r.test_score)) is not None
    }
    tried, rows = {(c.recipe, c.seed) for c, _ in results}, []
    for recipe in config.recipes:
        mine = {seed: measured[recipe, seed] for seed in config.seeds if (recipe, seed) in measured}
        paired = [value - measured[REFERENCE, seed] for seed, value in mine.items() if (REFERENCE, seed) in measured]
        paired = [] if recipe == REFERENCE else paired
        folders = [r.folder for c, r in results if c.recipe == recipe and c.seed in mine]
        rows.append(
            Row(
                recipe=recipe,
                values=mine,
                diverged=tuple(seed for seed in config.seeds if seed not in mine and (recipe, seed) in tried),
                difference=mean(paired),
                difference_half=half_interval(paired),
                train_loss=mean([loss for f in folders if (loss := _train_loss(f)) is not None]),
                seconds_per_epoch=mean([s for f in folders if (s := _epoch_seconds(f)) is not None]),
            )
        )
    return tuple(rows)


def _train_loss(folder: Path) -> float | None:
    """Of the last epoch, or since the last line where no epoch was completed."""
    loss = _number(folder, "epoch", "train_loss")
    return _number(folder, "step", "loss") if loss is None else loss


def _epoch_seconds(folder: Path) -> float | None:
    """Of the median epoch, which a slow first one (warm-up, compilation) does not move."""
    seconds = [s for record in records(folder, "epoch") if (s := _finite(record.get("seconds"))) is not None]
    return statistics.median(seconds) if seconds else None


def _number(folder: Path, kind: str, field: str) -> float | None:
    return _finite((last_record(folder, kind) or {}).get(field))


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
