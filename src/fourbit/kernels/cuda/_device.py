"""What this machine offers: devices, their compute capability, and Triton, which is imported when first needed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fourbit.backends import Status

DEVICES: dict[str, tuple[int, int] | None] = {"cuda": None}
"""Types of device whose tensors the kernels take, and their compute capability (None: ask). Tests that run in Triton's
interpreter enter "cpu"."""


def takes(t: Tensor) -> bool:
    """Whether a tensor lies where these kernels can work."""
    return t.device.type in DEVICES


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability."""
    return DEVICES[device.type] or torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def kernels() -> Any | None:
    """The module of Triton kernels; None, with one warning, where there is no Triton."""
    try:
        return importlib.import_module("fourbit.kernels.cuda._jit_kernels")
    except ImportError as error:
        warnings.warn(
            f"fourbit quantizes without its CUDA kernels, many times slower: Triton is missing ({error}); "
            "install the triton that belongs to this torch",
            stacklevel=2,
        )
        return None


def launch(kernel: Any, num_programs: int, on: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of `on`. No contraction of multiplications and additions: the numbers are defined bit by
    bit."""
    if on.device.type == "cuda" and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[(num_programs,)](*arguments, enable_fp_fusion=False, **options)
    else:
        kernel[(num_programs,)](*arguments, enable_fp_fusion=False, **options)


def status() -> Status:
    """For `fourbit doctor` and `explain`."""
    if torch.version.cuda is None:
        return Status("cuda", False, "this torch is built without CUDA", needed=False)
    if not torch.cuda.is_available():
        return Status("cuda", False, "no CUDA device is visible", needed=False)
    name = torch.cuda.get_device_name()
    major, minor = capability(torch.device("cuda", torch.cuda.current_device()))
    if importlib.util.find_spec("triton") is None:
        return Status("cuda", False, f"{name}: Triton is missing; install the triton that belongs to this torch")
    return Status("cuda", True, f"{name}, compute capability {major}.{minor}")
