"""Cold starts, each in a process of its own: what importing costs over `import torch`, and the first training step.

    python -m benchmarks.cold_start --rounds 7 --compile

The first step is counted from the start of `import torch` to the end of the step: import, building, converting, data. No cache
of compiled code exists: each process has empty folders for those of torch.compile and of C++ extensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import _ways
from benchmarks._harness import Skip, described, header, in_fresh_process, markdown, parser, say, spread, start, write

IMPORTS = ("torch", "fourbit")
WAYS = (
    "fp32",
    "ours ibm2020",
    "ours luq",
    "ours ibm2020, no kernels",
    "fp32 compiled",
    "QPyTorch",
    "microxcaling MXFP4",
)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job without any cache of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TORCH_EXTENSIONS_DIR": f"{folder}/extensions"}
        return in_fresh_process(job, caches)


def turns(jobs: dict[str, dict[str, Any]], rounds: int, what: str) -> dict[str, Any]:
    """{name: {"runs": what each process measured, "skipped": None or the reason}}, in alternating turns."""
    found: dict[str, Any] = {name: {"runs": [], "skipped": None} for name in jobs}
    for turn in range(-1, rounds):  # the first turn only brings the files into memory
        say(f"{what}: round {turn + 1} of {rounds}")
        for name, job in jobs.items():
            if found[name]["skipped"]:
                continue
            try:
                result = run(job)
            except Skip as reason:
                found[name]["skipped"] = str(reason)
                continue
            if turn >= 0:
                found[name]["runs"].append(result)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns what it writes."""
    options = parser(__doc__, rounds=7)
    options.add_argument("--network", default="resnet20")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--ways", help="names separated by semicolons; compiled ones and libraries need their options")
    arguments = options.parse_args(argv)
    start(arguments)
    ways = arguments.ways.split(";") if arguments.ways else [w for w in WAYS if _takes_part(w, arguments)]
    steps = {
        way: {"do": "first_step", "network": arguments.network, "way": way, "batch": arguments.batch} for way in ways
    }
    imports = {module: {"do": "imports", "module": module} for module in IMPORTS}
    data = header("cold_start", arguments, argv) | {
        "network": arguments.network,
        "batch": arguments.batch,
        "imports": turns(imports, arguments.rounds, "imports"),
        "first_step": turns(steps, arguments.rounds, "first step"),
    }
    write(arguments.out, data, tables(data), figures(data))
    print("\n\n".join(tables(data).values()))
    say(f"\nwritten: cold_start.json and cold_start.md in {arguments.out}")
    return data


def _takes_part(name: str, arguments: Any) -> bool:
    way = _ways.WAYS[name]
    return arguments.compile if way.compiled else not (way.kind == "peer" and (arguments.no_peers or arguments.short))


def differences(found: dict[str, Any], name: str, base: str, key: str) -> list[float]:
    """Seconds of `name` over those of `base`, turn by turn."""
    pairs = zip(found[name]["runs"], found[base]["runs"], strict=False)
    return [a[key] - b[key] for a, b in pairs]


def import_cost(data: dict[str, Any]) -> tuple[float, float] | None:
    """Median seconds of `import fourbit` after torch, and of loading what `convert` needs on top."""
    runs = data["imports"]["fourbit"]["runs"]
    if not runs:
        return None
    return spread([r["module_s"] for r in runs]).median, spread([r["convert_s"] for r in runs]).median


def first_step_cost(data: dict[str, Any], way: str = "ours ibm2020") -> float | None:
    """Median seconds from the start to the end of the first step, over those of FP32."""
    over = differences(data["first_step"], way, "fp32", "total_s") if way in data["first_step"] else []
    return spread(over).median if over else None


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Markdown by name: imports, first steps."""
    cost = import_cost(data)
    torch_runs = data["imports"]["torch"]["runs"]
    rows = []
    if cost and torch_runs:
        rows = [
            ["import torch", f"{spread([r['torch_s'] for r in torch_runs]).median:.3f}"],
            ["import fourbit, torch being there", f"{cost[0]:.3f}"],
            ["fourbit.convert and param_groups, loaded", f"{cost[1]:.3f}"],
        ]
    steps = []
    for way, found in data["first_step"].items():
        if found["skipped"]:
            steps.append([way, f"skipped: {found['skipped']}", "", "", "", "", "", ""])
            continue
        keys = ("torch_s", "library_s", "prepare_s", "first_s", "second_s", "total_s")
        over = first_step_cost(data, way)
        cells = [f"{spread([r[key] for r in found['runs']]).median:.3f}" for key in keys]
        steps.append([way, *cells, "" if over is None else f"{over:+.3f}"])
    columns = [
        "way",
        "import torch",
        "fourbit",
        "build",
        "first step",
        "second step",
        "start to first step",
        "over fp32",
    ]
    return {
        "machine": described(data["machine"]),
        "imports": markdown(["seconds", "median"], rows),
        "cold-start": f"**{data['network']}, batch {data['batch']}**, seconds\n\n{markdown(columns, steps)}",
    }


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """None: a table of this size needs no plot."""
    return {}


if __name__ == "__main__":
    main()
