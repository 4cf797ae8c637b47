"""Timing in alternating turns, the command line that the benchmarks share, the machine, JSON and Markdown.

An entrant is a name and a function that builds a call; building may raise `Skip` with a reason, which the tables print. A
turn is one call, or as many as fill `least_s`. Turns go round (A B C A B C ...), so that what disturbs the machine disturbs
everybody, and the ratio of two entrants is the median of the ratios of their turns of the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

Kind = Literal["limit", "baseline", "ours", "reference", "compiled", "naive", "peer"]
"""What an entrant is: a bound that no one passes, plain PyTorch, this library, its reference without kernels, either of
them compiled, an emulation as one would write it, another library."""

MAY_FAIL = ("compiled", "peer")
"""Kinds whose exceptions become a reason in the table instead of ending the benchmark."""

Call = Callable[[], object]


class Skip(Exception):
    """An entrant cannot take part; the message is the reason that the tables print."""


@dataclass(frozen=True)
class Entrant:
    """Someone who takes part in a race."""

    name: str
    kind: Kind
    build: Callable[[], Call]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one or more numbers."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def clock(call: Call, calls: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def race(
    entrants: Iterable[Entrant], rounds: int, *, least_s: float = 0.0, budget_s: float = math.inf
) -> dict[str, dict[str, Any]]:
    """Time all entrants in alternating turns, after two calls each to warm up.

    Args:
        rounds: turns of each entrant.
        least_s: a turn repeats its call until it takes about this long.
        budget_s: an entrant whose turns would take longer than this altogether has only min(rounds, 5) turns.

    Returns:
        {name: {"kind", "seconds" (per call, one number per turn), "skipped" (None or the reason)}}.
    """
    results: dict[str, dict[str, Any]] = {}
    running: dict[str, tuple[Call, int, int]] = {}
    for entrant in entrants:
        result = results[entrant.name] = {"kind": entrant.kind, "seconds": [], "skipped": None}
        try:
            call = entrant.build()
            call()
            seconds = clock(call)
        except Skip as reason:
            result["skipped"] = str(reason)
            continue
        except Exception as error:
            if entrant.kind not in MAY_FAIL:
                raise
            result["skipped"] = brief(error)
            continue
        calls = max(1, math.ceil(least_s / max(seconds, 1e-9)))
        turns = rounds if rounds * calls * seconds <= budget_s else min(rounds, 5)
        running[entrant.name] = call, calls, turns
    gc.collect()
    gc.freeze()  # what is there now need not be searched for garbage again
    gc.disable()
    try:
        for turn in range(rounds):
            gc.collect()
            for name, (call, calls, turns) in running.items():
                if turn < turns:
                    results[name]["seconds"].append(clock(call, calls))
    finally:
        gc.enable()
        gc.unfreeze()
    return results


def brief(error: BaseException) -> str:
    """The first line of an error, without folders of this machine."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"/[^\s'\"]*/", "", lines[0])
    return f"{type(error).__name__}: {text[:120]}".rstrip(": ")


def time_of(results: dict[str, Any], name: str) -> Spread | None:
    """Seconds of an entrant; None where it was skipped."""
    seconds = results.get(name, {}).get("seconds")
    return spread(seconds) if seconds else None


def ratio(results: dict[str, Any], name: str, base: str) -> Spread | None:
    """Time of `name` over time of `base`, turn by turn; None where either was skipped."""
    above, below = (results.get(n, {}).get("seconds") or [] for n in (name, base))
    pairs = [a / b for a, b in zip(above, below, strict=False)]  # the slow have fewer turns
    return spread(pairs) if pairs else None


def fastest(results: dict[str, Any], kinds: Sequence[Kind]) -> str | None:
    """The entrant of these kinds with the smallest median."""
    times = {n: statistics.median(r["seconds"]) for n, r in results.items() if r["kind"] in kinds and r["seconds"]}
    return min(times, key=times.__getitem__) if times else None


def parser(description: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--short", action="store_true", help="fewer and smaller cases, 5 rounds")
    found.add_argument("--rounds", type=int, default=None, help=f"turns of each entrant (default {rounds})")
    found.add_argument("--threads", type=int, default=None, help="default: torch's")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, tables and plots")
    found.add_argument("--compile", action="store_true", help="torch.compile takes part (slow to start)")
    found.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    found.add_argument("--microxcaling", help="folder of a clone (or environment variable MICROXCALING)")
    found.add_argument("--fp4-trainkit", help="folder of a clone (or environment variable FP4_TRAINKIT)")
    found.set_defaults(default_rounds=rounds)
    return found


def start(arguments: argparse.Namespace) -> None:
    """Settings of the process, the same for every entrant: allocator, threads, where peers are."""
    import torch

    from fourbit.train._environment import tune_malloc

    arguments.tuned_malloc = tune_malloc()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the processes that are started
    if arguments.rounds is None:
        arguments.rounds = 5 if arguments.short else arguments.default_rounds
    for variable in ("MICROXCALING", "FP4_TRAINKIT"):
        folder = getattr(arguments, variable.lower())
        if folder is not None:
            os.environ[variable] = folder
    if arguments.no_peers:
        os.environ["FOURBIT_BENCHMARK_PEERS"] = "0"
    arguments.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def header(benchmark: str, arguments: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    """What a reader needs beside the figures: machine, versions, command. Holds no path of this machine."""
    from benchmarks import _peers

    words = list(sys.argv[1:] if argv is None else argv)
    kept = [
        w
        for i, w in enumerate(words)
        if not _is_path(w) and not (i and _is_path(words[i - 1]) and "=" not in words[i - 1])
    ]
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *kept]),
        "machine": machine(),
        "peers": _peers.versions(),
        "settings": {
            "rounds": arguments.rounds,
            "tuned_malloc": arguments.tuned_malloc,
            "load_before": arguments.load,
        },
    }


