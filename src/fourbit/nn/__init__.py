"""Drop-in layers with quantized operands, under torch's own names, and their functional twins."""

from fourbit.nn import functional as functional
from fourbit.nn._base import SWAPS as SWAPS
from fourbit.nn._base import Quantized as Quantized
from fourbit.nn._base import float_state_dict as float_state_dict
from fourbit.nn._base import nonfinite_layers as nonfinite_layers
from fourbit.nn._base import quantized_layers as quantized_layers
from fourbit.nn._base import swaps as swaps
from fourbit.nn._fused import conv_norm_act as conv_norm_act
from fourbit.nn._fused import run_layer as run_layer
from fourbit.nn._layers import Conv1d as Conv1d
from fourbit.nn._layers import Conv2d as Conv2d
from fourbit.nn._layers import Conv3d as Conv3d
from fourbit.nn._layers import ConvTranspose1d as ConvTranspose1d
from fourbit.nn._layers import ConvTranspose2d as ConvTranspose2d
from fourbit.nn._layers import ConvTranspose3d as ConvTranspose3d
from fourbit.nn._layers import Linear as Linear
from fourbit.nn._layers import MatMul as MatMul
from fourbit.nn._observe import Observation as Observation
from fourbit.nn._observe import OperandStats as OperandStats
from fourbit.nn._observe import observe as observe
from fourbit.ops import LayerState as LayerState
