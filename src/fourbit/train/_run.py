"""One run from beginning to end: check, open, train, close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourbit import data as datasets
from fourbit.errors import UserError
from fourbit.train import _checkpoint
from fourbit.train._config import TrainConfig
from fourbit.train._display import Display
from fourbit.train._environment import describe, restarts
from fourbit.train._folder import (
    RunFolder,
    has_run,
    last_record,
    require_free,
    require_own,
    require_same,
    require_same_data,
)
from fourbit.train._loop import Loop
from fourbit.train._recorder import Recorder
from fourbit.train._result import Result
from fourbit.train._session import Session, open_session
from fourbit.train._signals import StopRequest
from fourbit.train._state import LoopState, load_optimizer_tensors, load_rng_tensors
from fourbit.train._trackers import Board
from fourbit.train._validate import validated
from fourbit.train._warn import warn_live


def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    title: str = "",
    beside: Path | None = None,
) -> Result:
    """See `fourbit.train.train`.

    Args:
        title: stands in front of the progress bar.
        beside: folder of a run that this one will be compared with, and so must have seen the same data.
    """
    config = validated(config)
    assert config.out is not None
    resume = resume or (restarts() > 0 and has_run(config.out))
    if resume:
        require_same(config.out, config)
    else:
        require_free(config.out)
    session = open_session(config)
    config = session.config
    assert config.out is not None
    identity = datasets.identity(session.task.data)
    for other in (config.out if resume else None, beside):
        if other is not None:
            require_same_data(other, config, identity)
    main = session.accelerator.is_main_process
    folder = RunFolder(config.out, main, identity)
    with folder.held():
        return _train(session, folder, resume, title)


def _train(session: Session, folder: RunFolder, resume: bool, title: str) -> Result:
    config, main = session.config, folder.active
    state = _resume(session, folder) if resume else None
    if state is not None and state.step >= session.total_steps and (ended := finished(folder)) is not None:
        return ended
    if state is None:
        state = LoopState()
        if resume:
            folder.reopen(config, _environment(session), metrics_bytes=0)
        else:
            folder.create(config, _environment(session))
    board = Board(config.log_to if main else (), folder.path, state.step, config.as_dict())
    display = Display(session.total_steps, config.epochs, bar=config.progress, active=main, title=title)
    try:
        if config.warn:
            warn_live(folder, display, goes_on=resume)
        display.say(f"data: {datasets.describe(session.task.data)}")
        with StopRequest() as stop, display:
            return Loop(session, state, Recorder(config, folder, board, display), stop).run()
    finally:
        board.close()


def finished(folder: RunFolder) -> Result | None:
    """The end of a run that is over, read from its files; None if it is not."""
    line = last_record(folder.path, "final")
    if line is None or line.get("stopped") not in ("done", "max_steps", "diverged"):
        return None
    return Result(
        folder=folder.path,
        stopped=line["stopped"],
        step=line["step"],
        epoch=line["epoch"] + (line["stopped"] == "done"),
        test_accuracy=line.get("test_accuracy"),
        test_loss=line.get("test_loss"),
        test_score=line.get("test_score"),
        seconds=line.get("seconds") or 0.0,
        skipped=line.get("skipped") or 0,
    )


def _resume(session: Session, folder: RunFolder) -> LoopState | None:
    """Load the checkpoint into the session; None if the run was interrupted before the first one.

    Raises:
        UserError: a checkpoint that is damaged, of another model, or of a longer run.
    """
    place = folder.checkpoint
    found = _checkpoint.newest(place, lambda c: require_own(c.state, session.config, folder.data, place))
    if found is None:
        line, every = last_record(folder.path, "epoch"), session.config.checkpoint_every
        if every and line is not None and line["epoch"] >= every:  # epochs count from 0: one was saved before this one
            raise UserError(
                f"{folder.path} has finished epochs but no checkpoint any more: start anew with another --out."
            )
        return None
    path, checkpoint = found
    try:
        state = LoopState.from_dict(checkpoint.state["loop"])
        _checkpoint.restore_model(session.bare, checkpoint.model, path)
        load_optimizer_tensors(session.optimizer, checkpoint.training)
        if session.scaler is not None:
            session.scaler.load_state_dict(checkpoint.state["scaler"])
        if session.scheduler is not None:
            session.scheduler.load_state_dict(checkpoint.state.get("scheduler") or {"began": {}})
        load_rng_tensors(session.device, checkpoint.training)
        session.task.load_state_tensors(checkpoint.training)
        metrics_bytes = checkpoint.state["metrics_bytes"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the checkpoint in {path} does not fit this run: start anew with another --out.") from error
    if state.step > session.total_steps:
        raise UserError(
            f"{folder.path} has trained for {state.step} steps, more than the {session.total_steps} that are asked for: "
            "ask for as many, or choose another --out."
        )
    if state.step >= session.total_steps and finished(folder) is not None:
        return state
    session.accelerator.wait_for_everyone()  # they have all read it
    if folder.active:
        _checkpoint.adopt(place, path)
    folder.reopen(session.config, _environment(session), metrics_bytes)
    return state


def _environment(session: Session) -> dict[str, Any]:
    return describe(session.device) | {"products": session.config.products}
