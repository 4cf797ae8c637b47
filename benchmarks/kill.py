"""Kill `fourbit train`, `compare` and `reproduce` at random moments, go on, and see what is lost.

    python -m benchmarks.kill --kills 100
    python -m benchmarks.kill --kills 20 --signal TERM

Each command runs once undisturbed, on the built-in digits. Then it runs again and again in one folder and is killed at a
random moment each time, until it ends by itself; then in the next folder, until there were enough kills. Processes are forked
from this one, which has torch loaded, so that kills fall into the command's own work. Of every folder that ends: the files are
those of the undisturbed run, no more and no fewer, and weights, optimizer, generators and metrics are the same to the bit.

An epoch is lost if its checkpoint was complete before a kill, and a later process does not go on from it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from fourbit.cli import main as fourbit
from fourbit.data import load
from fourbit.train import _checkpoint

SMALL = ("--model", "digits_cnn", "--data", "digits", "--no-progress", "--log-every", "1", "--threads", "1")
SMALL += ("--batch-size", "359", "--log-to=none")
COMMANDS = {
    "train": (
        "train",
        *SMALL,
        "--recipe",
        "luq",
        "--observe-every",
        "4",
        "--epochs",
        "4",
        "--keep-every",
        "2",
        "--out",
        "o",
    ),
    "compare": ("compare", *SMALL, "--recipes", "fp32,ibm2020", "--seeds", "0", "--epochs", "2", "--out", "o"),
    "reproduce": ("reproduce", "questions", "--row", "radix", "--scale", "smoke", "--columns", "ibm2020")
    + ("--threads", "1", "--no-progress", "--out", "o"),
}
IMPORTED = (
    "accelerate",
    "fourbit.reproduce",
    "fourbit.train._run",
    "safetensors.torch",
    "sklearn.datasets",
    "torch._dynamo",
)
IMPORTED += ("torch.utils.tensorboard",)
CLOCK = ("seconds", "images_per_s", "started", "seconds_per_epoch")
CODES = {"KILL": -signal.SIGKILL, "TERM": 128 + signal.SIGTERM, "INT": 128 + signal.SIGINT}


def started(command: Sequence[str], folder: Path) -> int:
    """Run a command in a process of its own, with its output in a file; returns its number."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    log = os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resume = command[0] == "train" and Path("o/config.json").exists()
    try:
        code = fourbit([*command, "--resume"] if resume else list(command))
        sys.stdout.flush()
    except BaseException as error:
        print("Traceback:", repr(error), flush=True)
        code = 1
    os._exit(code)


def ended(process: int) -> int:
    """Wait for a process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def runs(folder: Path) -> list[Path]:
    """The run folders below a folder."""
    return sorted(path.parent for path in folder.rglob("config.json"))


def saved(folder: Path) -> dict[Path, int]:
    """Epochs of the newest checkpoint of each run."""
    found = {}
    for run in runs(folder):
        newest = _checkpoint.newest(run / "checkpoint", lambda checkpoint: None)
        if newest is not None:
            found[run] = newest[1].state["loop"]["epoch"]
    return found


def timeless(value: object) -> object:
    """JSON without what depends on the clock."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in (*CLOCK, "resumed")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, object]:
    """What each file below a folder says, apart from clocks."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "tb"):  # TensorBoard adds files
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            document = timeless(json.loads(path.read_text()))
            if path.name == "state.json":  # its counters hold the seconds
                document = {k: v for k, v in document["content"].items() if k == "strides"}  # type: ignore[index]
            found[name] = document
        else:
            found[name] = None  # tables show seconds
    return found


def attack(name: str, kills: int, kind: str, folder: Path, draw: random.Random) -> dict[str, int]:
    """Kill a command so many times; returns the counts of what went wrong."""
    command, reference = COMMANDS[name], folder / f"{name}-whole"
    reference.mkdir()
    start = time.perf_counter()
    if code := ended(started(command, reference)):
        raise SystemExit(f"{name} does not run by itself (exit code {code}): see {reference}.log")
    span, expected = time.perf_counter() - start, content(reference)
    counts = dict.fromkeys(("kills", "folders", "lost epochs", "different results", "stray files", "wrong exits"), 0)
    before: dict[Path, int] = {}
    victim = folder / name
    victim.mkdir()
    while counts["kills"] < kills or before:
        process = started(command, victim)
        time.sleep(draw.uniform(0, span) if counts["kills"] < kills else 0)
        if counts["kills"] < kills:
            os.kill(process, getattr(signal, f"SIG{kind}"))
        code = ended(process)
        now = saved(victim)
        counts["lost epochs"] += sum(max(0, epochs - now.get(run, 0)) for run, epochs in before.items())
        before = now or {victim: 0}
        log = Path(f"{victim}.log").read_text()
        if code in (CODES[kind], -getattr(signal, f"SIG{kind}")) and "Traceback" not in log:
            counts["kills"] += 1
            if counts["kills"] % 10 == 0:
                print(f"{name}: {counts}", file=sys.stderr, flush=True)
            continue
        if code or "Traceback" in log:
            print(f"{name}: exit code {code}\n{log}", flush=True)
            counts["wrong exits"] += 1
            if counts["wrong exits"] > 3:
                return counts
            continue
        found = content(victim)
        stray = sorted(set(found) ^ set(expected))
        wrong = [key for key in expected if key in found and found[key] != expected[key]]
        counts["folders"] += 1
        counts["stray files"] += len(stray)
        counts["different results"] += bool(wrong)
        if stray or wrong:
            print(f"{name}: stray or missing {stray}, different {wrong}", flush=True)
        shutil.rmtree(victim)
        victim.mkdir()
        before = {}
    return counts


def main() -> int:
    """Command line; exit code 1 if anything was lost."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--kills", type=int, default=100, help="of each command")
    options.add_argument("--signal", choices=CODES, default="KILL")
    options.add_argument("--commands", nargs="*", choices=COMMANDS, default=list(COMMANDS))
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)
    load("digits")
    warnings.simplefilter("ignore")  # of damaged checkpoints: they are counted
    lost = 0
    with tempfile.TemporaryDirectory() as place:
        for name in chosen.commands:
            start = time.perf_counter()
            counts = attack(name, chosen.kills, chosen.signal, Path(place), random.Random(chosen.seed))
            lost += sum(count for key, count in counts.items() if key not in ("kills", "folders"))
            words = ", ".join(f"{key} {count}" for key, count in counts.items())
            print(f"{name} (SIG{chosen.signal}): {words}; {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
