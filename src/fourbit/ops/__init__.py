"""Quantized products and their gradients: the six slots, the bilinear maps, the layer's state, one autograd.Function."""

from fourbit.ops._contract import contract as contract
from fourbit.ops._contraction import Contraction as Contraction
from fourbit.ops._contraction import Convolution as Convolution
from fourbit.ops._contraction import LinearMap as LinearMap
from fourbit.ops._contraction import Matmul as Matmul
from fourbit.ops._handover import OperandHandover as OperandHandover
from fourbit.ops._handover import ResultHandover as ResultHandover
from fourbit.ops._norm import Activation as Activation
from fourbit.ops._norm import Kept as Kept
from fourbit.ops._norm import Norm as Norm
from fourbit.ops._norm import NormBackward as NormBackward
from fourbit.ops._norm import NormForward as NormForward
from fourbit.ops._norm import can_normalize as can_normalize
from fourbit.ops._norm import normalize as normalize
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
