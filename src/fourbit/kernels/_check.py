"""The one place where a tensor becomes an address or goes into a launch: kernels read and write memory without asking."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.quantizers import BLOCK, is_dense

CHANNELS_LAST = torch.channels_last


def packed_bytes(n: int) -> int:
    """Bytes of the packed codes of n elements: 32 per block of 64."""
    return -(-n // BLOCK) * (BLOCK // 2)


def mask_bytes(n: int) -> int:
    """Bytes of one bit for each of n elements: 8 per block of 64."""
    return -(-n // BLOCK) * (BLOCK // 8)


def pointer(
    t: Tensor,
    name: str,
    dtype: torch.dtype,
    numel: int,
    order: torch.memory_format | None = None,
    like: Tensor | None = None,
) -> int:
    """The address of a CPU tensor, for a kernel that touches the `numel` elements from there on.

    Every tensor of a kernel's arguments goes through here, with what the kernel is going to do with it:

        codes_of(packed, n)                                            n packed codes, in whole blocks
        bits_of(mask, "mask", n)                                       n bits, in whole blocks; None stays None
        pointer(x, "x", torch.uint8, n, CHANNELS_LAST)                 the axes must lie in this order
        pointer(residual, "residual", torch.float32, n, like=y)        walked together with y: same shape, same order
        optional(gamma, "gamma", torch.float32, channels)              None stays None

    Args:
        name: of the argument, for the message.
        dtype: as the kernel reads it; no conversion.
        numel: elements that are read or written; a tensor may have more.
        order: the order of axes that the kernel assumes; None: any, as long as the elements fill one piece of memory.
        like: a dense tensor (that has gone through here itself) whose elements must lie in the same order. Dense tensors with
            the same strides have the same shape.

    Raises:
        UserError: not on the CPU, another dtype, too few elements, gaps or repeats between them, another order, a view that
            is negated when it is read (torch's negative bit), or elements without memory (meta and zero tensors, storages
            that were resized).
    """
    if like is not None:
        lies = (t.stride() == like.stride() and t.numel() == like.numel()) or _same_order(t, like)
    elif order is not None:
        lies = t.is_contiguous(memory_format=order)
    else:
        lies = t.is_contiguous() or is_dense(t)
    if lies and t.dtype is dtype and t.numel() >= numel and t.is_cpu and not t.is_neg():
        address = t.data_ptr()
        if address or not numel:
            return address
    raise _wrong(t, name, dtype, numel, order, like)


def fresh(t: Tensor) -> int:
    """The address of a CPU tensor that the caller has just made, for this kernel, with the size and order that it touches."""
    return t.data_ptr()


def optional(t: Tensor | None, name: str, dtype: torch.dtype, numel: int, like: Tensor | None = None) -> int | None:
    """`pointer`, or None."""
    return None if t is None else pointer(t, name, dtype, numel, None, like)


def codes_of(packed: Tensor, n: int) -> int:
    """The address of the packed codes of n elements: bytes in order."""
    return _bytes(packed, "packed", packed_bytes(n))


def bits_of(mask: Tensor | None, name: str, n: int) -> int | None:
    """The address of one bit for each of n elements: bytes in order."""
    return None if mask is None else _bytes(mask, name, mask_bytes(n))


def _bytes(t: Tensor, name: str, num: int) -> int:
    """`pointer` to bytes in order, which is asked for most often."""
    if t.dtype is torch.uint8 and t.is_contiguous() and t.numel() >= num and t.is_cpu:
        address = t.data_ptr()
        if address or not num:
            return address
    raise _wrong(t, name, torch.uint8, num, torch.contiguous_format, None)


def checked(t: Tensor, name: str, dtype: torch.dtype, numel: int, on: Tensor) -> Tensor:
    """The same for kernels of other devices, which are given tensors: `t` itself, dense and on the device of `on`; bytes, of
    packed codes and bits, in order."""
    if (
        t.dtype is dtype
        and (dtype is not torch.uint8 or t.is_contiguous())
        and t.numel() >= numel
        and t.device == on.device
        and is_plain(t)
        and (t.data_ptr() or not numel)
    ):
        return t
    raise _wrong(t, name, dtype, numel, None, None, str(on.device))


def require(holds: bool, what: str) -> None:
    """An error of the user unless sizes go together.

    Raises:
        UserError: they do not.
    """
    if not holds:
        raise UserError(f"arguments of a kernel do not go together: {what} is needed")


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one: the same numbers, in the same place."""
    return a is b or (
        a.shape == b.shape
        and a.dtype is b.dtype
        and a.device == b.device
        and is_plain(a)
        and is_plain(b)
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
    )


def require_disjoint(written: Tensor, name: str, others: Iterable[tuple[Tensor, str]]) -> None:
    """No byte that a kernel writes into one argument is one of another's.

    Args:
        written, others: dense CPU tensors; exactly the same memory is allowed, where a kernel goes element by element.

    Raises:
        UserError: they overlap.
    """
    begin, size = written.data_ptr(), written.numel() * written.element_size()
    for other, its_name in others:
        at, its_size = other.data_ptr(), other.numel() * other.element_size()
        if begin < at + its_size and at < begin + size and (begin, size) != (at, its_size):
            raise UserError(f"{name} and {its_name} of a kernel share memory: pass a copy of one of them")


def is_plain(t: Tensor) -> bool:
    """Whether kernels can read a tensor as it lies in memory: dense, strided, and not negated on reading."""
    return t.layout is torch.strided and not t.is_neg() and is_dense(t)


def _same_order(t: Tensor, like: Tensor) -> bool:
    pairs = zip(t.shape, t.stride(), like.stride(), strict=False)
    return t.shape == like.shape and all(size == 1 or a == b for size, a, b in pairs)


def _wrong(
    t: Tensor,
    name: str,
    dtype: torch.dtype,
    numel: int,
    order: torch.memory_format | None,
    like: Tensor | None,
    device: str = "cpu",
) -> UserError:
    kind = "in channels_last" if order is CHANNELS_LAST else "dense" if like is None else f"as {tuple(like.shape)} lies"
    needed = f"{numel} elements of {dtype} on {device}, {kind}, in memory of their own"
    found = f"{t.dtype} of shape {tuple(t.shape)} on {t.device}"
    if t.layout is torch.strided and not t.is_nested:
        found += f" with strides {t.stride()}" + (", negated when it is read" if t.is_neg() else "")
    return UserError(f"{name} of a kernel must have {needed}, but is {found}")
