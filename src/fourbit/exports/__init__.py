"""Out of training: a trained model as the files that runtimes read.

    fourbit.export(model, "served", to="onnx")

`model` is converted and trained. Weights are written in the numbers that the layers multiply in evaluation mode, as packed
4-bit codes with scales; README.md in the folder says what they are. Layouts, in `TARGETS`:

    onnx          INT4 weights and inputs, opset 21, for onnxruntime and others: the whole network
    safetensors   packed codes and scales in one documented file
"""

from fourbit.exports import _onnx as _onnx
from fourbit.exports import _safetensors as _safetensors
from fourbit.exports._export import export as export
from fourbit.exports._safetensors import read_packed as read_packed
from fourbit.exports._target import TARGETS as TARGETS
from fourbit.exports._target import Target as Target
