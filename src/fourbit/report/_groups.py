"""Runs that differ by their seed alone, or by what does not touch the numbers, form a group: one line in a table, one colour in
a figure.

The label of a group is its recipe. Model and data set join the label where the page shows several of them, and any
other setting where two groups share a recipe and differ in it, so that labels are short and never ambiguous. The metric
by which runs are judged counts as a setting: numbers of different metrics never meet in a group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fourbit.report._read import Run, planned_order, text

NOT_SETTINGS = (
    *("seed", "out", "data_dir", "data_identity"),
    *("progress", "log_to", "log_every", "observe_every", "checkpoint_every", "keep_every"),
    "sample_tokens",
    "warn",
    *("threads", "tune_malloc", "workers"),
)
"""Fields of `config.json` in which the runs of one group may differ: they do not touch the numbers, or differ by design. For
the data see `_of_one_data`."""

ADDED = {
    "max_test_batches": None,
    "sequence_length": 35,
    "beam_size": 1,
    "beta2": 0.999,
    "loss_scale_interval": 200,
    "alpha_lr_factor": 1.0,
    "columns": [],
    "image_size": None,
    "mirror": False,
    "tokenizer": None,
    "decay_share": 0.2,
}
"""Fields that an earlier version did not write, with the value that it trained with."""

IDENTITY = "data_identity"

TASK = ("model", "data", "dataset")
"""Fields that say what is trained; they are shown as a bare value, and only equal ones are compared."""

FP32 = "fp32"

_ABSENT = "unset"

_NO_METRIC = "result"


@dataclass(frozen=True)
class Group:
    """The runs of one configuration over its seeds (sorted).

    `label` tells it from all others on the page, `name` from those of the same network and data; groups of one name are drawn
    alike: `place` counts the names before it, of full precision and of the rest apart.
    """

    label: str
    config: Mapping[str, Any]
    runs: tuple[Run, ...]
    name: str
    place: int

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return text(self.config["recipe"])

    @property
    def metric(self) -> str:
        """Title of the metric of all its runs; "result" as long as nobody knows."""
        return text(self.config.get("metric", _NO_METRIC))

    @property
    def is_reference(self) -> bool:
        """Whether this is full-precision training, against which the others are compared."""
        return self.recipe == FP32

    @property
    def shown(self) -> Run:
        """The run whose layers are plotted: the lowest seed that recorded scales, statistics and histograms."""
        return max(self.runs, key=lambda r: (bool(len(r.scales.steps)), bool(len(r.trace.steps)), bool(r.histograms)))


def setting(config: Mapping[str, Any], name: str) -> str:
    """The value of a field as text, `unset` where the configuration lacks it."""
    return text(config[name]) if name in config else _ABSENT


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what may differ inside a group."""
    return {k: v for k, v in config.items() if k not in NOT_SETTINGS}


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the fields that do not have the same value everywhere, in order of first appearance."""
    names = dict.fromkeys(k for c in configs for k in c)
    return [k for k in names if len({setting(c, k) for c in configs}) > 1]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group by every setting but `NOT_SETTINGS`; network by network, each in the order of the comparison, or full precision
    first, then by label.
    """
    known = {_data(run): run.metric for run in runs if run.metric}
    written = {name for run in runs for name in run.config}
    by_settings: dict[frozenset[tuple[str, str]], tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:  # by the text of the values, so that different groups always have different labels
        fields = settings(run.config)
        fields |= {name: value for name, value in ADDED.items() if name in written and name not in fields}
        if metric := run.metric or known.get(_data(run)):
            fields["metric"] = metric
        by_settings.setdefault(frozenset((k, setting(fields, k)) for k in fields), (fields, []))[1].append(run)
    parts = [(fields | source, g) for fields, whole in by_settings.values() for source, g in _of_one_data(whole)]
    members = [sorted(g, key=lambda r: _natural(r.seed)) for _, g in parts]
    configs = [fields for fields, _ in parts]
    label_of, name_of = labels(configs), _names(configs)
    groups = [Group(label_of[i], configs[i], tuple(g), name_of[i], 0) for i, g in enumerate(members)]
    order = planned_order(runs)
    rank = {recipe: i for i, recipe in enumerate(order)}

    def place(g: Group) -> tuple[Any, ...]:
        network = [_natural(setting(g.config, field)) for field in TASK]
        return network, rank.get(g.recipe, len(order)), not g.is_reference, _natural(g.label)

    ordered = sorted(groups, key=place)
    names = [list(dict.fromkeys(g.name for g in ordered if g.is_reference is kind)) for kind in (False, True)]
    return [replace(g, place=names[g.is_reference].index(g.name)) for g in ordered]


def networks(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each model on each data set."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        found.setdefault(_task(group.config), []).append(group)
    return list(found.values())


def title(groups: Sequence[Group]) -> str:
    """What was trained on what, such as "resnet20 on cifar10"."""
    model, data = _values(groups, "model"), _values(groups, *TASK[1:])
    words = listing(model, 3) or "4-bit training"
    return f"{words} on {listing(data, 3)}" if data else words


def listing(items: Sequence[str], at_most: int) -> str:
    """The first of them, and how many more there are."""
    kept = list(items[:at_most])
    return ", ".join(kept) + (f" and {len(items) - at_most} more" if len(items) > at_most else "")


def _values(groups: Sequence[Group], *names: str) -> list[str]:
    found = [setting(g.config, n) for g in groups for n in names if n in g.config]
    return list(dict.fromkeys(found))


def _task(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(setting(config, k) for k in TASK)


def _names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The label of each configuration among those of the same task."""
    found = [""] * len(configs)
    for task in dict.fromkeys(map(_task, configs)):
        places = [i for i, c in enumerate(configs) if _task(c) == task]
        for i, label in zip(places, labels([configs[i] for i in places]), strict=True):
            found[i] = label
    return found


def _of_one_data(runs: Sequence[Run]) -> list[tuple[dict[str, Any], list[Run]]]:
    """The runs that saw the same data, and the field that tells them from others. `data_identity` says so; of runs that do not
    note it, all saw the data of those that do, if these agree; where none does, the folder counts."""
    identities = list(dict.fromkeys(text(r.config[IDENTITY]) for r in runs if IDENTITY in r.config))
    if len(identities) == 1:
        return [({}, list(runs))]
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        field = IDENTITY if IDENTITY in run.config else "data_dir"
        found.setdefault((field, setting(run.config, field)), []).append(run)
    if len(found) == 1:
        return [({}, list(runs))]
    return [({field: value}, g) for (field, value), g in found.items()]


def metrics(groups: Sequence[Group]) -> list[str]:
    """The metrics of all groups, each once."""
    return list(dict.fromkeys(g.metric for g in groups))


def labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The shortest unambiguous label of each configuration.

    >>> labels([{"recipe": "fp32", "lr": 0.1}, {"recipe": "luq", "lr": 0.1}, {"recipe": "luq", "lr": 0.2}])
    ['fp32', 'luq, lr=0.1', 'luq, lr=0.2']
    """
    task = [k for k in TASK if k in differing(configs)]

    def label(config: Mapping[str, Any], fields: Sequence[str]) -> str:
        parts = [setting(config, "recipe"), *(setting(config, k) for k in task)]
        return ", ".join([*parts, *(f"{k}={setting(config, k)}" for k in fields)])

    found, full = [], []
    for config in configs:
        peers = [c for c in configs if all(setting(c, k) == setting(config, k) for k in ("recipe", *task))]
        extra = [k for k in differing(peers) if k not in task]
        named = [k for k in extra if len({setting(c, k) for c in peers if k in c}) > 1]
        found.append(label(config, named))
        full.append(label(config, extra))
    return [full[i] if found.count(one) > 1 else one for i, one in enumerate(found)]


def reference_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The full-precision group to compare with: same model, data and metric; of those the one with most equal settings."""
    if group.is_reference:
        return None
    fields = (*TASK, "metric")
    same_task = [
        g for g in groups if g.is_reference and all(setting(g.config, k) == setting(group.config, k) for k in fields)
    ]
    return min(same_task, key=lambda g: len(differing([g.config, group.config])), default=None)


def _data(run: Run) -> tuple[str, ...]:
    """What a run was trained on: runs on the same data are judged by the same metric."""
    return tuple(setting(run.config, k) for k in TASK[1:])


def _natural(label: str) -> list[tuple[int, float, str]]:
    """Sort key that puts seed 9 before seed 10, and 0.05 before 0.1."""
    parts = re.findall(r"[0-9]+(?:\.[0-9]+)?|[^0-9]+", label)
    return [(0, float(p), "") if p[0] in "0123456789" else (1, 0.0, p) for p in parts]
