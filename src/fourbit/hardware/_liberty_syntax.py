"""The syntax of Liberty files: groups within groups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from fourbit.errors import UserError

_TOKEN = re.compile(
    r"""\s+|/\*.*?\*/|//[^\n]*|\\\r?\n|(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s"(){}:;,/\\]+(?:/[^\s"(){}:;,/*\\]+)*)|(?P<mark>[(){}:;,])""",
    re.DOTALL,
)


@dataclass
class Group:
    """`name (arguments) { attributes and groups }`."""

    name: str
    arguments: list[str]
    attributes: dict[str, str] = field(default_factory=dict)
    complex: dict[str, list[str]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    def all(self, name: str) -> list[Group]:
        """The groups of that name."""
        return [g for g in self.groups if g.name == name]


def _tokens(text: str, where: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.end() == position:
            line = text.count("\n", 0, position) + 1
            raise UserError(f"{where} is not a Liberty file: line {line} cannot be read; get it anew.")
        position = found.end()
        if found.lastgroup:
            token = found.group(found.lastgroup)
            yield token[1:-1].replace("\\\n", " ").replace("\\\r\n", " ") if found.lastgroup == "string" else token


def parse(text: str, where: str) -> Group:
    """The group that `text` is.

    Raises:
        UserError: it is none, or breaks off.
    """
    top = Group("", [])
    stack = [top]
    tokens = _tokens(text, where)
    try:
        for token in tokens:
            if token == "}":
                stack.pop()
                if not stack:
                    break
                continue
            if token == ";":
                continue
            name, mark = token, next(tokens)
            if mark == ":":
                words = []
                while (word := next(tokens)) not in (";", "}"):
                    words.append(word)
                stack[-1].attributes[name] = " ".join(words)
                if word == "}":
                    stack.pop()
                continue
            if mark != "(":
                raise UserError(f"{where} is not a Liberty file: {name} is followed by {mark}; get it anew.")
            arguments = []
            while (word := next(tokens)) != ")":
                if word != ",":
                    arguments.append(word)
            following = next(tokens, ";")
            if following == "{":
                group = Group(name, arguments)
                stack[-1].groups.append(group)
                stack.append(group)
            else:
                stack[-1].complex[name] = arguments
                if following == "}":
                    stack.pop()
    except StopIteration:
        stack.append(top)
    if len(stack) != 1 or len(top.groups) != 1:
        raise UserError(f"{where} is damaged: it breaks off in the middle; get it anew.")
    return top.groups[0]
