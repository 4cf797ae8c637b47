"""In place of the library's own products, on a processor that has none: what they would read is read, what they would write is
written, by functions that AddressSanitizer watches. So the arguments that they are given are tested everywhere."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fourbit.kernels.cpu import _convolutions, _lstm, _matrices, library
from fourbit.kernels.cpu._library import Library


def _read(address: int | None, size: int) -> None:
    if address and size:
        ctypes.memmove(ctypes.create_string_buffer(size), address, size)


def _write(address: int | None, size: int) -> None:
    assert size >= 0
    if size:
        assert address
        ctypes.memset(address, 0, size)


class StandIn:
    """A `Library` whose products give zeros; its other kernels are the real ones."""

    has_products = has_dot_product = True

    def __getattr__(self, name: str) -> Any:
        return getattr(library(), name)

    def panel_count(self, at: Any) -> int:
        """As in multiply.cpp."""
        t = _structure(at)
        return -(-t.columns // 32) * 32 * (-(-t.depth // 4) + 1 if t.integers else -(-t.depth // 2))

    def pack_panels(self, at: Any, out: int) -> int:
        """Reads the right matrix."""
        t = _structure(at)
        _read(t.b, t.depth * t.columns)
        _write(out, 4 * self.panel_count(at))
        return 1

    def multiply(self, at: Any) -> int:
        """Masks and codes by whole blocks of 64."""
        t = _structure(at)
        n = t.rows * t.columns
        assert t.rows >= 0 and t.columns >= 0 and t.depth >= 0 and (t.panels or not t.integers)
        assert not t.mask or t.columns % 16 == 0
        _read(t.a, t.rows * t.depth * (1 if t.integers else 2))
        _read(t.b, t.depth * t.columns)
        _read(t.mask, -(-n // 64) * 8)
        _read(t.packed, -(-n // 64) * 32)
        if t.panels:
            _read(t.panels, 4 * self.panel_count(at))
        _write(t.out, 4 * n)
        return 1

    def conv_fprop(self, at: Any) -> int:
        """Any number of channels."""
        t = _structure(at)
        images, pixels = _check_geometry(t, t.stride_height, t.stride_width, 1)
        _read(t.x, images * t.in_channels)
        _read(t.w, t.out_channels * t.kernel_height * t.kernel_width * t.in_channels)
        _write(t.out, pixels * t.out_channels * (2 if t.halves else 4))
        return 1

    def conv_wgrad(self, at: Any) -> int:
        """Stride 1, channels in sixteens."""
        t = _structure(at)
        images, pixels = _check_geometry(t, 1, 1, 16)
        _read(t.x, images * t.in_channels)
        _read(t.g, pixels * t.out_channels * 2)
        _write(t.dw, 4 * t.out_channels * t.kernel_height * t.kernel_width * t.in_channels)
        return 1

    def conv_dgrad(self, at: Any) -> int:
        """Likewise."""
        t = _structure(at)
        images, pixels = _check_geometry(t, 1, 1, 16)
        _read(t.g, pixels * t.out_channels * 2)
        _read(t.w, t.out_channels * t.kernel_height * t.kernel_width * t.in_channels)
        _write(t.out, images * t.in_channels * (2 if t.out_dtype == 1 else 4))
        return 1


def _structure(at: Any) -> Any:
    return at._obj


def _check_geometry(t: Any, stride_height: int, stride_width: int, multiple: int) -> tuple[int, int]:
    """Pixels of input and output, after a look at what the loops assume."""
    assert t.in_channels % multiple == 0 and t.out_channels % multiple == 0 and t.out_channels > 0 and t.in_channels > 0
    assert 0 <= t.pad_height < t.kernel_height and 0 <= t.pad_width < t.kernel_width
    assert stride_height >= 1 and stride_width >= 1
    assert t.out_height == (t.height + 2 * t.pad_height - t.kernel_height) // stride_height + 1 >= 1
    assert t.out_width == (t.width + 2 * t.pad_width - t.kernel_width) // stride_width + 1 >= 1
    return t.num * t.height * t.width, t.num * t.out_height * t.out_width


@contextmanager
def standing_in() -> Iterator[bool]:
    """Whether the products of the block are a stand-in's."""
    loaded = library()
    assert isinstance(loaded, Library)
    if loaded.has_products:
        yield False
        return
    stand_in = StandIn()
    with (
        mock.patch.object(_matrices, "kernels", return_value=stand_in),
        mock.patch.object(_convolutions, "kernels", return_value=stand_in),
        mock.patch.object(_lstm, "kernels", return_value=stand_in),
        mock.patch.object(_convolutions, "has_int8", return_value=True),
    ):
        yield True
