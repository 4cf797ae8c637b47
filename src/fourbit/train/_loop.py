"""The training loop.

    for each epoch:
        for each optimizer step:   forward, backward, guard against NaN, optimizer step, metrics
        evaluate, write the epoch's line, save a checkpoint

It can be left after any step (Ctrl-C) and entered again there: all that it needs to know is in `LoopState`, the model, the
optimizer and the generators, and those are what a checkpoint holds.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fourbit.errors import NonFiniteError
from fourbit.nn import observe, quantized_layers, synchronize
from fourbit.train import _checkpoint
from fourbit.train._checkpoint import Checkpoint
from fourbit.train._folder import run_of
from fourbit.train._guard import Guard
from fourbit.train._recorder import Recorder
from fourbit.train._result import Result, Stopped
from fourbit.train._schedule import learning_rate
from fourbit.train._session import Session
from fourbit.train._signals import StopRequest
from fourbit.train._state import LoopState, Tally, optimizer_tensors, rng_tensors
from fourbit.train.tasks import Batch, Examples


class Loop:
    """One sitting of a run, from `state` to the end or to a stop request."""

    def __init__(self, session: Session, state: LoopState, recorder: Recorder, stop: StopRequest):
        self.session, self.state, self.recorder, self.stop = session, state, recorder, stop
        self.guard = Guard(session.bare, session.config.on_nonfinite, session.scaler)
        self.guard.skipped_in_a_row = state.skipped_in_a_row
        self.parameters = [p for p in session.bare.parameters() if p.requires_grad]
        self.examples: Examples | None = None
        self.has_quantized = bool(quantized_layers(session.bare))

    def run(self) -> Result:
        """Train to the end.

        Raises:
            NonFiniteError: see `Guard`. The metrics end with a "final" line all the same; the checkpoint stays the last
                good one.
        """
        session, state = self.session, self.state
        while True:
            try:
                self._train_epoch()
            except NonFiniteError:
                self._diverge()
                raise
            if self.stop.requested or not self._evaluate():
                return self._end("interrupted")
            if state.step == (state.epoch + 1) * session.steps_per_epoch:
                self._end_epoch()
                keep = session.config.keep_every
                if keep and state.epoch % keep == 0:
                    self.save(self.recorder.folder.kept_checkpoint(state.epoch))
            if state.step >= session.total_steps:
                return self._end("done" if state.epoch == session.config.epochs else "max_steps")
            every = session.config.checkpoint_every
            if every and state.epoch % every == 0:
                self.save()

    def save(self, path: Path | None = None) -> None:
        """Write a checkpoint of this very moment, to `path` or in place of the one before."""
        session, state = self.session, self.state
        session.accelerator.wait_for_everyone()
        folder = self.recorder.folder
        carried = session.task.state_tensors(session.accelerator.gather)
        if not folder.active:
            return
        state.skipped_in_a_row = self.guard.skipped_in_a_row
        values = {
            "loop": state.as_dict(),
            "scaler": session.scaler.state_dict() if session.scaler else None,
            "scheduler": session.scheduler.state_dict() if session.scheduler else None,
            "metrics_bytes": folder.metrics_bytes(),
            "run": run_of(session.config, folder.data),
        }
        training = optimizer_tensors(session.optimizer) | rng_tensors(session.device) | carried
        checkpoint = Checkpoint(session.bare.state_dict(), training, values)
        _checkpoint.save(path or folder.checkpoint, checkpoint, keep_last=path is None)

    def _train_epoch(self) -> None:
        """The rest of the epoch, until it is over, the run is over, or a stop is requested."""
        state, session = self.state, self.session
        first = state.epoch * session.steps_per_epoch
        end = min(first + session.steps_per_epoch, session.total_steps)
        session.model.train()
        groups = session.train_groups(state.epoch, state.step - first)
        self.recorder.start_window(state)
        while state.step < end and not self.stop.requested:
            start = time.perf_counter()
            self._step(next(groups), end)
            elapsed = time.perf_counter() - start
            state.epoch_seconds += elapsed
            state.seconds += elapsed

    def _step(self, group: list[Batch], end: int) -> None:
        """One optimizer step on the batches of `group`, and what is to be written about it."""
        session, state, config = self.session, self.state, self.session.config
        lr = learning_rate(config, config.lr or 0.0, state.step, session.total_steps)
        if session.scheduler is not None:
            session.scheduler.at(state.step, lambda: self._differentiate(group))
            share = session.scheduler.rate(state.step)
            lr = lr if share is None else share * (config.lr or 0.0)
        for param_group in session.optimizer.param_groups:
            param_group["lr"] = lr * (config.alpha_lr_factor if param_group.get("name") == "alpha" else 1.0)
        self.guard.before_step()
        restore_task = session.task.snapshot()
        every, is_last = config.observe_every, state.step == session.total_steps - 1
        observing = self.has_quantized and bool(every) and (state.step % every == 0 or is_last)
        # Histograms: at the first step, at the last observation of an epoch, at the last step.
        ends_epoch = bool(every) and state.step + every >= end < session.total_steps
        histograms = observing and (state.step == 0 or ends_epoch or is_last)
        with observe(session.bare, histograms, vitals=True) if observing else nullcontext() as observation:
            (loss_sum, correct, images, norm), in_range = self._forward_backward(group)
        allowed = self.guard.step_allowed(loss_sum, norm, state.step + 1)
        if allowed and in_range:
            session.optimizer.step()
            for tally in (state.window, state.whole):
                tally.add(loss_sum, int(correct), int(images))
            if state.seen is not None:
                state.seen += int(images)
        else:
            state.skipped += 1
        if not allowed:
            restore_task()
        session.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.recorder.step(state, lr, session.bare, session.scaler.value if session.scaler else None)
        if observation is not None:
            self.recorder.layers(state, session.bare, observation)

    def _differentiate(self, group: list[Batch]) -> None:
        """Gradients of the mean loss over `group`, as a schedule measures them; nothing else changes."""
        session, restore_task = self.session, self.session.task.snapshot()
        for batch in group:
            with session.accelerator.accumulate(session.model), session.autocast():
                loss, _ = session.task.loss(session.model, batch, session.config.label_smoothing)
            session.accelerator.backward(loss)
        restore_task()

    def _forward_backward(self, group: list[Batch]) -> tuple[list[float], bool]:
        """Gradients of the mean loss over `group`, clipped.

        Returns:
            [loss sum, hits, images, norm of the gradient], and whether the gradients survived the loss scale, if any.
        """
        session, scaler, config = self.session, self.session.scaler, self.session.config
        sums = torch.zeros(4, dtype=torch.float64, device=session.device)
        for batch in group:
            with session.accelerator.accumulate(session.model):
                with session.autocast():
                    loss, counts = session.task.loss(session.model, batch, config.label_smoothing)
                session.accelerator.backward(scaler.scale(loss) if scaler else loss)
            if session.accelerator.num_processes > 1:
                synchronize(session.bare)
            sums[:3] += counts
        in_range = True
        if scaler:
            in_range = scaler.unscale_(session.optimizer)
            scaler.update()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if config.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.gradient_clip, norm)
        sums[3] = norm / session.accelerator.num_processes  # the same on every process, and about to be summed
        return session.total(sums), in_range

    def _evaluate(self) -> bool:
        """Measure on the test images; False if a stop was requested meanwhile (the result is then thrown away)."""
        session, state = self.session, self.state
        start = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=session.device)
        findings: list[Any] = []
        task, judged = session.task, not session.task.judged_at_the_end or state.step >= session.total_steps
        model = session.bare.eval()  # without what keeps processes in step: one of them may have no batch
        with torch.no_grad():
            for batch in islice(task.batches("test"), session.config.max_test_batches):
                if self.stop.requested:
                    return False
                if batch[-1].numel():
                    with session.autocast():
                        counts, found = task.evaluate(model, batch) if judged else (task.loss(model, batch)[1], [])
                    sums += counts
                    findings += found
        loss_sum, correct, images = session.total(sums)
        state.test_loss, state.test_accuracy = loss_sum / images, correct / images
        findings = session.gather(findings) if judged else []
        state.test_score = task.judge(findings) if judged else None
        self.examples = task.examples(findings) if judged else None
        elapsed = time.perf_counter() - start
        state.epoch_seconds += elapsed
        state.seconds += elapsed
        return True

    def _end_epoch(self) -> None:
        """Write the line of the epoch, and begin the next."""
        state = self.state
        assert state.test_loss is not None
        self.recorder.epoch(state, self.session.task.figures(state.test_loss))
        state.epoch, state.whole, state.epoch_seconds = state.epoch + 1, Tally(), 0.0

    def _end(self, stopped: Stopped) -> Result:
        """Save, and write how the run ended. An interrupted run has no test result, since none was measured there."""
        self.save()
        state, known = self.state, stopped != "interrupted"
        result = Result(
            folder=self.recorder.folder.path,
            stopped=stopped,
            step=state.step,
            epoch=state.epoch,
            test_accuracy=state.test_accuracy if known else None,
            test_score=state.test_score if known else None,
            test_loss=state.test_loss if known else None,
            seconds=state.seconds,
            skipped=state.skipped,
        )
        if known and self.recorder.folder.active:
            self._sample()
        figures = {} if result.test_loss is None else self.session.task.figures(result.test_loss)
        self.recorder.final(result, self.session.steps_per_epoch, state, figures)
        return result

    def _sample(self) -> None:
        """Write what the task has to show of the network."""
        session = self.session
        with torch.no_grad(), session.autocast():
            text = session.task.sample(session.bare.eval())
        if text is not None:
            self.recorder.folder.write_sample(text)
        if self.examples is not None:
            self.recorder.folder.write_examples(self.examples)

    def _diverge(self) -> None:
        """Note the step that could not be done; the checkpoint stays the one before."""
        state = self.state
        lr = self.session.optimizer.param_groups[0]["lr"]
        self.recorder.diverged_step(state, lr)
        folder, step = self.recorder.folder.path, state.step + 1
        result = Result(folder, "diverged", step, state.epoch, None, None, None, state.seconds, state.skipped)
        self.recorder.final(result, self.session.steps_per_epoch, state, {})
