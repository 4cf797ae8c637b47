"""Liberty libraries, and what a netlist of their cells computes, takes and costs."""

from __future__ import annotations

import gzip
import importlib.util
import os
import random
from pathlib import Path

import pytest

from fourbit.errors import UserError
from fourbit.hardware import UNITS, Design, Library, Netlist, mismatch, simulate_netlist, synthesize
from fourbit.hardware._logic import compile_function
from fourbit.hardware._netlist import Instance
from fourbit.hardware._simulate import streams
from fourbit.hardware._synthesis import Point, front

needs_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("amaranth", "pyosys")), reason="amaranth, pyosys missing"
)
FOLDERS = [os.environ.get("FOURBIT_LIBERTY", ""), str(Path(__file__).parents[3] / "shared/data/liberty")]
LIBERTY = [p for f in FOLDERS if f for p in sorted(Path(f).glob("*.lib.gz"))]


def gate(name: str, inputs: str, function: str, delay: float, area: float = 2.0) -> str:
    """A cell whose delay is `delay` ns plus 10 ns per pF, whose input pins have 0.01 pF, and that needs 0.001 pJ a change."""
    pins = "".join(f"pin({p}) {{ direction : input; capacitance : 0.01; }}\n" for p in inputs)
    table = (
        f'("t") {{ index_1("0.0, 1.0"); index_2("0.0, 0.1"); values("{delay}, {delay + 1}", "{delay}, {delay + 1}"); }}'
    )
    flat = '("t") { index_1("0.0, 1.0"); index_2("0.0, 0.1"); values("0.05, 0.05", "0.05, 0.05"); }'
    energy = '("e") { index_1("0.0, 1.0"); index_2("0.0, 0.1"); values("0.001, 0.001", "0.001, 0.001"); }'
    arcs = "".join(
        f"timing() {{ related_pin : {p}; timing_sense : negative_unate; cell_rise {table} cell_fall {table} "
        f"rise_transition {flat} fall_transition {flat} }}\n"
        for p in inputs
    )
    power = f"internal_power() {{ related_pin : {inputs[0]}; rise_power {energy} fall_power {energy} }}"
    output = f'pin(Y) {{ direction : output; function : "{function}"; {arcs} {power} }}'
    return f"cell({name}) {{ area : {area}; {pins} {output} }}\n"


FLOP = """cell(DFF) { area : 6.0; ff(IQ, IQN) { clocked_on : "CLK"; next_state : "D"; }
pin(CLK) { direction : input; capacitance : 0.01; } pin(D) { direction : input; capacitance : 0.01; }
pin(Q) { direction : output; function : "IQ"; } }
"""
_EDGE = '("t") { index_1("0.0, 1.0"); index_2("0.0, 0.1"); values("0.3, 1.3", "0.3, 1.3"); }'
_SETUP = '("s") { index_1("0.0, 1.0"); index_2("0.0, 1.0"); values("0.15, 0.15", "0.15, 0.15"); }'
TIMED_FLOP = FLOP.replace(
    "pin(D) { direction : input; capacitance : 0.01; }",
    "pin(D) { direction : input; capacitance : 0.01; timing() { related_pin : CLK; timing_type : setup_rising; "
    f"rise_constraint {_SETUP} fall_constraint {_SETUP} }} }}",
).replace(
    'function : "IQ"; }',
    'function : "IQ"; timing() { related_pin : CLK; timing_type : rising_edge; timing_sense : non_unate; '
    f"cell_rise {_EDGE} cell_fall {_EDGE} rise_transition {_SETUP} fall_transition {_SETUP} }} }}",
)
"""0.3 ns plus 10 ns per pF behind the clock, and 0.15 ns before it."""
HEADER = """library(tiny) { /* made for tests */ time_unit : "1ns"; capacitive_load_unit(1, pf); nom_voltage : 2.0;
lu_table_template("t") { variable_1 : input_net_transition; variable_2 : total_output_net_capacitance;
index_1("0.0, 1.0"); index_2("0.0, 0.1"); }
power_lut_template("e") { variable_1 : input_transition_time; variable_2 : total_output_net_capacitance; }
"""
INVERTER, NAND = gate("INV", "A", "!A", 0.1, 1.0), gate("NAND2", "AB", "!(A*B)", 0.2)


