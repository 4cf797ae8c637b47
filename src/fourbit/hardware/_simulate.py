"""Simulation of a unit's circuit against its exact arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fourbit.errors import UserError
from fourbit.hardware._unit import Unit

if TYPE_CHECKING:
    from fourbit.hardware._netlist import Netlist


def require_amaranth() -> None:
    """UserError where the package is missing."""
    try:
        import amaranth  # noqa: F401
    except ImportError as error:
        raise UserError("circuits are written in Amaranth: pip install 'fourbit[hardware]'.") from error


def circuit(unit: Unit) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """An Amaranth module, its inputs and its outputs."""
    require_amaranth()
    from amaranth.hdl import Module, Signal

    from fourbit.hardware.units import Stages, build

    m = Module()
    inputs = {name: Signal(width, name=name) for name, width in unit.inputs.items()}
    outputs = {name: Signal(width, name=name) for name, width in unit.outputs.items()}
    unknown = set(unit.cuts) - set(unit.stages)
    if unknown:
        raise UserError(f"unit {unit.name} has no stage {sorted(unknown)[0]}: choose of {', '.join(unit.stages)}.")
    for name, value in build(unit, m, Stages(m, unit.cuts), dict(inputs)).items():
        m.d.comb += outputs[name].eq(value)
    return m, inputs, outputs


@dataclass(frozen=True)
class Mismatch:
    """Where a circuit is not what its unit says."""

    inputs: dict[str, int]
    got: dict[str, int]
    wanted: dict[str, int]


def delays(unit: Unit) -> tuple[dict[str, int], int]:
    """Cycles from the first inputs to each input, and to the outputs."""

    def before(stage: str) -> int:
        names = unit.stages[: unit.stages.index(stage) + 1]
        return sum(cut in names for cut in unit.cuts)

    late = {name: before(unit.late[name]) if name in unit.late else 0 for name in unit.inputs}
    return late, len(unit.cuts)


def simulate(unit: Unit, vectors: list[dict[str, int]]) -> list[dict[str, int]]:
    """The outputs of the circuit for each of `vectors`, one after the other."""
    m, inputs, outputs = circuit(unit)
    from amaranth.sim import Simulator

    late, latency = delays(unit)
    found: list[dict[str, int]] = []

    async def combinational(ctx: Any) -> None:
        for vector in vectors:
            for name, signal in inputs.items():
                ctx.set(signal, vector[name])
            await ctx.delay(1e-6)
            found.append({name: ctx.get(signal) for name, signal in outputs.items()})

    async def pipelined(ctx: Any) -> None:
        for cycle in range(len(vectors) + latency):
            for name, signal in inputs.items():
                k = cycle - late[name]
                ctx.set(signal, vectors[k][name] if 0 <= k < len(vectors) else 0)
            if cycle >= latency:
                await ctx.delay(1e-7)
                found.append({name: ctx.get(signal) for name, signal in outputs.items()})
            await ctx.tick()

    simulator = Simulator(m)
    if latency:
        simulator.add_clock(1e-6)
    simulator.add_testbench(pipelined if latency else combinational)
    simulator.run()
    return found


def simulate_netlist(netlist: Netlist, unit: Unit, vectors: list[dict[str, int]]) -> list[dict[str, int]]:
    """The same of a netlist of the unit, all vectors at once."""
    _, latency = delays(unit)
    cycles = len(vectors) + latency
    values = netlist.run(streams(unit, vectors), cycles)
    rows: list[dict[str, int]] = [dict.fromkeys(unit.outputs, 0) for _ in vectors]
    for name in unit.outputs:
        for k, net in enumerate(netlist.ports[name]):
            bits = bin(values.get(net, 0) >> latency | 1 << len(vectors))[:2:-1]
            for row, bit in zip(rows, bits, strict=True):
                if bit == "1":
                    row[name] |= 1 << k
    return rows


def streams(unit: Unit, vectors: list[dict[str, int]]) -> dict[str, int]:
    """The bits of each input over the cycles, first cycle lowest; late inputs come as late as the unit wants them."""
    late, _ = delays(unit)
    found = {}
    for name, width in unit.inputs.items():
        columns = [f"{v[name]:0{width}b}" for v in reversed(vectors)]
        for k in range(width):
            found[f"{name}[{k}]"] = int("".join(c[width - 1 - k] for c in columns) or "0", 2) << late[name]
    return found


def mismatch(unit: Unit, vectors: list[dict[str, int]], found: list[dict[str, int]]) -> Mismatch | None:
    """The first vector whose outputs are not those of exact arithmetic."""
    for vector, got in zip(vectors, found, strict=True):
        wanted = unit.reference(vector)
        if got != wanted:
            return Mismatch(vector, got, wanted)
    return None
