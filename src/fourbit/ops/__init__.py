"""Quantized products and their gradients: the six slots, the bilinear maps, the layer's state, one autograd.Function."""

from fourbit.ops._accumulation import Accumulation as Accumulation
from fourbit.ops._accumulation import accumulate as accumulate
from fourbit.ops._contract import contract as contract
from fourbit.ops._contraction import Contraction as Contraction
from fourbit.ops._contraction import Convolution as Convolution
from fourbit.ops._contraction import LinearMap as LinearMap
from fourbit.ops._contraction import Matmul as Matmul
from fourbit.ops._matrices import Matrices as Matrices
from fourbit.ops._product import Finish as Finish
from fourbit.ops._product import Gemm as Gemm
from fourbit.ops._product import Layout as Layout
from fourbit.ops._product import Operand as Operand
from fourbit.ops._product import Products as Products
from fourbit.ops._product import Raw as Raw
from fourbit.ops._spec import REUSE as REUSE
from fourbit.ops._spec import SLOTS as SLOTS
from fourbit.ops._spec import LayerSpec as LayerSpec
from fourbit.ops._spec import Reuse as Reuse
from fourbit.ops._state import LayerState as LayerState
from fourbit.ops._state import Observer as Observer