@pytest.fixture
def library(tmp_path):
    """An inverter, a NAND and a flip-flop."""

    def make(*cells: str) -> Library:
        path = tmp_path / "tiny.lib"
        path.write_text(HEADER + "\n".join(cells) + "}\n")
        return Library(path)

    return make


def test_a_chain_of_two_gates_by_hand(library):
    """y = a and b: NAND, then an inverter."""
    tiny = library(INVERTER, NAND, FLOP)
    tiny.check()
    assert (tiny.name, tiny.names, tiny.gate_equivalent) == ("tiny", ["INV", "NAND2", "DFF"], 2.0)
    gates = [Instance("i", "INV", {"A": 5, "Y": 6}), Instance("n", "NAND2", {"A": 2, "B": 3, "Y": 5})]
    n = Netlist({"a": [2], "b": [3], "y": [6]}, {"a", "b"}, gates, tiny)
    assert n.area == 3.0 and n.register_area == 0
    values = n.run({"a[0]": 0b0110, "b[0]": 0b0101}, 4)
    assert values[5] == 0b1011 and values[6] == 0b0100
    # NAND: 0.2 ns + 10 ns/pF * 0.01 pF; inverter: 0.1 ns + 10 * 0.01 pF of the output's load (10 fF)
    assert n.delay == pytest.approx(1000 * (0.2 + 0.1 + 0.1 + 0.1))
    # changes: a 2, b 3, nets 5 and 6 two each. Half C V^2 = 0.5 * 0.01 pF * 4 V^2 = 20 fJ; and 1 fJ in a cell per change
    assert n.energy(values, 4) == pytest.approx(((2 + 3 + 2 + 2) * 20.0 + (2 + 2) * 1.0) / 4)


def test_registers_delay_by_a_cycle_and_loops_are_refused(library):
    tiny = library(INVERTER, NAND, FLOP)
    flop = Instance("f", "DFF", {"CLK": 9, "D": 2, "Q": 3})
    n = Netlist({"clk": [9], "d": [2], "q": [3]}, {"clk", "d"}, [flop], tiny)
    assert n.run({"d[0]": 0b1011}, 4)[3] == 0b0110 and n.register_area == 6.0
    loop = [Instance("p", "INV", {"A": 2, "Y": 3}), Instance("q", "INV", {"A": 3, "Y": 2})]
    with pytest.raises(UserError, match="feeds back"):
        Netlist({"y": [3]}, set(), loop, tiny).run({}, 1)


def test_the_shortest_period_between_registers_by_hand(library):
    tiny = library(INVERTER, NAND, TIMED_FLOP)
    flop = Instance("f", "DFF", {"CLK": 9, "D": 2, "Q": 3})
    n = Netlist({"clk": [9], "d": [2], "q": [3]}, {"clk", "d"}, [flop], tiny)
    out, setup = n.flop
    assert (out, setup) == pytest.approx((400.0, 150.0))  # the output's load is 0.01 pF
    assert n.delay == pytest.approx(400.0)  # of the ways to the register and from it
    assert n.period(out, setup) == pytest.approx(550.0)
    inverter = Instance("i", "INV", {"A": 5, "Y": 2})  # 0.2 ns with the register as its load
    n = Netlist({"clk": [9], "d": [5], "q": [3]}, {"clk", "d"}, [inverter, flop], tiny)
    assert n.delay == pytest.approx(400.0) and n.period(out, setup) == pytest.approx(400 + 200 + 150)


@pytest.mark.parametrize(
    ("function", "table"),
    [("!A*B", 0b0100), ("A' B", 0b0100), ("(!A)|(!B)", 0b1110), ("A^B", 0b0110), ("A+!(A B)", 0b1111), ("1", 0b1111)],
)
def test_functions_are_read_as_liberty_means_them(function, table):
    assert compile_function(function, ["A", "B"])(0b1111, 0b0011, 0b0101) == table


