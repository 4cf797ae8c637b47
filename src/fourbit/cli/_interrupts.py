"""Ctrl-C while a command runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fourbit._interrupt import leave


class Interrupts:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.seen = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """KeyboardInterrupt; during an import, and the second time, the end of the process."""
        while frame is not None:
            if self.seen or frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                leave(number, frame)
            frame = frame.f_back
        self.seen = True
        raise KeyboardInterrupt


@contextmanager
def interruptible_imports() -> Iterator[Interrupts]:
    """While this is active, Ctrl-C in the middle of an import ends the process at once, and elsewhere is as ever.

    Large libraries swallow a KeyboardInterrupt while they load, or turn it into errors of their own. Nothing is lost,
    since no file is written during an import.
    """
    interrupts, before = Interrupts(), signal.getsignal(signal.SIGINT)
    ours = before in (signal.default_int_handler, leave) and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
