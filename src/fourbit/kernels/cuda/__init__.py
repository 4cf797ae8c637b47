"""Kernels for NVIDIA GPUs: quantizers in Triton, products on the tensor cores through torch.

Importing compiles nothing and needs no Triton; without CUDA in torch it imports nothing more. A kernel is compiled when it
first runs (a second or less each; Triton keeps it on disk).
"""

import torch

from fourbit import backends
from fourbit.kernels.cuda._device import status as status

backends.register_backend(status, "cuda")
if torch.version.cuda is not None:
    from fourbit.kernels.cuda import _products as _products
    from fourbit.kernels.cuda import _quantize as _quantize
    from fourbit.kernels.cuda import _tiles as _tiles
