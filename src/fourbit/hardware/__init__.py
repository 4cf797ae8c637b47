"""Silicon: the arithmetic units of 4-bit training as circuits, what they compute, and what they cost.

    units       `catalog`: inner products in the formats of `fourbit.formats`, and what turns their sums into FP16
    simulation  `simulate` (Amaranth's simulator) and `Netlist.run` (all vectors at once) against `Unit.reference`, which is
                exact rational arithmetic
    synthesis   `Design`, with yosys and a standard-cell `Library` in Liberty format; area, delay and energy of a `Netlist`
    costs       `Results` of synthesis at a clock period, and `estimate`, which makes a training step's time and energy of them

Nothing here needs torch; circuits need the packages of the extra `hardware`.
"""

from fourbit.hardware import catalog as catalog
from fourbit.hardware._converter import Converter as Converter
from fourbit.hardware._cost import Part as Part
from fourbit.hardware._cost import StepCost as StepCost
from fourbit.hardware._cost import estimate as estimate
from fourbit.hardware._cost import separate_arrays as separate_arrays
from fourbit.hardware._float import FLOAT32 as FLOAT32
from fourbit.hardware._float import FLOATS as FLOATS
from fourbit.hardware._float import Float as Float
from fourbit.hardware._inner import InnerProduct as InnerProduct
from fourbit.hardware._liberty import Library as Library
from fourbit.hardware._machine import Machine as Machine
from fourbit.hardware._machine import cycles_of as cycles_of
from fourbit.hardware._netlist import Netlist as Netlist
from fourbit.hardware._paper import SPEEDS as SPEEDS
from fourbit.hardware._paper import figure_6c as figure_6c
from fourbit.hardware._product import Product as Product
from fourbit.hardware._product import in_full_precision as in_full_precision
from fourbit.hardware._product import unit_of as unit_of
from fourbit.hardware._quantizer import Hadamard as Hadamard
from fourbit.hardware._quantizer import Quantizer as Quantizer
from fourbit.hardware._quantizer import RandomSource as RandomSource
from fourbit.hardware._quantizer import Register as Register
from fourbit.hardware._results import BASELINE as BASELINE
from fourbit.hardware._results import LIBRARIES as LIBRARIES
from fourbit.hardware._results import Cost as Cost
from fourbit.hardware._results import Results as Results
from fourbit.hardware._results import stored as stored
from fourbit.hardware._results import summary_rows as summary_rows
from fourbit.hardware._results import tool_versions as tool_versions
from fourbit.hardware._simulate import Mismatch as Mismatch
from fourbit.hardware._simulate import mismatch as mismatch
from fourbit.hardware._simulate import simulate as simulate
from fourbit.hardware._simulate import simulate_netlist as simulate_netlist
from fourbit.hardware._synthesis import Design as Design
from fourbit.hardware._synthesis import synthesize as synthesize
from fourbit.hardware._unit import UNITS as UNITS
from fourbit.hardware._unit import Unit as Unit
