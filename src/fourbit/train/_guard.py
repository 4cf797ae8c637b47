"""Catches NaN and infinity before they reach the weights.

After the backward pass and before the optimizer step three things must be finite: the loss, the norm of the gradient, and
what the quantized layers saw (their own counters). What happens otherwise is the user's choice:

    stop      NonFiniteError, which names the layers; the last checkpoint stays as it is
    skip      the step is left out; the model's buffers, clip values and scales go back to what they were before it
    ignore    nothing

With one loss scale for the whole model, gradients overflow now and then by design: the scale is halved and the step left
out. That counts as a fault only when the scale has nowhere left to go.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fourbit.errors import NonFiniteError
from fourbit.nn import nonfinite_layers, quantized_layers
from fourbit.recipes import LossScaler

MAX_SKIPPED_IN_A_ROW = 20
"""So many faults without a good step between them do not pass by themselves: stop."""

MIN_LOSS_SCALE = 2.0**-16
"""Gradients that overflow with a loss scale as small as this are not overflowing because of it."""

MAX_NAMED = 5


class Guard:
    """Watches one model.

    Args:
        model: the bare model.
        mode: "stop", "skip" or "ignore".
        scaler: the loss scaler, if the recipe has one.
    """

    def __init__(self, model: nn.Module, mode: str, scaler: LossScaler | None):
        self.model, self.mode, self.scaler = model, mode, scaler
        self.skipped_in_a_row = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._layers: list[Callable[[], None]] = []

    def before_step(self) -> None:
        """Remember the buffers (BatchNorm statistics) and what the quantized layers know, for a step that will be left out."""
        if self.mode == "skip":
            self._buffers = [(b, b.clone()) for b in self.model.buffers()]
            self._layers = [layer.quant.snapshot() for layer in quantized_layers(self.model).values()]

    def step_allowed(self, loss: float, norm: float, step: int) -> bool:
        """Whether the optimizer may step. False: leave the step out.

        Raises:
            NonFiniteError: mode "stop", or too many faults in a row.
        """
        if self.mode == "ignore":
            return True
        layers = nonfinite_layers(self.model)
        if self.scaler is not None and self.scaler.value > MIN_LOSS_SCALE:
            layers = {name: counts for name, counts in layers.items() if counts["x"] or counts["w"]}
            norm = 0.0
        if math.isfinite(loss) and math.isfinite(norm) and not layers:
            self.skipped_in_a_row = 0
            self._reset_counters()
            return True
        if self.mode == "skip" and self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            self.skipped_in_a_row += 1
            with torch.no_grad():
                for buffer, saved in self._buffers:
                    buffer.copy_(saved)
            for restore in self._layers:
                restore()
            self._reset_counters()
            return False
        raise self._error(loss, norm, tuple(layers), step)

    def _error(self, loss: float, norm: float, layers: tuple[str, ...], step: int) -> NonFiniteError:
        layers = layers or self._layers_with_nonfinite_gradients()
        what = (
            f"the loss is {loss}"
            if not math.isfinite(loss)
            else f"the norm of the gradient is {norm}"
            if not math.isfinite(norm)
            else "there are NaN or infinite numbers"
        )
        more = f" and {len(layers) - MAX_NAMED} more" if len(layers) > MAX_NAMED else ""
        where = f" in {', '.join(layers[:MAX_NAMED])}{more}" if layers else ""
        if self.mode == "skip":
            remedy = (
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were left out already; lower --lr or limit --gradient-clip."
            )
        else:
            remedy = "lower --lr, limit --gradient-clip, or leave out such steps with --on-nonfinite skip."
        return NonFiniteError(f"{what} at step {step}{where}: {remedy}", layers)

    def _layers_with_nonfinite_gradients(self) -> tuple[str, ...]:
        bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in bad))

    def _reset_counters(self) -> None:
        for layer in quantized_layers(self.model).values():
            layer.quant.nonfinite.zero_()
