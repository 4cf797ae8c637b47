"""From a configuration to a recipe: a short run, measurements, the choice, the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from fourbit import models, recipes
from fourbit.errors import UserError
from fourbit.recipes import Recipe
from fourbit.recipes._input import Input
from fourbit.train import TrainConfig, train
from fourbit.train._display import make_console
from fourbit.train._folder import has_run, read_json, replace_file, writing
from fourbit.train._load import Trained, load
from fourbit.train._validate import default_out, validated
from fourbit.train.tasks import metric_of
from fourbit.tuning._candidates import Candidate, Candidates, alternative
from fourbit.tuning._choose import Step, choose
from fourbit.tuning._output import recipe_file, write_picture
from fourbit.tuning._probe import Measured, Probe, Record

STEPS = 200
"""Of the run, where nothing else is asked for."""

BUDGET = 0.05


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    Attributes:
        folder: has recipe.toml, tune.json, tune.png, measured.jsonl and the run.
        recipe: the base recipe with a rule for each layer that something was chosen of.
        steps: in the order of the choice.
        share: of all multiply-accumulates of a step, those that were taken to 8 bits; `kept`: those that are there in the base.
        before, after: what was measured with nothing and with all of it chosen; `full`: in full precision.
        energy: of a step, over that of the base recipe; None where the hardware model has no unit for a format.
        reached: whether `max_loss`, if it was asked for, is met.
    """

    folder: Path
    recipe: Recipe
    steps: tuple[Step, ...]
    share: float
    kept: float
    before: Measured
    after: Measured
    full: Measured
    energy: float | None
    reached: bool

    @property
    def path(self) -> Path:
        """Of the recipe."""
        return self.folder / "recipe.toml"


def tune(
    config: TrainConfig, budget: float | None, max_loss: float | None, high: str, num_batches: int, progress: bool
) -> Tuned:
    """See `fourbit.tuning.tune`."""
    budget = BUDGET if budget is None and max_loss is None else budget
    validated(config)
    _check(config, budget, max_loss, num_batches)
    base, above = recipes.get(config.recipe), alternative(recipes.get(high))
    usual = default_out(config)
    folder = config.out or usual.with_name(f"tune-{usual.name}")
    steps = STEPS if config.max_steps is None else config.max_steps
    config = replace(config, out=folder / "run", max_steps=steps, epochs=max(config.epochs, steps), keep_every=0)
    _claim(folder, config, high, num_batches)
    if train(config, resume=has_run(folder / "run")).stopped == "interrupted":
        raise KeyboardInterrupt
    own = config.model if models.is_own(config.model) else None
    trained = load(folder / "run", recipe="fp32", data_dir=config.data_dir, fuse=None, epoch=None, model_file=own)
    candidates = Candidates(trained.model, base, above, _input_of(trained), config.only, config.skip)
    record = Record(folder / "measured.jsonl")
    probe = Probe(trained, num_batches, tests=max_loss is not None)
    measure = _measuring(probe, candidates, record, progress)
    if max_loss is None:
        assert budget is not None
        allowed = budget
        found = choose(
            candidates.all,
            lambda chosen: measure(chosen).error,
            candidates.cost,
            lambda chosen: candidates.share(chosen) <= allowed,
        )
    else:
        limit = max_loss
        found = choose(
            [c for c in candidates.all if c.gemm == "fprop"],
            lambda chosen: measure(chosen).test_loss or 0.0,
            candidates.cost,
            lambda chosen: True,
            lambda chosen: _points(measure(chosen), probe.full, config) <= limit,
        )
    chosen = tuple(step.candidate for step in found)
    before, after = measure(()), measure(chosen)
    joules = candidates.joules(()), candidates.joules(chosen)
    tuned = Tuned(
        folder=folder,
        recipe=candidates.recipe_with(chosen, f"{base.name}-tuned"),
        steps=tuple(found),
        share=candidates.share(chosen),
        kept=_kept(candidates),
        before=before,
        after=after,
        full=probe.full,
        energy=joules[1] / joules[0] if joules[0] and joules[1] else None,
        reached=max_loss is None or _points(after, probe.full, config) <= max_loss,
    )
    _write(tuned, candidates, record, measure, max_loss is not None)
    return tuned


def _check(config: TrainConfig, budget: float | None, max_loss: float | None, num_batches: int) -> None:
    if budget is not None and max_loss is not None:
        raise UserError("budget and max_loss are two ways to say when to stop: give one of them.")
    if budget is not None and not 0 < budget <= 1:
        raise UserError(
            f"budget is {budget:g}, but must be a share of the multiply-accumulates, above 0 and at most 1."
        )
    if max_loss is not None and not 0 <= max_loss < math.inf:
        raise UserError(f"max_loss is {max_loss:g}, but must be 0 or more points of the metric.")
    if num_batches < 1:
        raise UserError(f"num_batches is {num_batches}, but must be at least 1.")
    if max_loss is not None and metric_of(config).source == "score":
        raise UserError(f"{metric_of(config).name} is no number of one pass over the test data: give --budget instead.")


