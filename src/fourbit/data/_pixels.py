"""From an image file to 8-bit pixels, grey or RGB, whatever the file has.

    16-bit grey             level / 257, rounded: 0 to 65535 become 0 to 255
    palette, black and white, CMYK, YCbCr, LAB, HSV     converted by PIL
    transparency            laid on white, as a viewer shows it: what lies under transparent pixels is arbitrary, often black
    32-bit, floats          refused: which number is white is not written in the file

A JPEG's note that it was taken with the camera turned (EXIF) is not followed; of an animation the first picture counts.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fourbit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Mode = Literal["L", "RGB"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of files that count as images."""

GREY = ("1", "L", "LA", "La", "I", "F")
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def opened(source: Path | bytes, where: str) -> Image:
    """The image with its header read, and not its pixels; UserError where it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    except UnidentifiedImageError as error:
        raise UserError(f"{where} cannot be decoded: replace or remove the file (it is no image).") from error
    except Exception as error:  # PIL raises half a dozen types for damaged files
        raise _undecodable(where, error) from error


def is_grey(image: Image) -> bool:
    """Whether the file can hold nothing but grey pixels."""
    if image.mode in ("P", "PA"):
        colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in GREY or image.mode.startswith("I;16")


def converted(image: Image, mode: Mode, where: str) -> Image:
    """With 8 bits per channel.

    Args:
        image: as `opened` returns it.
        mode: grey or colour; colours become grey as L = 0.299 R + 0.587 G + 0.114 B.
        where: the words for it in errors.

    Raises:
        UserError: damaged pixels, or 32-bit ones.
    """
    try:
        image.load()
        if image.mode == mode and "transparency" not in image.info:
            return image
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            return _eight_bits(image).convert(mode)  # PIL would cut off what is above 255
        if image.mode not in ("I", "F"):
            shown = _on_white(image) if image.mode in ALPHA or "transparency" in image.info else image
            # LAB knows the way to RGB alone
            return shown.convert(mode) if shown.mode in ("1", "L", "P") else shown.convert("RGB").convert(mode)
    except Exception as error:
        raise _undecodable(where, error) from error
    holds = "32-bit whole numbers" if image.mode == "I" else "floating-point numbers"
    raise UserError(f"{where} has pixels of {holds}, and which one is white is unknown: convert it to 8 or 16 bits.")


def _eight_bits(image: Image) -> Image:
    from PIL import Image as images

    levels = np.asarray(image).astype(np.int64)
    return images.fromarray(((levels + 128) // 257).astype(np.uint8))


def _on_white(image: Image) -> Image:
    from PIL import Image as images

    if image.mode == "La":  # knows the way to LA alone
        image = image.convert("LA")
    above = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", above.size, "white"), above)


def _undecodable(where: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{where} cannot be decoded: replace or remove the file ({reason}).")


def channel_statistics(pixels: Tensor) -> dict[str, Tensor]:
    """Mean and deviation of pixel/255 per channel, float64 [C]; a deviation is that of one grey level at least."""
    level = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(pixels.shape[1]):
        share = torch.zeros(256, dtype=torch.float64)
        for part in pixels[:, channel].split(4096):  # bincount needs eight bytes per pixel
            share += part.flatten().bincount(minlength=256)
        share /= share.sum()
        means.append((share * level).sum())
        deviations.append((share * (level - means[-1]).square()).sum().sqrt())
    return {"mean": torch.stack(means), "std": torch.stack(deviations).clamp_min(1 / 255)}
