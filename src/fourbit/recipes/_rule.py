"""Rules and recipes: which layers get which LayerSpec. An ordered tuple of rules; the first that matches a layer wins."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fourbit.errors import UserError
from fourbit.nn import MatMul, OutControl, UpkeepSpec
from fourbit.ops import LayerSpec
from fourbit.recipes._schedule import Phase, check_phases


@dataclass(frozen=True)
class LayerInfo:
    """What a selector sees of a layer: its name, the module, its position among the convertible layers."""

    name: str
    module: nn.Module
    index: int
    count: int


@dataclass(frozen=True)
class Selector:
    """A named predicate on layers; combine with `|`, `&` and `~`. `patterns` are the layer names that it looks for.

    >>> str(first(1) | ~kernel_size(1))
    '(first(1) | ~kernel_size(1))'
    """

    label: str
    test: Callable[[LayerInfo], bool]
    patterns: tuple[str, ...] = ()

    def __call__(self, info: LayerInfo) -> bool:
        return self.test(info)

    def __or__(self, other: Selector) -> Selector:
        patterns = self.patterns + other.patterns
        return Selector(f"({self} | {other})", lambda info: self(info) or other(info), patterns)

    def __and__(self, other: Selector) -> Selector:
        patterns = self.patterns + other.patterns
        return Selector(f"({self} & {other})", lambda info: self(info) and other(info), patterns)

    def __invert__(self) -> Selector:
        return Selector(f"~{self}", lambda info: not self(info), self.patterns)

    def __str__(self) -> str:
        return self.label


def first(n: int = 1) -> Selector:
    """The first n convertible layers, in order of definition."""
    return Selector(f"first({n})", lambda info: info.index < n)


def last(n: int = 1) -> Selector:
    """The last n convertible layers, in order of definition."""
    return Selector(f"last({n})", lambda info: info.index >= info.count - n)


def last_share(share: float) -> Selector:
    """The last layers, a share of all convertible ones, rounded up: 0.15 of 20 are 3."""
    if not 0 < share <= 1:
        raise UserError(f"a share of the layers lies above 0 and is at most 1, not {share!r}")
    shown = f"{share:g}" if float(f"{share:g}") == share else repr(share)  # a label says all, and is what files have
    return Selector(f"last_share({shown})", lambda info: info.index >= info.count - math.ceil(share * info.count))


def name(pattern: str) -> Selector:
    """Layers whose dotted name contains a match of the regular expression."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"name({pattern!r}) is not a regular expression ({error}): escape special characters"
        ) from error
    return Selector(f"name({pattern!r})", lambda info: compiled.search(info.name) is not None, (pattern,))


def kernel_size(size: int) -> Selector:
    """Convolutions with this kernel size in every dimension."""

    def test(info: LayerInfo) -> bool:
        kernel = getattr(info.module, "kernel_size", None)
        return isinstance(kernel, tuple) and all(k == size for k in kernel)

    return Selector(f"kernel_size({size})", test)


def depthwise() -> Selector:
    """Convolutions with one input channel per group and more than one group."""

    def test(info: LayerInfo) -> bool:
        groups, channels = getattr(info.module, "groups", 1), getattr(info.module, "in_channels", 0)
        return groups > 1 and groups == channels

    return Selector("depthwise()", test)


def widens() -> Selector:
    """Convolutions with more output than input channels: the expanding 1x1 at the end of a bottleneck block."""
    return Selector("widens()", lambda i: getattr(i.module, "out_channels", 0) > getattr(i.module, "in_channels", 0))


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Args:
        spec: what matching layers get; None leaves them untouched, in the model's own precision.
        types: torch classes that match, and with them their subclasses that are converted; None for all convertible ones but
            `fourbit.nn.MatMul`.
        where: selector by position or name.
        when: selector by property.
        optional: whether the rule may match nothing; otherwise that is an error.
        label: short name for messages and tables.
    """

    spec: LayerSpec | None
    types: tuple[type[nn.Module], ...] | None = None
    where: Selector | None = None
    when: Selector | None = None
    optional: bool = False
    label: str = ""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The layer names that its selectors look for."""
        return sum((s.patterns for s in (self.where, self.when) if s is not None), ())

    def matches(self, info: LayerInfo, torch_class: type[nn.Module]) -> bool:
        """Whether the rule applies to a layer of this torch class."""
        return (
            (torch_class is not MatMul if self.types is None else torch_class in self.types)
            and (self.where is None or self.where(info))
            and (self.when is None or self.when(info))
        )

    def __str__(self) -> str:
        conditions = [str(s) for s in (self.where, self.when) if s is not None]
        if self.types is not None:
            conditions.insert(0, "|".join(t.__name__ for t in self.types))
        return f"{self.label or 'rule'} [{', '.join(conditions) or 'every layer'}]"


@dataclass(frozen=True)
class Recipe:
    """A 4-bit training method as data.

    Args:
        name: identifier.
        rules: tried in order for each layer; a layer that no rule matches stays as it is.
        summary: one line.
        source: citation.
        phases: how precision changes over time; a `Scheduler` carries them out.
        upkeep: what is looked after from step to step in each layer whose weight is quantized; likewise.

    Raises:
        UserError: no rules, phases out of order, or the same upkeep twice.
    """

    name: str
    rules: tuple[Rule, ...]
    summary: str = ""
    source: str = ""
    phases: tuple[Phase, ...] = ()
    upkeep: tuple[UpkeepSpec, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "upkeep", tuple(self.upkeep))
        check_phases(self.name, self.phases)
        kinds = [type(each) for each in self.upkeep]
        if len(set(kinds)) < len(kinds) or (OutControl in kinds and self.phases):
            raise UserError(
                f"recipe {self.name!r}: each kind of upkeep is there once, and OutControl does not go with phases"
            )
        if not self.rules:
            raise UserError(f"recipe {self.name!r} has no rules: give it at least one Rule")

    def __str__(self) -> str:
        return self.name