def _claim(folder: Path, config: TrainConfig, high: str, num_batches: int) -> None:
    """The folder is for these settings; a budget may differ, as measurements do not depend on it."""
    path = folder / "settings.json"
    settings = {"high": high, "num_batches": num_batches, "max_test_batches": config.max_test_batches}
    if path.exists():
        before = read_json(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder} was begun with {name} {before.get(name)}, not {value}: repeat it, or choose another --out."
                )
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another --out.")
    replace_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def _input_of(trained: Trained) -> Input:
    """What the task gives the model, for one batch."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((inputs, named))

    handle = trained.model.register_forward_pre_hook(keep, with_kwargs=True)
    restore = trained.task.snapshot()
    try:
        with torch.no_grad():
            trained.task.loss(trained.model, next(iter(trained.task.batches("train"))))
    finally:
        handle.remove()
        restore()
    if not seen:
        raise UserError("the model is not called as a module by its task: its products cannot be counted.")
    inputs, named = seen[0]
    if named and not inputs:
        return named
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _measuring(
    probe: Probe, candidates: Candidates, record: Record, progress: bool
) -> Callable[[tuple[Candidate, ...]], Measured]:
    """Measures what is chosen, once."""
    console = make_console()
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    task = bar.add_task("measuring", total=None)

    def measure(chosen: tuple[Candidate, ...]) -> Measured:
        key = " ".join(sorted(map(str, chosen)))
        known = record.get(key)
        if known is None or (probe.tests and known.test_loss is None):
            with bar:
                bar.update(task, description=f"measuring {chosen[-1] if chosen else 'the recipe'}")
                known = probe.measure(replace(candidates.recipe_with(chosen), phases=()))
            record.add(key, known)
        return known

    return measure


def _points(measured: Measured, full: Measured, config: TrainConfig) -> float:
    """How much worse the metric is than in full precision."""
    assert measured.metric is not None
    assert full.metric is not None
    sign = 1 if metric_of(config).higher_is_better else -1
    return sign * (full.metric - measured.metric)


def _kept(candidates: Candidates) -> float:
    """Share of multiply-accumulates that the base recipe has not in 4 bits."""
    shares = candidates.explanation.shares()
    return sum(share for bits, share in shares.items() if max(map(int, bits.split(" x "))) >= 8)


def _write(
    tuned: Tuned,
    candidates: Candidates,
    record: Record,
    measure: Callable[[tuple[Candidate, ...]], Measured],
    by_loss: bool,
) -> None:
    reasons = {step.candidate: _reason(step, candidates, measure, by_loss) for step in tuned.steps}
    rules = candidates.rules([step.candidate for step in tuned.steps])
    comments = [[reasons[c] for c in of] for _, of in rules]
    replace_file(tuned.path, recipe_file(tuned.recipe, comments).encode())
    alone = [(c, known.error) for c in candidates.all if not by_loss and (known := record.get(str(c)))]
    table = {
        "share": tuned.share,
        "kept": tuned.kept,
        "energy": tuned.energy,
        "reached": tuned.reached,
        "full": _plain(tuned.full),
        "before": _plain(tuned.before),
        "after": _plain(tuned.after),
        "steps": [
            {"layer": s.candidate.layer, "gemm": s.candidate.gemm, "before": s.before, "after": s.after, "cost": s.cost}
            for s in tuned.steps
        ],
        "layers": {layer: list(pair) for layer, pair in tuned.before.layers.items()},
    }
    replace_file(tuned.folder / "tune.json", (json.dumps(table, indent=2) + "\n").encode())
    write_picture(tuned.folder / "tune.png", tuned.steps, alone, tuned.before.error, candidates)


def _plain(measured: Measured) -> dict[str, float | None]:
    return {name: getattr(measured, name) for name in ("error", "loss", "test_loss", "metric")}


def _reason(
    step: Step, candidates: Candidates, measure: Callable[[tuple[Candidate, ...]], Measured], by_loss: bool
) -> str:
    """Why a candidate was taken, for a person who reads the recipe."""
    own = measure(()).layers.get(step.candidate.layer)
    of = "" if own is None else f"its weight's gradient had projection {own[0]:.2f} and noise {own[1]:.2f}; "
    what = "test loss" if by_loss else "gradient error"
    share = candidates.share((step.candidate,))
    cost = f"energy +{step.cost:.2%}" if candidates.energies is not None else f"cost {step.cost:.2%}"
    return f"{step.candidate.gemm}: {of}{what} {step.before:.4f} -> {step.after:.4f}, {share:.2%} of the MACs, {cost}"