def machine() -> dict[str, Any]:
    """This machine, its libraries and its kernels."""
    import torch

    from fourbit import backends
    from fourbit.train._environment import describe

    kernels = {status.name: status.detail for status in backends.statuses()}
    return describe(torch.device("cpu")) | {"backends": kernels, "memory_bytes": _memory_bytes()}


def _is_path(word: str) -> bool:
    return word.split("=")[0] in ("--microxcaling", "--fp4-trainkit", "--out")


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def in_fresh_process(job: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a job of `_child.py` in a process of its own and return what it measured, with "wall_s" of the whole process.

    Raises:
        Skip: the process failed, or had to skip.
    """
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._child", json.dumps(job)],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - begin
    if done.returncode:
        raise Skip(brief(RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if "skipped" in found:
        raise Skip(found["skipped"])
    return found | {"wall_s": wall}


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; the first `text_columns` are left-aligned, the rest right."""
    align = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, align, *rows])


def write(out: Path, data: dict[str, Any], tables: dict[str, str], figures: dict[str, Any]) -> None:
    """`<benchmark>.json`, `<benchmark>.md`, and one PNG per figure."""
    out.mkdir(parents=True, exist_ok=True)
    name = data["benchmark"]
    (out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / f"{name}.md").write_text("\n\n".join(tables.values()) + "\n")
    for figure_name, figure in figures.items():
        figure.savefig(out / f"{figure_name}.png", dpi=110)


def say(text: str) -> None:
    """Progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def described(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    gib = (machine.get("memory_bytes") or 0) / 2**30
    kernels = ", ".join(f"{name}: {detail}" for name, detail in machine["backends"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {gib:.0f} GiB, "
        f"{platform_name(machine)}, Python {machine['python']}, torch {machine['torch']}, fourbit {machine['fourbit']} "
        f"({machine['commit'] or 'installed'}), kernels {kernels}; {machine['started']}"
    )


def platform_name(machine: dict[str, Any]) -> str:
    """The operating system, without the build of its kernel."""
    return machine.get("platform", platform.system()).split("-")[0]
