"""Ctrl-C and SIGTERM as a request: the step in progress ends, a checkpoint is saved, then the run stops.

A second Ctrl-C is the ordinary KeyboardInterrupt. Nothing is damaged by it, since files are replaced only when their
successor is complete.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager: while it is active, `requested` becomes True at the first signal, and `StopRequest.last` which it was.

    >>> with StopRequest() as stop:
    ...     signal.raise_signal(signal.SIGINT)
    ...     print(stop.requested)
    True
    """

    last: ClassVar[int | None] = None

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to this thread alone
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        StopRequest.last = number
