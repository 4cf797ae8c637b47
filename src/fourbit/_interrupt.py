"""Ctrl-C from the first line of the program on; imports next to nothing, since what it imports can still be interrupted.

Exit codes are those by which shells tell of a signal: 128 and its number.
"""

import _signal as signal  # type: ignore[import-not-found]  # signal, without the enumerations that take it 15 ms
import os
import sys

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


def interrupted() -> int:
    """Say that Ctrl-C was pressed; returns the exit code."""
    os.write(sys.stderr.fileno(), b"fourbit: interrupted\n")  # also in a signal handler, unlike print
    return EXIT_INTERRUPTED


def leave(number: int, frame: object) -> None:
    """End the process."""
    os._exit(interrupted())


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process, unless it is ignored (in the background)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
