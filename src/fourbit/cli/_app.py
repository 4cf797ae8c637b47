"""The one application that all commands belong to."""

from __future__ import annotations

from cyclopts import App

from fourbit._version import __version__

EXIT_USER_ERROR = 2

app = App(
    name="fourbit",
    help="Train deep neural networks in 4 bits, compare recipes, and look inside them.",
    version=__version__,
    suppress_keyboard_interrupt=False,
)
