"""Silicon: the arithmetic units of 4-bit training as circuits, what they compute, and what they cost.

    units       `catalog`: inner products in the formats of `fourbit.formats`, and what turns their sums into FP16
    simulation  `simulate` (Amaranth's simulator) and `Netlist.run` (all vectors at once) against `Unit.reference`, which is
                exact rational arithmetic
    synthesis   `Design`, with yosys and a standard-cell `Library` in Liberty format; area, delay and energy of a `Netlist`

Nothing here needs torch; circuits need the packages of the extra `hardware`.
"""

from fourbit.hardware import catalog as catalog
from fourbit.hardware._converter import Converter as Converter
from fourbit.hardware._float import FLOAT32 as FLOAT32
from fourbit.hardware._float import FLOATS as FLOATS
from fourbit.hardware._float import Float as Float
from fourbit.hardware._inner import InnerProduct as InnerProduct
from fourbit.hardware._liberty import Library as Library
from fourbit.hardware._netlist import Netlist as Netlist
from fourbit.hardware._quantizer import Hadamard as Hadamard
from fourbit.hardware._quantizer import Quantizer as Quantizer
from fourbit.hardware._quantizer import RandomSource as RandomSource
from fourbit.hardware._quantizer import Register as Register
from fourbit.hardware._simulate import Mismatch as Mismatch
from fourbit.hardware._simulate import mismatch as mismatch
from fourbit.hardware._simulate import simulate as simulate
from fourbit.hardware._simulate import simulate_netlist as simulate_netlist
from fourbit.hardware._synthesis import Design as Design
from fourbit.hardware._synthesis import synthesize as synthesize
from fourbit.hardware._unit import UNITS as UNITS
from fourbit.hardware._unit import Unit as Unit
