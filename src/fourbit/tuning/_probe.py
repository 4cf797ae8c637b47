"""How far gradients and loss under a recipe are from full precision, on given weights and batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit import recipes
from fourbit.errors import UserError
from fourbit.recipes import Recipe
from fourbit.train._fidelity import UNSEEN, gradients_of
from fourbit.train._folder import writing
from fourbit.train._load import Trained
from fourbit.train.tasks import metric_of


@dataclass(frozen=True)
class Measured:
    """Under a recipe: mean `error` of the layers' gradients (see `fourbit.tuning.tune`), mean training `loss`, the test loss
    and `metric` as it is shown (None where not asked for), and {layer: (projection, noise)}."""

    error: float
    loss: float
    test_loss: float | None
    metric: float | None
    layers: Mapping[str, tuple[float, float]]


class Probe:
    """Measures recipes on the weights of a run.

    Args:
        trained: the run, in full precision.
        num_batches: of training data that no epoch has seen.
        tests: whether test data are gone through as well.
    """

    def __init__(self, trained: Trained, num_batches: int, tests: bool):
        self.trained, self.tests = trained, tests
        self.batches = list(islice(trained.task.batches("train", epoch=UNSEEN), num_batches))
        self.exact = self._gradients(trained.model)
        self.full = self._measured(trained.model, self.exact)

    def measure(self, recipe: Recipe) -> Measured:
        """Under a recipe, with clip values and scales of the batches at hand."""
        model = copy.deepcopy(self.trained.model)
        recipes.convert(model, recipe, **self.trained.config.convert_options())
        return self._measured(model, self._gradients(model))

    def _gradients(self, model: nn.Module) -> tuple[dict[str, Tensor], float]:
        total: dict[str, Tensor] = {}
        losses = []
        for batch in self.batches:
            found, loss = gradients_of(model, self.trained.task, batch, self.trained.config.seed)
            losses.append(loss)
            for layer, gradient in found.items():
                total[layer] = total[layer] + gradient if layer in total else gradient
        return total, sum(losses) / len(losses)

    def _measured(self, model: nn.Module, found: tuple[dict[str, Tensor], float]) -> Measured:
        layers, errors = {}, []
        for layer, exact in self.exact[0].items():
            square = float(exact @ exact)
            if not square or layer not in found[0]:
                continue
            gradient = found[0][layer]
            projection = float(gradient @ exact) / square
            noise = float((gradient - projection * exact).norm()) / square**0.5
            e = (1 - projection) ** 2 + noise**2
            errors.append(e / (1 + e) if e == e and e != float("inf") else 1.0)
            layers[layer] = (projection, noise)
        if not errors:
            raise UserError(
                "no weight of this run has a gradient: train it for more steps, or at another learning rate."
            )
        test_loss, metric = self._tested(model) if self.tests else (None, None)
        return Measured(sum(errors) / len(errors), found[1], test_loss, metric, layers)

    def _tested(self, model: nn.Module) -> tuple[float, float | None]:
        task, config = self.trained.task, self.trained.config
        model.eval()
        with torch.no_grad():
            counts = [task.loss(model, b)[1] for b in islice(task.batches("test"), config.max_test_batches)]
        model.train()
        loss, hits, items = torch.stack(counts).sum(0).tolist()
        metric = metric_of(config)
        value = metric.of(loss / items, hits / items, None)
        return loss / items, None if value is None else value * metric.factor


class Record:
    """What was measured, in a file, so that nothing is measured twice."""

    def __init__(self, path: Path):
        self.path, self._found = path, dict[str, Measured]()
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: remove it, and what it held is measured again.") from error
        for line in lines:
            try:
                fields: dict[str, Any] = json.loads(line)
                key = fields.pop("key")
                fields["layers"] = {layer: tuple(pair) for layer, pair in fields["layers"].items()}
                self._found[key] = Measured(**fields)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut off while it was written: measured again

    def get(self, key: str) -> Measured | None:
        """What is known under a key."""
        return self._found.get(key)

    def add(self, key: str, measured: Measured) -> None:
        """Write it down at once."""
        self._found[key] = measured
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._is_cut_off() + json.dumps({"key": key, **asdict(measured)}) + "\n")

    def _is_cut_off(self) -> bool:
        with self.path.open("rb") as file:
            whole = file.read()
        return bool(whole) and not whole.endswith(b"\n")
