"""What has to be measured in a process of its own: peak memory, and a first training step from a cold start.

`_harness.in_fresh_process` starts it with a job as JSON; it prints its result as JSON on the last line. Nothing heavy is
imported before a job asks for it, because a cold start is what one of them measures.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def _memory() -> dict[str, int]:
    """Bytes by the names of /proc/self/status (see proc(5))."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmHWM", "VmRSS", "RssFile"):
            found[key] = int(value.split()[0]) * 1024
    return found


def peak_memory(network: str, way: str, batch: int, width: int | None, steps: int) -> dict[str, Any]:
    """What training adds to the resident memory at its peak, beyond the network and a batch of data.

    Pages of files (code that is loaded at its first use) are not counted. Linux only.
    """
    from benchmarks import _networks, _ways
    from benchmarks._harness import Skip
    from fourbit.train._environment import tune_malloc

    if not Path("/proc/self/clear_refs").exists():
        raise Skip("peak memory is measured on Linux only")
    tune_malloc()
    training = _ways.prepare(way, _networks.get(network, width), batch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _memory()
    for _ in range(steps):
        training()
    after = _memory()
    files = max(0, after["RssFile"] - before["RssFile"])
    return {"peak_bytes": after["VmHWM"] - before["VmRSS"] - files, "before_bytes": before["VmRSS"]}


def imports(module: str) -> dict[str, Any]:
    """Seconds of `import torch`, of importing a module over it, and of loading all that `convert` needs."""
    import_torch = _timed("import torch")
    import_module = _timed(f"import {module}")
    load = _timed("import fourbit; fourbit.convert; fourbit.param_groups") if module == "fourbit" else 0.0
    return {"torch_s": import_torch, "module_s": import_module, "convert_s": load}


def first_step(network: str, way: str, batch: int) -> dict[str, Any]:
    """Seconds from nothing to the end of the first training step, and of the second."""
    torch_s = _timed("import torch")
    library_s = _timed("import fourbit; fourbit.convert; fourbit.param_groups") if way.startswith("ours") else 0.0
    from benchmarks import _networks, _ways
    from fourbit.train._environment import tune_malloc

    tune_malloc()
    spec = _networks.get(network)
    begin = time.perf_counter()
    training = _ways.prepare(way, spec, batch)
    prepare_s = time.perf_counter() - begin
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        training()
        seconds.append(time.perf_counter() - begin)
    return {
        "torch_s": torch_s,
        "library_s": library_s,
        "prepare_s": prepare_s,
        "first_s": seconds[0],
        "second_s": seconds[1],
        "total_s": torch_s + library_s + prepare_s + seconds[0],
    }


def _timed(statement: str) -> float:
    begin = time.perf_counter()
    exec(statement, {})
    return time.perf_counter() - begin


JOBS = {"peak_memory": peak_memory, "imports": imports, "first_step": first_step}


def main() -> None:
    """Run the job of the command line."""
    job = json.loads(sys.argv[1])
    name = job.pop("do")
    try:
        found = JOBS[name](**job)
    except Exception as error:
        if type(error).__name__ != "Skip":
            raise
        found = {"skipped": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
