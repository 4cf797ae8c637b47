"""A catalogue: names to values, in the order of registration, with a helpful error for a name that is not there.

Everything that a user can name (formats, recipes, models, data sets, backends) lives in one of these, so that lists,
documentation and tests can iterate over it and an addition needs no second line elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from fourbit.errors import unknown

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to values. `kind` is the noun used in error messages ("recipe", "model")."""

    def __init__(self, kind: str):
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, value: T) -> T:
        """Enter `value` under `name` and return it; a name is never entered twice."""
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._items[name] = value
        return value

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda value: self.add(name, value)

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise unknown(self.kind, name, self._items)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
