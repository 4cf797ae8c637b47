"""A netlist of gates: its area, its delay, what it computes, and the energy of its changes.

All vectors are simulated at once: the values of a net over N cycles are the N bits of one integer, a gate is one expression
of such integers, and a register delays them by one bit. So ten thousand cycles of a unit take a fraction of a second, but
only networks without feedback can be simulated so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from fourbit.errors import UserError
from fourbit.hardware._liberty import Arc, Cell, Library, Table
from fourbit.hardware._logic import compile_function

_GENERIC = {
    "$_BUF_": "A",
    "$_NOT_": "!A",
    "$_AND_": "A*B",
    "$_NAND_": "!(A*B)",
    "$_OR_": "A+B",
    "$_NOR_": "!(A+B)",
    "$_XOR_": "A^B",
    "$_XNOR_": "!(A^B)",
    "$_ANDNOT_": "A*!B",
    "$_ORNOT_": "A+!B",
    "$_MUX_": "(A*!S)+(B*S)",
    "$_NMUX_": "!((A*!S)+(B*S))",
    "$_AOI3_": "!((A*B)+C)",
    "$_OAI3_": "!((A+B)*C)",
    "$_AOI4_": "!((A*B)+(C*D))",
    "$_OAI4_": "!((A+B)*(C+D))",
}
"""Gates of yosys before mapping; they put out Y."""

_compiled = lru_cache(maxsize=4096)(lambda function, pins: compile_function(function, list(pins)))

Bit = int | str
LOAD_FF = 10.0
"""Load of each output, fF; and inputs have the slew of `SLEW_PS`."""
SLEW_PS = 50.0


@dataclass(frozen=True)
class Instance:
    """A cell in the netlist: its type and the net of each pin."""

    name: str
    type: str
    nets: Mapping[str, Bit]


class Netlist:
    """A module of gates.

    Args:
        ports: nets of each port, lowest bit first; `inputs`: which are inputs.
        instances: the gates.
        library: where they come from; None for yosys's own.
    """

    def __init__(
        self,
        ports: Mapping[str, list[Bit]],
        inputs: set[str],
        instances: list[Instance],
        library: Library | None = None,
    ):
        self.ports, self.inputs, self.instances, self.library = dict(ports), inputs, instances, library

    @staticmethod
    def read(path: Path, library: Library | None = None) -> Netlist:
        """A file of yosys's write_json."""
        modules = json.loads(path.read_text())["modules"]
        top = next((m for m in modules.values() if int(m["attributes"].get("top", "0"), 2)), None)
        if top is None:
            raise UserError(f"{path} has no top module: synthesise it anew.")
        ports = {name: port["bits"] for name, port in top["ports"].items()}
        inputs = {name for name, port in top["ports"].items() if port["direction"] == "input"}
        instances = [
            Instance(n, c["type"], {p: b[0] for p, b in c["connections"].items() if b}) for n, c in top["cells"].items()
        ]
        return Netlist(ports, inputs, instances, library)

    def _cell(self, instance: Instance) -> Cell:
        assert self.library is not None
        return self.library.cell(instance.type)

    def is_register(self, instance: Instance) -> bool:
        """Whether it is a flip-flop."""
        if instance.type.startswith("$"):
            return "DFF" in instance.type
        return self._cell(instance).next_state is not None

    def _driven(self, instance: Instance) -> list[tuple[str, Bit]]:
        """Output pins and their nets."""
        if instance.type.startswith("$"):
            pin = "Q" if self.is_register(instance) else "Y"
            return [(pin, instance.nets[pin])]
        pins = self._cell(instance).pins
        return [(name, net) for name, net in instance.nets.items() if pins[name].is_output]

    def _read_pins(self, instance: Instance) -> list[str]:
        if instance.type.startswith("$"):
            return [p for p in instance.nets if p not in ("Y", "Q", "C")]
        pins = self._cell(instance).pins
        return [name for name in instance.nets if not pins[name].is_output]

    @cached_property
    def ordered(self) -> list[Instance]:
        """Every gate behind those that it reads; registers too, as nothing feeds back.

        Raises:
            UserError: a feedback loop.
        """
        driver = {net: i for i in self.instances for _, net in self._driven(i)}
        done: set[str] = set()
        order: list[Instance] = []
        for root in self.instances:
            stack = [(root, False)]
            open_: set[str] = set()
            while stack:
                instance, left = stack.pop()
                if instance.name in done:
                    continue
                if left:
                    done.add(instance.name)
                    order.append(instance)
                    continue
                if instance.name in open_:
                    raise UserError(
                        f"the netlist feeds back at {instance.name}: units with feedback cannot be simulated."
                    )
                open_.add(instance.name)
                stack.append((instance, True))
                for pin in self._read_pins(instance):
                    source = driver.get(instance.nets[pin])
                    if source is not None and source.name not in done:
                        stack.append((source, False))
        return order

    @property
    def area(self) -> float:
        """In um^2."""
        return sum(self._cell(i).area for i in self.instances)

    @property
    def register_area(self) -> float:
        """Of it, flip-flops."""
        return sum(self._cell(i).area for i in self.instances if self.is_register(i))

    def run(self, inputs: Mapping[str, int], cycles: int) -> dict[Bit, int]:
        """The values of every net over the cycles.

        Args:
            inputs: by net name "port[k]": its bits over the cycles, first cycle lowest.
        """
        mask = (1 << cycles) - 1
        values: dict[Bit, int] = {"0": 0, "1": mask, "x": 0}
        for name in self.inputs:
            for k, net in enumerate(self.ports[name]):
                values[net] = inputs.get(f"{name}[{k}]", 0)
        for instance in self.ordered:
            pins = self._read_pins(instance)
            given = [values.get(instance.nets[p], 0) for p in pins]
            if self.is_register(instance):
                self._register(instance, pins, given, values, mask)
                continue
            for pin, net in self._driven(instance):
                function = _GENERIC.get(instance.type) or self._cell(instance).pins[pin].function
                if function is None:
                    raise UserError(f"{instance.type} has no function in the library: it cannot be simulated.")
                values[net] = _compiled(function, tuple(pins))(mask, *given)
        return values

    def _register(
        self, instance: Instance, pins: list[str], given: list[int], values: dict[Bit, int], mask: int
    ) -> None:
        if instance.type.startswith("$"):
            values[instance.nets["Q"]] = (given[pins.index("D")] << 1) & mask
            return
        cell = self._cell(instance)
        assert cell.next_state is not None
        state = (_compiled(cell.next_state, tuple(pins))(mask, *given) << 1) & mask
        for pin, net in self._driven(instance):
            function = cell.pins[pin].function or ""
            values[net] = state if function.strip("() ") == cell.state[0] else mask ^ state

    # Time

    def _loads(self) -> dict[Bit, float]:
        """Capacitance of each net, in units of the library."""
        assert self.library is not None
        loads: dict[Bit, float] = {}
        for instance in self.instances:
            pins = self._cell(instance).pins
            for name, net in instance.nets.items():
                if not pins[name].is_output:
                    loads[net] = loads.get(net, 0.0) + pins[name].capacitance
        extra = LOAD_FF / self.library.capacitance_unit
        for name, nets in self.ports.items():
            if name not in self.inputs:
                for net in nets:
                    loads[net] = loads.get(net, 0.0) + extra
        return loads

    @cached_property
    def delay(self) -> float:
        """The longest way, in ps: from inputs or clock to outputs or, with its setup time, a register; without wires."""
        return self.period(0.0, 0.0)

    def period(self, clock_to_output: float, setup: float) -> float:
        """The shortest clock period between registers, in ps: inputs come from flip-flops, `clock_to_output` behind the clock,
        and outputs go to flip-flops with a `setup` time."""
        library = self.library
        assert library is not None
        unit = library.time_unit
        arrival, longest = self._arrival(clock_to_output / unit), 0.0
        for name, nets in self.ports.items():
            if name not in self.inputs:
                longest = max([longest, *(max(t for t, _ in arrival[n]) + setup / unit for n in nets if n in arrival)])
        for instance in self.instances:
            if not self.is_register(instance):
                continue
            cell = self._cell(instance)
            for pin in self._read_pins(instance):
                net = instance.nets[pin]
                setups = [a for a in cell.pins[pin].arcs if a.kind.startswith("setup")]
                (rise, rise_slew), (fall, fall_slew) = arrival.get(net, (self._input(clock_to_output / unit),) * 2)
                for arc in setups:
                    clock = SLEW_PS / unit
                    longest = max(longest, rise + arc.rise(clock, rise_slew), fall + arc.fall(clock, fall_slew))
        return longest * unit

    def _input(self, time: float) -> tuple[float, float]:
        """Time and slew of an input that arrives at `time`, in units of the library."""
        assert self.library is not None
        return time, SLEW_PS / self.library.time_unit

    def _arrival(self, time: float) -> dict[Bit, tuple[tuple[float, float], tuple[float, float]]]:
        """Of rise and fall of each net, time and slew, where inputs arrive at `time`; in units of the library."""
        loads, clock, start = self._loads(), self._input(0.0), self._input(time)
        arrival: dict[Bit, tuple[tuple[float, float], tuple[float, float]]] = {}
        for instance in self.instances:
            if not self.is_register(instance):
                continue
            cell = self._cell(instance)
            for pin, net in self._driven(instance):
                arcs = [a for a in cell.pins[pin].arcs if a.kind.endswith("_edge") and a.rise_slew and a.fall_slew]
                if not arcs:
                    raise UserError(
                        f"the flip-flop {instance.type} has no times from its clock: give a complete library."
                    )
                arrival[net] = self._through(arcs[:1], {arcs[0].related: (clock, clock)}, loads.get(net, 0.0))
        for instance in self.ordered:
            if self.is_register(instance):
                continue
            cell = self._cell(instance)
            incoming = {p: arrival.get(instance.nets[p], (start, start)) for p in self._read_pins(instance)}
            for pin, net in self._driven(instance):
                arrival[net] = self._through(cell.pins[pin].arcs, incoming, loads.get(net, 0.0))
        return arrival

    @cached_property
    def _slews(self) -> dict[Bit, float]:
        """Mean of rise and fall, in units of the library."""
        return {net: (rise[1] + fall[1]) / 2 for net, (rise, fall) in self._arrival(0.0).items()}

    @property
    def flop(self) -> tuple[float, float]:
        """Of a netlist that is a row of registers: time from clock to output, and setup time, in ps."""
        assert self.library is not None
        out = max(time for edges in self._arrival(0.0).values() for time, _ in edges) * self.library.time_unit
        inputs = {name: nets for name, nets in self.ports.items() if name in self.inputs}
        return out, Netlist(inputs, self.inputs, self.instances, self.library).delay

    @staticmethod
    def _through(
        arcs: tuple[Arc, ...] | list[Arc], incoming: Mapping[str, tuple], load: float
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Latest rise and fall behind a gate, and the slowest slews."""
        found: list[tuple[float, float]] = []
        for edge in (0, 1):
            time = slew = 0.0
            for arc in arcs:
                if arc.related not in incoming:
                    continue
                table, slopes = ((arc.rise, arc.rise_slew), (arc.fall, arc.fall_slew))[edge]
                sources = {"positive_unate": (edge,), "negative_unate": (1 - edge,)}.get(arc.sense, (0, 1))
                for source in sources:
                    when, steep = incoming[arc.related][source]
                    time = max(time, when + table(steep, load))
                    if isinstance(slopes, Table):
                        slew = max(slew, slopes(steep, load))
            found.append((time, slew))
        return found[0], found[1]

    # Energy

    def energy(self, values: Mapping[Bit, int], cycles: int) -> float:
        """Mean energy per cycle of the changes in `values` (of `run`), in fJ.

        Half C V^2 of each net's capacitance per change, and the library's internal energy of the cells at the slews and loads
        of this netlist; clock pins change twice a cycle. Without glitches, wires and leakage.
        """
        library = self.library
        assert library is not None
        loads, slews = self._loads(), self._slews
        mask = (1 << cycles) - 1
        total = 0.0
        half = 0.5 * library.voltage**2
        default = SLEW_PS / library.time_unit

        def changes(net: Bit) -> tuple[int, int]:
            bits = values.get(net, 0)
            before = (bits << 1) & mask | bits & 1
            return (bits & ~before).bit_count(), (before & ~bits).bit_count()

        driven = {net for i in self.instances for _, net in self._driven(i)}
        for net, load in loads.items():
            up, down = changes(net)
            if net in driven or isinstance(net, int):
                total += half * load * (up + down)
        for instance in self.instances:
            cell = self._cell(instance)
            for name, net in instance.nets.items():
                pin = cell.pins[name]
                if not pin.powers:
                    continue
                up, down = (cycles, cycles) if name == cell.clock else changes(net)
                load, n = loads.get(net, 0.0), len(pin.powers)
                for power in pin.powers:
                    source = instance.nets.get(power.related or "", net)
                    slew = slews.get(source, default)
                    total += (up * power.rise(slew, load) + down * power.fall(slew, load)) / n
        return total * library.energy_unit / cycles
