"""The folder of a run, and its text files: `config.json`, `env.json` and `metrics.jsonl`.

`metrics.jsonl` has one JSON object a line, written through at once, so that a reader sees a run while it goes on and
loses at most a line if the machine dies. NaN and infinity, which JSON does not know, are null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where nothing guards a folder
    fcntl = None

from fourbit import _files, models, recipes
from fourbit._version import __version__
from fourbit.errors import UserError
from fourbit.train._config import DEFAULT_LENGTH, TrainConfig

MAY_DIFFER = frozenset(
    {"out", "data_dir", "progress", "log_to", "threads", "tune_malloc", "log_every", "observe_every"}
    | {"checkpoint_every", "keep_every", "sample_tokens", "on_nonfinite", "workers", "warn"}
)
"""Fields that a resumed run may change: they do not touch the numbers (threads: beyond the order of sums)."""

LENGTH = frozenset({"epochs", "max_steps"})
"""Fields that may change too if the learning rate does not depend on the length of the run."""


DATA = "data_identity"
"""In config.json: `fourbit.data.identity` of what the run was trained on."""


OWN_RECIPE = "recipe.toml"
"""The recipe of a run, if it came from a file: that may change."""


def finite(value: Any) -> Any:
    """`value` with null for every NaN and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write `path`, a file or folder in that of a run, into one sentence."""
    try:
        yield
    except OSError as error:
        kept = "; the last checkpoint is intact" if (path.parent / "checkpoint").exists() else ""
        if error.errno in _files.FULL:
            raise UserError(
                f"the disk is full: {path} could not be written{kept}; free some space and go on "
                "(train: with --resume, compare: with the same command)."
            ) from error
        raise UserError(
            f"{path} could not be written ({error.strerror or error}){kept}: check the folder, or choose another --out."
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that it holds all of `content` or what it held before."""
    with writing(path):
        _files.replace_file(path, content)


class RunFolder:
    """A run's files. Make one with `create` or `reopen`; `active` False (other processes than the first) writes nothing.

    `data`: `fourbit.data.identity` of the data, for a run that trains. `listeners` are called with every line that is written.
    """

    def __init__(self, path: Path, active: bool = True, data: str = ""):
        self.path, self.active, self.data = path, active, data
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.path / "checkpoint"

    def kept_checkpoint(self, epoch: int) -> Path:
        """Folder of the checkpoint that is kept of the moment after so many epochs."""
        return self.path / "checkpoints" / f"epoch-{epoch}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and keeps other processes out of it; the lock ends with the process that holds it.

        Raises:
            UserError: another process trains in it, or it cannot be made.
        """
        if not self.active or fcntl is None:
            yield
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            place = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training in {self.path}: wait until it has ended, or choose another --out."
                ) from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(place)

    def is_held(self) -> bool:
        """Whether a process trains in it."""
        if fcntl is None:
            return False
        place = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(place, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(place)
        return False

    def create(self, config: TrainConfig, environment: dict[str, Any]) -> None:
        """Start a new run.

        Raises:
            UserError: the folder is not empty, or cannot be written.
        """
        if not self.active:
            return  # and the folder may be there already, made by the process that writes
        require_free(self.path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._write_config(config)
        if recipes.is_file(config.recipe):
            replace_file(self.path / OWN_RECIPE, recipes.recipe_text(recipes.get(config.recipe)).encode())
        self._write("env.json", environment)
        self._truncate(0)

    def reopen(self, config: TrainConfig, environment: dict[str, Any], metrics_bytes: int) -> None:
        """Go on with a run: what was written after the checkpoint is dropped, and the new sitting noted in env.json."""
        if not self.active:
            return
        first = environment
        if (self.path / "env.json").is_file():  # a run may have been killed before it wrote that
            first = read_json(self.path / "env.json")
            first.setdefault("resumed", []).append(environment)
        self._write("env.json", first)
        self._write_config(config)
        self._truncate(metrics_bytes)

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, to cut it back to on resume; that much of it is on the disk."""
        path = self.path / "metrics.jsonl"
        with writing(path), path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def record(self, kind: str, step: int, **fields: Any) -> None:
        """Append a line to metrics.jsonl."""
        if not self.active:
            return
        record = finite({"kind": kind, "step": step, **fields})
        line = json.dumps(record, allow_nan=False) + "\n"
        path = self.path / "metrics.jsonl"
        # Unbuffered: a line that did not fit must not come back when the file is closed.
        with writing(path), open(path, "ab", buffering=0) as file:
            rest = line.encode()
            while rest:
                rest = rest[file.write(rest) :]
        for listener in self.listeners:
            listener(record)

    def write_sample(self, text: str) -> None:
        """Write sample.txt: what the network says or draws at the end."""
        if self.active:
            replace_file(self.path / "sample.txt", text.encode())

    def write_examples(self, examples: Mapping[str, Any]) -> None:
        """Write examples.json: a table of what the network made of test examples."""
        if self.active:
            self._write("examples.json", dict(examples))

    def _write_config(self, config: TrainConfig) -> None:
        self._write("config.json", config.as_dict() | {DATA: self.data, "fourbit_version": __version__})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        replace_file(self.path / name, (json.dumps(finite(content), indent=2) + "\n").encode())

    def _truncate(self, size: int) -> None:
        path = self.path / "metrics.jsonl"
        with writing(path), open(path, "ab") as file:
            if file.tell() < size:
                raise UserError(f"{path} is shorter than when the checkpoint was made: restore it, or start anew.")
            file.truncate(size)


