"""Out of training: a trained model as the files that runtimes read.

    fourbit.export(model, "served", to="onnx")

`model` is converted and trained. Weights are written in the numbers that the layers multiply in evaluation mode, as packed
4-bit codes with scales; README.md in the folder says what they are. Layouts, in `TARGETS`:

    onnx                 INT4 weights and inputs, opset 21, for onnxruntime and others: the whole network
    safetensors          packed codes and scales in one documented file
    compressed-tensors   a folder of transformers, for vLLM and others: INT4, NVFP4 or MXFP4 weights
    gguf                 linear layers as Q4_0 or MXFP4
"""

from fourbit.exports import _onnx as _onnx
from fourbit.exports import _safetensors as _safetensors

from fourbit.exports import _compressed as _compressed  # isort: skip
from fourbit.exports import _gguf as _gguf  # isort: skip
from fourbit.exports._export import export as export
from fourbit.exports._safetensors import load_packed as load_packed
from fourbit.exports._safetensors import read_packed as read_packed
from fourbit.exports._target import TARGETS as TARGETS
from fourbit.exports._target import Target as Target
