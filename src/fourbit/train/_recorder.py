"""Writes down what happens in a run: to metrics.jsonl, to trackers such as TensorBoard, and for the person in front of it.

Epochs are counted from 0 in the files and from 1 on the screen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from fourbit.nn import Observation
from fourbit.nn._lines import histogram_lines, layer_lines, scales
from fourbit.train._config import TrainConfig
from fourbit.train._display import Display
from fourbit.train._folder import RunFolder
from fourbit.train._result import Result
from fourbit.train._state import LoopState, Tally
from fourbit.train._trackers import Board
from fourbit.train.tasks import metric_of


class Recorder:
    """The three places to which a run reports."""

    def __init__(self, config: TrainConfig, folder: RunFolder, board: Board, display: Display):
        self.config, self.folder, self.board, self.display = config, folder, board, display
        self.metric = metric_of(config)
        self._window_start = (0.0, 0)
        self._last_evaluated = -1

    def start_window(self, state: LoopState) -> None:
        """Begin to measure images per second."""
        self._window_start = (time.perf_counter(), state.window.images)

    def step(self, state: LoopState, lr: float, model: nn.Module, loss_scale: float | None) -> None:
        """Move the bar; when it is due, write a "step" line with the means since the last one and the layers' scales.

        Args:
            loss_scale: the scale of the whole loss, where the recipe has one.
        """
        start, images = self._window_start
        rate = (state.window.images - images) / max(time.perf_counter() - start, 1e-9)
        loss, accuracy = state.window.loss, state.window.accuracy
        self.display.step(
            state.step, state.epoch, f"loss {loss:.4f}{self._score(loss, accuracy)}", rate, self.metric.items
        )
        if state.step % self.config.log_every:
            return
        layers = scales(model)
        kept: dict[str, Any] = {"scales": layers} if layers else {}
        kept |= {} if loss_scale is None else {"loss_scale": loss_scale}
        rates = {f"{self.metric.items}_per_s": rate}
        self._step_line(
            state.step, state.epoch, loss=loss, accuracy=accuracy, lr=lr, **rates, **self._seen(state), **kept
        )
        exponents = {f"grad_scale_exponent/{name}": layer["g_exponent"] for name, layer in layers.items()}
        numbers = {"loss/train": loss, "accuracy/train": accuracy, "lr": lr, "loss_scale": loss_scale}
        self.board.scalars(state.step, numbers | rates | exponents)
        state.window = Tally()
        self.start_window(state)

    def diverged_step(self, state: LoopState, lr: float) -> None:
        """The line of a step that was given up because of NaN or infinity."""
        self._step_line(
            state.step + 1, state.epoch, loss=None, accuracy=None, lr=lr, **{f"{self.metric.items}_per_s": None}
        )

    def layers(self, state: LoopState, model: nn.Module, observation: Observation) -> None:
        """The lines "layers", "vitals" and, where there are histograms, "histograms"."""
        self.folder.record("layers", state.step, layers=layer_lines(model, observation))
        first = {"loss": state.whole.loss} if state.step == 1 else {}
        self.folder.record("vitals", state.step, **first, **observation.vitals())
        if histograms := histogram_lines(model, observation):
            self.folder.record("histograms", state.step, histograms=histograms)

    def epoch(self, state: LoopState, figures: Mapping[str, float]) -> None:
        """The line of an epoch that was just evaluated, with what `Task.figures` says of it."""
        whole, loss, accuracy = state.whole, state.test_loss, state.test_accuracy
        assert loss is not None
        assert accuracy is not None
        self.folder.record(
            "epoch",
            state.step,
            epoch=state.epoch,
            train_loss=whole.loss,
            train_accuracy=whole.accuracy,
            test_loss=loss,
            test_accuracy=accuracy,
            **self._judged(loss, accuracy, state.test_score),
            **figures,
            **self._seen(state),
            seconds=state.epoch_seconds,
            skipped=state.skipped,
        )
        self._evaluated(state.step, loss, accuracy, state.test_score, figures)
        self.display.say(
            f"epoch {state.epoch + 1}/{self.config.epochs}  step {state.step}  "
            f"train loss {whole.loss:.4f}{self._score(whole.loss, whole.accuracy)}  "
            f"test loss {loss:.4f}{self._score(loss, accuracy, state.test_score)}  "
            f"{state.epoch_seconds:.1f} s" + (f"  {state.skipped} steps left out" if state.skipped else "")
        )

    def final(self, result: Result, steps_per_epoch: int, state: LoopState, figures: Mapping[str, float]) -> None:
        """The last line. Its epoch is the one that the last step belongs to."""
        self.folder.record(
            "final",
            result.step,
            epoch=max(0, result.step - 1) // steps_per_epoch,
            test_accuracy=result.test_accuracy,
            test_loss=result.test_loss,
            **self._judged(result.test_loss, result.test_accuracy, result.test_score),
            **figures,
            **self._seen(state),
            seconds=result.seconds,
            stopped=result.stopped,
            skipped=result.skipped,
        )
        if result.test_loss is not None and result.step != self._last_evaluated:  # not at the end of an epoch
            self._evaluated(result.step, result.test_loss, result.test_accuracy, result.test_score, figures)

    def _score(self, loss: float, accuracy: float, score: float | None = None) -> str:
        value = self.metric.of(loss, accuracy, score)
        return "" if value is None else f" {self.metric.name} {self.metric.text(value)}"

    def _evaluated(
        self, step: int, loss: float, accuracy: float | None, score: float | None, figures: Mapping[str, float]
    ) -> None:
        """Show the trackers an evaluation."""
        numbers = {"loss": loss, "accuracy": accuracy, **figures}
        value = self.metric.of(loss, accuracy, score)
        numbers[self.metric.name.replace(" ", "_")] = None if value is None else float(value)
        self.board.scalars(step, {f"{name}/test": number for name, number in numbers.items()})
        self._last_evaluated = step

    def _seen(self, state: LoopState) -> dict[str, int]:
        """How many tokens, images or others the run has been trained on."""
        return {} if state.seen is None else {self.metric.items: state.seen}

    def _judged(self, loss: float | None, accuracy: float | None, score: float | None) -> dict[str, Any]:
        """The score, if the task has one, and the metric as it is shown."""
        value = self.metric.of(loss, accuracy, score)
        scored = {} if score is None else {"test_score": score}
        return scored | {
            "metric": self.metric.title,
            "test_metric": None if value is None else value * self.metric.factor,
        }

    def _step_line(self, step: int, epoch: int, **values: Any) -> None:
        self.folder.record("step", step, epoch=epoch, **values)