def has_run(path: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (path / "config.json").is_file()


def require_free(path: Path) -> None:
    """Reject a folder with anything in it: nothing is ever overwritten.

    Raises:
        UserError: it exists and is not an empty folder.
    """
    if path.is_dir() and any(item.suffix != ".tmp" for item in path.iterdir()):  # .tmp: killed before it began
        resume = ", or add --resume to go on with the run in it" if has_run(path) else ""
        raise UserError(f"{path} is not empty: choose another --out{resume}.")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another --out.")


def require_same(path: Path, config: TrainConfig) -> None:
    """Check that the run in `path` was made with `config`. Fields that its version did not know had their defaults.

    Raises:
        UserError: there is no run, or a field differs that may not.
    """
    if not has_run(path):
        raise UserError(f"there is no run to go on with in {path}: check --out, or leave out --resume to start one.")
    require_no_links(path)
    written, now = read_json(path / "config.json"), config.as_dict()
    if "recipe" not in written:
        raise UserError(f"{path / 'config.json'} is not the configuration of a run: choose another --out.")
    before = TrainConfig().as_dict() | {"sequence_length": DEFAULT_LENGTH} | written
    _require_same_recipe(path, config)
    extends = before.get("schedule") == config.schedule and config.schedule in ("constant", "inverse_sqrt")
    free = MAY_DIFFER | (LENGTH if extends else frozenset())
    for field, value in now.items():
        if field not in free and before.get(field) != value:
            raise UserError(
                f"the run in {path} was made with {field} {_shown(before.get(field))}, not {_shown(value)}: "
                "repeat its settings to resume it, or choose another --out."
            )


def run_of(config: TrainConfig, data: str) -> dict[str, Any]:
    """What makes a run this one and no other, for its checkpoints."""
    fixed = {k: v for k, v in config.as_dict().items() if k not in MAY_DIFFER | LENGTH}
    if models.is_own(config.model):
        fixed["model"] = f"file with the digest {models.own_digest(config.model)}"
    return fixed | ({DATA: data} if data else {})


def require_own(checkpoint: Mapping[str, Any], config: TrainConfig, data: str, path: Path) -> None:
    """Check that what a checkpoint holds besides tensors is of this run. Earlier versions did not note it: then all is well.

    Raises:
        UserError: it is of another one.
    """
    own, written = run_of(config, data), checkpoint.get("run")
    for field, value in written.items() if isinstance(written, dict) else ():
        if field in own and own[field] != value:
            raise UserError(
                f"the checkpoint in {path} is of another run, with {field} {_shown(value)}, not {_shown(own[field])}: restore "
                "this run's own, or start anew with another --out."
            )


def recipe_of(path: Path, recipe: str) -> recipes.Recipe:
    """The recipe that the run in `path` was made with, `recipe` by name."""
    if not recipes.is_file(recipe):
        return recipes.get(recipe)
    return recipes.read_recipe(path / OWN_RECIPE)


def _require_same_recipe(path: Path, config: TrainConfig) -> None:
    """Reject a file that holds another recipe than when the run began."""
    if recipes.is_file(config.recipe) and (path / OWN_RECIPE).exists():
        changed = recipes.differences(recipe_of(path, config.recipe), recipes.get(config.recipe))
        if changed:
            raise UserError(
                f"{config.recipe} has changed since the run in {path} began ({changed[0]}): put the recipe of then "
                f"there again, {path / OWN_RECIPE}, or choose another --out."
            )


def require_no_links(path: Path) -> None:
    """Reject a run folder whose files are elsewhere: going on would write there, and what is made of it tell of them."""
    _files.require_inside(path, [*path.iterdir(), *path.glob("checkpoint*/*"), *path.glob("checkpoints/*/*")])


def require_same_data(path: Path, config: TrainConfig, data: str) -> None:
    """Check that the run in `path` saw the data with the identity `data`. Earlier versions did not note it: then all is well.

    Raises:
        UserError: it did not.
    """
    written = read_json(path / "config.json")
    if written.get(DATA, data) != data:
        place = "the hub" if config.data_dir is None else str(config.data_dir)
        before = written.get("data_dir") or "the hub"
        where = f"what {place} holds has changed since then" if before == place else f"it read {before}, not {place}"
        raise UserError(
            f"the run in {path} was made with other examples, labels or vocabulary of {config.data}: {where}; give the data of "
            "then (--data-dir), or choose another --out."
        )


def same_length(path: Path, config: TrainConfig) -> bool:
    """Whether the run in `path` was to be as long as `config` has it."""
    before, now = read_json(path / "config.json"), config.as_dict()
    return all(before.get(field) == now[field] for field in LENGTH)


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in a folder's metrics.jsonl, oldest first."""
    found = []
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == kind:
            found.append(record)
    return found


def last_record(path: Path, kind: str) -> dict[str, Any] | None:
    """The newest line of a kind in a folder's metrics.jsonl; None if there is none."""
    return next(reversed(records(path, kind)), None)


def read_json(path: Path) -> dict[str, Any]:
    """A file that a run has written; UserError for another one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: restore it, or choose another --out.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a file that fourbit wrote: choose another --out.")
    return value


def _shown(value: Any) -> str:
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
