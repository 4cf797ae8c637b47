"""Training steps: FP32 in both layouts, bf16 autocast, this library, a naive emulation and other libraries, network by network.

    python -m benchmarks.step --networks resnet20,mlp --rounds 7 --compile

Besides the time of a step: the peak of memory (each way in a process of its own), the bytes that wait for the backward pass,
and where the time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import _inside, _networks, _plots, _ways
from benchmarks._harness import (
    Skip,
    described,
    fastest,
    header,
    in_fresh_process,
    markdown,
    parser,
    race,
    ratio,
    say,
    start,
    time_of,
    write,
)

NETWORKS = ("resnet20", "resnet18", "mobilenet_v2", "mlp", "gpt", "lstm")
SHORT = ("resnet20", "mlp")
PROFILED = ("bf16 autocast", "ours ibm2020")
"""Beside the way that ratios are taken to."""


def measure(name: str, arguments: Any, ways: Sequence[str], keep: Callable[[dict[str, Any]], None]) -> None:
    """Everything about one network; `keep` gets it when the times are there, and again with the rest."""
    network = _networks.get(name, arguments.width)
    batch = arguments.batch or network.batch
    say(f"{network.title}, batch {batch}: steps")
    entrants = _ways.entrants(network, batch, ways)
    times = race(entrants, arguments.rounds, budget_s=arguments.budget)
    found: dict[str, Any] = {"title": network.title, "batch": batch, "base": _ways.base_of(network), "times": times}
    found |= {"profile": {}, "saved_bytes": {}, "peak_bytes": {}}
    keep(found)
    looked_into = [e.name for e in entrants if not (times[e.name]["skipped"] or e.kind == "compiled")]
    layers = _ways.four_bit_names(network)
    say(f"{network.title}: saved bytes and profiles")
    for way in looked_into:
        training = _ways.prepare(way, network, batch)
        training()
        saved = _inside.saved_bytes(training, layers)
        half = max(1, batch // 2)  # what is in proportion to the batch is activations, the rest weights
        fewer = _inside.saved_bytes(_ways.prepare(way, network, half), layers)["four_bit_layers"]
        if saved["four_bit_layers"] is not None and fewer is not None and half < batch:
            saved["activations"] = round((saved["four_bit_layers"] - fewer) * batch / (batch - half))
        found["saved_bytes"][way] = saved
        if way in (found["base"], *PROFILED):
            found["profile"][way] = _inside.profile(training)
    for way in looked_into:
        if arguments.no_memory or (arguments.short and way not in _ways.MAIN):
            continue
        say(f"{network.title}: peak memory, {way}")
        job = {"do": "peak_memory", "network": name, "way": way, "batch": batch, "width": arguments.width, "steps": 2}
        try:
            found["peak_bytes"][way] = in_fresh_process(job)["peak_bytes"]
        except Skip as reason:
            say(f"  skipped: {reason}")
    keep(found)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns what it writes."""
    options = parser(__doc__)
    options.add_argument("--networks", help="comma-separated (default: all; with --short: resnet20, mlp)")
    options.add_argument("--ways", help="names separated by semicolons (default: all)")
    options.add_argument("--batch", type=int)
    options.add_argument("--width", type=int, help="of resnet20, mlp, gpt, lstm")
    options.add_argument("--budget", type=float, default=30.0, help="seconds after which an entrant has 5 turns only")
    options.add_argument(
        "--no-memory", action="store_true", help="no peaks of memory (one process per way and network)"
    )
    arguments = options.parse_args(argv)
    start(arguments)
    names = arguments.networks.split(",") if arguments.networks else SHORT if arguments.short else NETWORKS
    ways = arguments.ways.split(";") if arguments.ways else _ways.names(arguments.compile)
    data = header("step", arguments, argv) | {"networks": {}}
    for name in names:

        def keep(found: dict[str, Any], name: str = name) -> None:
            data["networks"][name] = found
            write(arguments.out, data, tables(data), figures(data))

        measure(name, arguments, ways, keep)
    print("\n\n".join(tables(data).values()))
    say(f"\nwritten: step.json, step.md and plots in {arguments.out}")
    return data


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Markdown by name: times, memory, profile."""
    found = {"machine": described(data["machine"])}
    for key, make in (("times", _times), ("memory", _memory), ("profile", _profile)):
        parts = [f"**{n['title']}, batch {n['batch']}**\n\n{make(n)}" for n in data["networks"].values()]
        found[f"step-{key}"] = "\n\n".join(parts)
    return found


def _times(network: dict[str, Any]) -> str:
    times, base = network["times"], network["base"]
    rows = []
    for name, result in times.items():
        seconds = time_of(times, name)
        if seconds is None:
            rows.append([name, f"skipped: {result['skipped']}", "", "", "", ""])
            continue
        ratios = [ratio(times, name, other) for other in (base, "bf16 autocast")]
        ours = ratio(times, name, "ours ibm2020")
        rows.append(
            [
                name,
                f"{seconds.median * 1e3:.1f}",
                f"{seconds.low * 1e3:.1f} - {seconds.high * 1e3:.1f}",
                *(f"{r.median:.2f}" if r else "" for r in (*ratios, ours)),
            ]
        )
    return markdown(["way", "ms", "quartiles", f"of {base}", "of bf16 autocast", "of ours ibm2020"], rows)


def _memory(network: dict[str, Any]) -> str:
    peaks, saved, base = network["peak_bytes"], network["saved_bytes"], network["base"]
    mib = 2**20
    rows = []
    for name, found in saved.items():
        peak = f"{peaks[name] / mib:.0f}" if name in peaks else "not measured"
        activations, of = found.get("activations"), saved.get(base, {}).get("activations")
        cells = ["", "", ""]
        if activations is not None and of:
            weights = max(0, found["four_bit_layers"] - activations)
            cells = [f"{activations / mib:.1f}", f"{activations / of:.3f}", f"{weights / mib:.1f}"]
        rows.append([name, peak, f"{found['total'] / mib:.1f}", *cells])
    columns = ["way", "peak MiB", "saved MiB", "4-bit layers: activations MiB", f"of {base}", "weights MiB"]
    return markdown(columns, rows)


def _profile(network: dict[str, Any]) -> str:
    profiles = network["profile"]
    totals = {way: sum(seconds.values()) for way, seconds in profiles.items()}
    rows = []
    for category in _inside.CATEGORIES:
        values = [profiles[way].get(category, 0.0) for way in profiles]
        if any(v > 0.001 * totals[way] for v, way in zip(values, profiles, strict=True)):
            cells = [f"{v * 1e3:.1f} ({v / totals[w]:.0%})" for v, w in zip(values, profiles, strict=True)]
            rows.append([category, *cells])
    rows.append(["all", *(f"{total * 1e3:.1f}" for total in totals.values())])
    return markdown(["ms of a step", *profiles], rows)


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """Bars of the times, and of where they go."""
    bars = {}
    for network in data["networks"].values():
        times, base = network["times"], network["base"]
        found = {n: (ratio(times, n, base), time_of(times, n), r["kind"]) for n, r in times.items()}
        bars[f"{network['title']}, batch {network['batch']}"] = {n: v for n, v in found.items() if v[0] and v[1]}
    stacks = {network["title"]: network["profile"] for network in data["networks"].values()}
    return {
        "step": _plots.bars(bars, "Training step, relative to FP32 (channels_last for images)"),
        "step-profile": _plots.stacks(stacks, list(_inside.CATEGORIES), "Where the time of a step goes"),
    }


def fastest_peer(network: dict[str, Any]) -> str | None:
    """The fastest library that quantizes forward and backward."""
    return fastest(network["times"], ("peer",))


if __name__ == "__main__":
    main()