@pytest.mark.parametrize(
    ("cells", "missing"),
    [((NAND, FLOP), "an inverter"), ((INVERTER, NAND), "a D flip-flop"), ((INVERTER, FLOP), "a NAND of two inputs")],
)
def test_a_library_that_lacks_cells_is_named(library, cells, missing):
    with pytest.raises(UserError, match=rf"tiny.lib lacks {missing}: give a complete one"):
        library(*cells).check()


def test_damaged_files_are_named(tmp_path):
    whole = HEADER + INVERTER + NAND + FLOP + "}\n"
    cases = {
        "cut.lib": whole[: len(whole) // 2].encode(),
        "text.lib": b"hello",
        "bad.lib.gz": gzip.compress(b"x" * 999)[:20],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}"):
            Library(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        Library(tmp_path / "none.lib")
    with pytest.raises(UserError, match="no cell XOR9"):
        (tmp_path / "whole.lib").write_text(whole)
        Library(tmp_path / "whole.lib").cell("XOR9")


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("area : 2.0", "area : abc", "is damaged in the cell NAND2"),
        ('values("0.2,', 'values("x,', "is damaged in the cell NAND2"),
        ("(1, pf)", "(1, nf)", "has the unit 1 nf"),
        ("nom_voltage : 2.0", "nom_voltage : two", "nom_voltage of two, which is no number"),
    ],
)
def test_what_cannot_be_read_of_a_library_is_named(tmp_path, right, wrong, words):
    whole = HEADER + INVERTER + NAND + FLOP + "}\n"
    assert right in whole
    (tmp_path / "wrong.lib").write_text(whole.replace(right, wrong))
    with pytest.raises(UserError, match=words):
        Library(tmp_path / "wrong.lib").check()


def test_of_points_those_remain_that_no_other_beats():
    def point(area: float, delay: float) -> Point:
        return Point("u", (), False, "s", None, area, 0.0, delay, delay)

    points = [point(3, 1), point(1, 5), point(2, 5), point(2, 4), point(4, 1)]
    assert front(points) == [point(1, 5), point(2, 4), point(3, 1)]


@needs_tools
def test_bad_input_to_synthesis_is_named(library, tmp_path):
    tiny = library(INVERTER, NAND, FLOP)
    with pytest.raises(UserError, match="unknown unit"):
        synthesize(["int4_fp5"], tiny.path)
    with pytest.raises(UserError, match="the flip-flop DFF has no times from its clock"):
        synthesize(["converter"], tiny.path)
    timed = library(INVERTER, NAND, TIMED_FLOP)
    with pytest.raises(UserError, match=r"yosys broke off: converter: .*ABC"):  # which survives no library so small
        synthesize(["converter"], timed.path)


@needs_tools
@pytest.mark.skipif(not LIBERTY, reason="no Liberty file in $FOURBIT_LIBERTY")
@pytest.mark.parametrize("path", LIBERTY, ids=lambda p: p.name[:8])
@pytest.mark.slow
def test_mapped_to_a_real_library_key_units_compute_the_same(path, tmp_path):
    real = Library(path)
    real.check()
    for name in ("fma_fp16", "int4_fp4", "int4_fp4_fixed", "converter"):
        folder = tmp_path / name
        folder.mkdir()
        unit, design = UNITS[name], Design(UNITS[name], folder)
        vectors = unit.vectors(random.Random(4), 2000)
        small, fast = design.map(real), design.map(real, "rebalance", 1000.0)
        for netlist in (small, fast):
            assert mismatch(unit, vectors, simulate_netlist(netlist, unit, vectors)) is None
        assert small.energy(small.run(streams(unit, [vectors[0]] * 50), 50), 50) == 0
        assert small.energy(small.run(streams(unit, vectors), len(vectors)), len(vectors)) > 100
        assert small.area < fast.area and fast.delay < small.delay


@needs_tools
@pytest.mark.skipif(not LIBERTY, reason="no Liberty file in $FOURBIT_LIBERTY")
def test_synthesis_in_processes_keeps_the_front():
    points = synthesize(["converter"], LIBERTY[0], targets=(2000.0,))
    assert {p.cuts for p in points} == {(), ("count",), ("count", "normalise")}
    for cuts in {p.cuts for p in points}:
        own = [p for p in points if p.cuts == cuts]
        assert own == front(own) and all((p.register_area > 0) == bool(cuts) for p in own)
