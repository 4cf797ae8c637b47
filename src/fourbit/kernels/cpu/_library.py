"""Loading the C++ library, and the structures that it takes.

The field order and types below are those of csrc/common.h. The library brings no threads of its own: it is handed the
OpenMP runtime that torch has loaded, found among the dependencies of torch's own library.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fourbit.backends import Status
from fourbit.errors import UserError, unknown
from fourbit.kernels.cpu._build import LIBRARY

ABI = 13
"""Must equal fourbit_abi() of the library: a build from older sources is not used."""

_RUNTIME = ("GOMP_parallel", "omp_get_thread_num", "omp_get_max_threads", "omp_get_num_threads", "omp_in_parallel")


def _structure(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


LogGrid = _structure("LogGrid", start=c_int32, smallest=c_int32, largest=c_int32, octaves=c_int32)
FloatGrid = _structure(
    "FloatGrid", mantissa_bits=c_int32, lowest=c_int32, smallest=c_float, min=c_float, max=c_float, overflow=c_float
)
_tensor: dict[str, Any] = {"x": c_void_p, "dtype": c_int32, "n": c_int64}
Clip = _structure(
    "Clip",
    **_tensor,
    inv_scale=c_float,
    low=c_float,
    high=c_float,
    mask_rule=c_int32,
    bound=c_float,
    codes=c_void_p,
    packed=c_void_p,
    mask=c_void_p,
)
LogRound = _structure(
    "LogRound",
    **_tensor,
    inv_scale=c_float,
    num=c_int32,
    grid=LogGrid * 2,
    out=c_void_p * 2,
    out_dtype=c_int32,
    key=c_uint64 * 2,
    rule=c_int32,
)
FloatRound = _structure("FloatRound", **_tensor, inv_scale=c_float, grid=FloatGrid, out=c_void_p, out_dtype=c_int32)
TableRound = _structure(
    "TableRound",
    **_tensor,
    inv_scale=c_float,
    boundaries=c_void_p,
    levels=c_void_p,
    num_levels=c_int32,
    overflow=c_float,
    out=c_void_p,
    out_dtype=c_int32,
    key=c_uint64,
    rule=c_int32,
    zero=c_int32,
    smallest=c_float,
)
Unpack = _structure("Unpack", packed=c_void_p, n=c_int64, is_signed=c_int32, out=c_void_p, out_dtype=c_int32)
Tiles = _structure(
    "Tiles",
    x=c_void_p,
    dtype=c_int32,
    groups=c_int64,
    rows=c_int64,
    spots=c_int64,
    sums=c_int64,
    x_sums=c_int64,
    x_steps=c_int64 * 4,
    turned=c_int32,
    tile_rows=c_int32,
    tile_sums=c_int32,
    rotation=c_int32,
    signs=c_void_p,
    factor=c_float,
)
RoundTiles = _structure(
    "RoundTiles",
    tiles=Tiles,
    scale_rule=c_int32,
    num_targets=c_int32,
    target=c_float * 2,
    factor=c_float * 2,
    clip_rms=c_double,
    reach=c_float,
    prescale=c_float,
    scale_grid=FloatGrid,
    code_of=c_void_p,
    grid=FloatGrid,
    per_unit=c_float,
    positions=c_void_p,
    zero=c_int32,
    rule=c_int32,
    key=c_uint64,
    out=c_void_p,
    out_dtype=c_int32,
    out_steps=c_int64 * 4,
    packed=c_void_p,
    codes=c_void_p,
    mask=c_void_p,
    scale_codes=c_void_p,
    each=c_void_p,
    encode=c_float,
    decode=c_float,
    largest=c_float,
)
UnpackTiles = _structure(
    "UnpackTiles",
    tiles=Tiles,
    packed=c_void_p,
    is_signed=c_int32,
    positions=c_void_p,
    scale_codes=c_void_p,
    scale_of=c_void_p,
    out=c_void_p,
    out_dtype=c_int32,
    exact=c_int32,
    steps=c_int64 * 4,
)
Epilogue = _structure(
    "Epilogue",
    **_tensor,
    high=c_void_p,
    scale=c_float,
    rounds=c_int32,
    keep_infinite=c_int32,
    grid=FloatGrid,
    post=c_float,
    mask=c_void_p,
    packed=c_void_p,
    is_signed=c_int32,
    out=c_void_p,
    out_dtype=c_int32,
)
Split = _structure("Split", x=c_void_p, n=c_int64, unit=c_float, high=c_void_p, low=c_void_p)
Accumulate = _structure(
    "Accumulate",
    rows=c_void_p,
    columns=c_void_p,
    out=c_void_p,
    groups=c_int64,
    num_rows=c_int64,
    panels=c_int64,
    depth=c_int64,
    chunk=c_int64,
    width=c_int32,
    grid=FloatGrid,
    stochastic=c_int32,
    key=c_uint64,
    group_step=c_int64,
    row_step=c_int64,
    lane_step=c_int64,
)
Integers = _structure(
    "Integers", dtype=c_int32, unit=c_float, a_min=c_int32, a_max=c_int32, b_min=c_int32, b_max=c_int32
)
Moments = _structure("Moments", sum_square=c_double, sum_abs=c_double, amax=c_float)
MatMul = _structure(
    "MatMul",
    a=c_void_p,
    turned=c_int32,
    b=c_void_p,
    out=c_void_p,
    rows=c_int64,
    columns=c_int64,
    depth=c_int64,
    scale=c_float,
    rounds=c_int32,
    grid=FloatGrid,
    post=c_float,
    mask=c_void_p,
    packed=c_void_p,
    is_signed=c_int32,
    panels=c_void_p,
    integers=c_int32,
    is_unsigned=c_int32,
    of=Integers,
    clipped=c_double,
)

_geometry = dict.fromkeys(
    (
        *("num", "height", "width", "in_channels", "out_height", "out_width", "out_channels"),
        *("kernel_height", "kernel_width", "pad_height", "pad_width", "stride_height", "stride_width"),
    ),
    c_int64,
)
ConvFprop = _structure(
    "ConvFprop",
    x=c_void_p,
    w=c_void_p,
    out=c_void_p,
    halves=c_int32,
    scale=c_float,
    grid=FloatGrid,
    **_geometry,
    of=Integers,
)
ConvWgrad = _structure("ConvWgrad", x=c_void_p, g=c_void_p, dw=c_void_p, **_geometry, of=Integers)
ConvDgrad = _structure("ConvDgrad", g=c_void_p, w=c_void_p, out=c_void_p, out_dtype=c_int32, **_geometry, of=Integers)
NormStatistics = _structure(
    "NormStatistics",
    y=c_void_p,
    rows=c_int64,
    channels=c_int32,
    scale=c_float,
    rounds=c_int32,
    coded=c_int32,
    grid=FloatGrid,
    kept=c_void_p,
    halves=c_int32,
    gamma=c_void_p,
    beta=c_void_p,
    eps=c_float,
    running_mean=c_void_p,
    running_var=c_void_p,
    momentum=c_float,
    mean=c_void_p,
    inv_std=c_void_p,
    slope=c_void_p,
    offset=c_void_p,
)
NormApply = _structure(
    "NormApply",
    kept=c_void_p,
    halves=c_int32,
    grid=FloatGrid,
    rows=c_int64,
    channels=c_int32,
    slope=c_void_p,
    offset=c_void_p,
    residual=c_void_p,
    act=c_int32,
    cap=c_float,
    out=c_void_p,
    passes=c_void_p,
    clip=Clip,
    clips=c_int32,
)
NormBackward = _structure(
    "NormBackward",
    token=c_void_p,
    token_dtype=c_int32,
    token_scale=c_float,
    packed=c_void_p,
    is_signed=c_int32,
    mask=c_void_p,
    out_grad=c_void_p,
    passes=c_void_p,
    act=c_int32,
    cap_clips=c_int32,
    kept=c_void_p,
    halves=c_int32,
    grid=FloatGrid,
    rows=c_int64,
    channels=c_int32,
    gamma=c_void_p,
    mean=c_void_p,
    inv_std=c_void_p,
    g=c_void_p,
    dgamma=c_void_p,
    dbeta=c_void_p,
    inv_scale=c_float,
    num=c_int32,
    log_grid=LogGrid * 2,
    out=c_void_p * 2,
    clipped=c_double,
)
LstmForward = _structure(
    "LstmForward",
    gates_x=c_void_p,
    gates_h=c_void_p,
    c=c_void_p,
    kept=c_void_p,
    h=c_void_p,
    new_c=c_void_p,
    rows=c_int64,
    size=c_int64,
)
LstmBackward = _structure(
    "LstmBackward",
    dh=c_void_p,
    dc=c_void_p,
    gates=c_void_p,
    c=c_void_p,
    new_c=c_void_p,
    d_gates=c_void_p,
    dc_before=c_void_p,
    rows=c_int64,
    size=c_int64,
)

_RESULTS = {
    "clip": c_float,
    "log_round": c_float,
    "float_round": c_float,
    "table_round": c_float,
    "unpack": None,
    "epilogue": c_double,
    "split": None,
    "moments": None,
    "multiply": c_int32,
    "panel_count": c_int64,
    "pack_panels": c_int32,
    "conv_fprop": c_int32,
    "conv_wgrad": c_int32,
    "conv_dgrad": c_int32,
    "norm_statistics": None,
    "norm_apply": c_float,
    "norm_backward": c_float,
    "accumulate": None,
    "lstm_forward": None,
    "lstm_backward": None,
    "round_tiles": c_float,
    "unpack_tiles": None,
}

_ARGUMENTS = {"pack_panels": [c_void_p, c_void_p]}
"""Of the functions that take something else than one structure."""

_ALLOCATING = (
    *("multiply", "pack_panels", "conv_fprop", "conv_wgrad", "conv_dgrad"),
    *("norm_statistics", "norm_apply", "norm_backward", "round_tiles"),
)
"""Those that allocate memory: without it, they raise MemoryError."""

ISAS = ("portable", "avx2", "avx_vnni", "avx512", "dot_product")
"""Instruction sets, from the plainest to the widest; avx_vnni is AVX2 with dot products of integers, and dot_product is AVX-512
with VNNI and BF16."""

CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.uint8: 3,
    torch.int32: 4,
}
"""Dtypes as the library numbers them."""


class Library:
    """The loaded library; one attribute per kernel, each called with one structure by reference."""

    def __init__(self, path: Path):
        self._dll = ctypes.CDLL(str(path))
        if self._dll.fourbit_abi() != ABI:
            raise OSError("it was built from other sources")
        self._dll.fourbit_isa.restype = c_char_p
        self._dll.fourbit_set_threads.restype = None
        self._products = self._dll.fourbit_products
        self._out_of_memory = self._dll.fourbit_out_of_memory
        self.threads = self._share_threads()
        for name, result in _RESULTS.items():
            function = getattr(self._dll, f"fourbit_{name}")
            function.restype = result
            if name in _ARGUMENTS:
                function.argtypes = _ARGUMENTS[name]
            if name in _ALLOCATING:
                function.errcheck = self._check_memory
            setattr(self, name, function)

    clip: Any
    log_round: Any
    float_round: Any
    table_round: Any
    unpack: Any
    epilogue: Any
    split: Any
    moments: Any
    multiply: Any
    panel_count: Any
    pack_panels: Any
    conv_fprop: Any
    conv_wgrad: Any
    conv_dgrad: Any
    norm_statistics: Any
    norm_apply: Any
    norm_backward: Any
    accumulate: Any
    lstm_forward: Any
    lstm_backward: Any
    round_tiles: Any
    unpack_tiles: Any

    def _check_memory(self, result: Any, *_: Any) -> Any:
        if self._out_of_memory():
            raise MemoryError("a kernel of fourbit got no memory for its work")
        return result

    def _share_threads(self) -> bool:
        """Hand over torch's OpenMP runtime; without one, everything runs on the calling thread."""
        folder = Path(torch.__file__).parent / "lib"
        for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
            if (folder / name).exists():
                runtime = ctypes.CDLL(str(folder / name))
                try:
                    entries = [ctypes.cast(getattr(runtime, symbol), c_void_p) for symbol in _RUNTIME]
                except AttributeError:
                    return False
                self._dll.fourbit_set_threads(*entries)
                return True
        return False

    @property
    def has_products(self) -> bool:
        """Whether the products and convolutions run with the instruction set in use: not with portable, and not with avx512."""
        return self._products() > 0

    @property
    def has_dot_product(self) -> bool:
        """Whether they multiply bfloat16 by integers. Otherwise, they do what is made of integers in units of a number."""
        return self._products() == 2

    @property
    def isa(self) -> str:
        """Instruction set in use, one of ISAS; at first the fastest that the processor has."""
        return self._dll.fourbit_isa().decode()

    def use_isa(self, name: str) -> bool:
        """Use the kernels of another instruction set; False, and nothing changes, where there are none. Not while
        kernels run."""
        return bool(self._dll.fourbit_use_isa(name.encode()))


