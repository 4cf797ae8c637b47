"""Kernels for x86 and other CPUs: one pass over memory each, from a small C++ library without dependencies."""

from fourbit import backends
from fourbit.kernels.cpu._library import library as library
from fourbit.kernels.cpu._library import status as status

backends.register_backend(status, "cpu")
if library() is not None:
    from fourbit.kernels.cpu import _accumulate as _accumulate
    from fourbit.kernels.cpu import _lstm as _lstm
    from fourbit.kernels.cpu import _norm as _norm
    from fourbit.kernels.cpu import _products as _products
    from fourbit.kernels.cpu import _quantize as _quantize
    from fourbit.kernels.cpu import _tiles as _tiles
