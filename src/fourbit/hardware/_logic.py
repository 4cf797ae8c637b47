"""Logic functions as Liberty writes them, evaluated on whole words of bits."""

from __future__ import annotations

import re
from collections.abc import Callable

from fourbit.errors import UserError

Gate = Callable[..., int]


def compile_function(function: str, pins: list[str]) -> Gate:
    """Liberty's formula as a function of the mask of all bits and the pins, on whole words of bits.

    >>> compile_function("!(A*B)", ["A", "B"])(0b1111, 0b0011, 0b0101)
    14
    """
    tokens = re.findall(r"[A-Za-z_]\w*|[01]|[()!'^&*+|]", function)
    position = 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1]

    def atom() -> str:
        token = take()
        if token == "!":
            inner = atom()
            return f"(M^{inner})"
        if token == "(":
            inner = disjunction()
            take()
        else:
            inner = {"0": "0", "1": "M"}.get(token, f"P{pins.index(token)}" if token in pins else "")
            if not inner:
                raise UserError(f"the Liberty function {function!r} names {token}, which is no pin.")
        while peek() == "'":
            take()
            inner = f"(M^{inner})"
        return inner

    def chain(lower: Callable[[], str], marks: str, operator: str, adjacent: bool = False) -> str:
        terms = [lower()]
        while peek() and (peek() in marks or (adjacent and peek() not in "+|^)")):
            if peek() in marks:
                take()
            terms.append(lower())
        return terms[0] if len(terms) == 1 else f"({operator.join(terms)})"

    def exclusive() -> str:
        return chain(atom, "^", "^")

    def conjunction() -> str:
        return chain(exclusive, "&*", "&", adjacent=True)

    def disjunction() -> str:
        return chain(conjunction, "+|", "|")

    body = disjunction()
    arguments = ", ".join(["M", *(f"P{k}" for k in range(len(pins)))])
    return eval(f"lambda {arguments}: {body}")  # made of names and operators above only