SWITCHED_OFF = "switched off by FOURBIT_CPU_KERNELS=0"
ISA_VARIABLE = "FOURBIT_CPU_ISA"
"""Environment variable: the instruction set that the kernels keep to in this process."""


@lru_cache(maxsize=1)
def _load() -> tuple[Library | None, str]:
    asked = os.environ.get(ISA_VARIABLE)
    if asked and asked not in ISAS:
        raise unknown(f"value of {ISA_VARIABLE}", asked, ISAS)
    switch = os.environ.get("FOURBIT_CPU_KERNELS", "1")
    if switch == "0":
        return None, SWITCHED_OFF
    if switch != "1":
        warnings.warn(
            f"FOURBIT_CPU_KERNELS is {switch!r}, but can be 0 (off) or 1 (on): the kernels are on", stacklevel=3
        )
    path = Path(os.environ.get("FOURBIT_CPU_LIBRARY") or LIBRARY)
    if not path.exists():
        return None, "not built; build them with: python -m fourbit.kernels.cpu._build (needs a C++ compiler)"
    try:
        loaded = Library(path)
    except (OSError, AttributeError) as error:
        return None, f"{path.name} could not be used ({error}); build it again: python -m fourbit.kernels.cpu._build"
    if asked and not loaded.use_isa(asked):
        raise UserError(
            f"{ISA_VARIABLE} is {asked}, which this processor or build does not have: leave it out, or set it to {loaded.isa}."
        )
    return loaded, ""


def library() -> Library | None:
    """The library, loaded once; None, with one warning, where there is none."""
    loaded, reason = _load()
    if loaded is None and reason != SWITCHED_OFF:
        _warn(reason)
    return loaded


@lru_cache(maxsize=1)
def _warn(reason: str) -> None:
    warnings.warn(f"fourbit runs without its CPU kernels, several times slower: {reason}", stacklevel=3)


def status() -> Status:
    """For `fourbit doctor` and `explain`."""
    loaded, reason = _load()
    if loaded is None:
        return Status("cpu", False, reason, needed=reason != SWITCHED_OFF)
    threads = "torch's threads" if loaded.threads else "one thread (torch's OpenMP runtime was not found)"
    chosen = f" (set by {ISA_VARIABLE})" if os.environ.get(ISA_VARIABLE) else ""
    return Status("cpu", True, f"{loaded.isa}{chosen}, {threads}")
