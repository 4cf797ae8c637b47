"""Errors that speak to the user: one sentence that says what is wrong and what to do.

The command line prints the sentence and exits with code 2; a library user sees an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one clear sentence with the remedy; no traceback is needed to act on it."""


class NonFiniteError(UserError):
    """Training met NaN or infinity. `layers` names where, as far as it is known."""

    def __init__(self, message: str, layers: tuple[str, ...] = ()):
        super().__init__(message)
        self.layers = layers


class UnknownNameError(UserError, KeyError):
    """A name that is not in a catalogue. Also a KeyError, so that catalogues behave as mappings do."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown(kind: str, name: object, valid: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not in a catalogue, with the nearest valid names.

    >>> str(unknown("recipe", "ibm202", ["fp32", "ibm2020"]))
    "unknown recipe 'ibm202': did you mean 'ibm2020'? Valid names: fp32, ibm2020."
    """
    names = list(valid)
    by_folded = {n.lower().replace("-", "_"): n for n in names}
    folded = str(name).lower().replace("-", "_")
    near = [by_folded[m] for m in difflib.get_close_matches(folded, by_folded, n=3, cutoff=0.5)]
    hint = f": did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return UnknownNameError(f"unknown {kind} {str(name)!r}{hint} Valid names: {', '.join(names)}.")
