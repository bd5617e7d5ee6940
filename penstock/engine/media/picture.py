"""The picture a video starts from, opened safely: upright, opaque, in RGB, and of a sane size."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from penstock.errors import ImageError
from penstock.regular import open_regular

MAX_PIXELS = 64_000_000
# Decoders that only decode: Pillow's EPS reader, for one, starts another program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
    zlib.error,
)  # fmt: skip
_BACKGROUND = (255, 255, 255, 255)


def open_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, upright, opaque and in RGB.

    The first frame of an animation; EXIF orientation applied; transparency laid over white; 16-bit
    grey scaled to 8 bits. The size is checked before a pixel is decoded.

    Raises:
        ImageError: missing, unreadable, no picture of a known format, damaged, or too large.
    """
    try:
        with _open_file(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oversize and metadata warnings: we check ourselves
            picture = _identify(file, path)
            _check_pixels(picture.size, path, max_pixels)
            return _decode(picture, path)
    except Image.DecompressionBombError as error:
        raise ImageError(
            "the picture is too large",
            expected=f"at most {max_pixels:,} pixels",
            found=f"{path}: {error}",
            remedy="Scale it down first",
        ) from error


def _open_file(path: Path) -> BinaryIO:
    try:
        if not path.exists():
            raise ImageError("no such picture", expected="an image file", found=str(path))
        if not path.is_file():
            raise ImageError("not a file", expected="an image file", found=str(path))
        return open_regular(path)
    except OSError as error:
        raise ImageError(
            "the picture cannot be read",
            found=f"{path}: {error.strerror}",
            remedy="Check the file's permissions",
        ) from error


def _identify(file: BinaryIO, path: Path) -> Image.Image:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(file, formats=known)
    except UnidentifiedImageError as error:
        raise ImageError("not a picture", expected=" or ".join(known), found=str(path)) from error
    except _BROKEN as error:
        raise _damaged(path, error) from error


def _check_pixels(size: tuple[int, int], path: Path, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            "the picture is too large",
            expected=f"at most {max_pixels:,} pixels",
            found=f"{path}: {width} x {height} = {width * height:,} pixels",
            remedy="Scale it down first",
        )


def _decode(picture: Image.Image, path: Path) -> Image.Image:
    try:
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture))
    except _BROKEN as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ImageError:
    return ImageError(
        "the picture is damaged",
        expected="a complete image file",
        found=f"{path}: {error}",
        remedy="Open it in an image editor and save it again",
    )


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB: alpha over white, 16-bit grey scaled, palettes and CMYK resolved.

    Raises:
        ImageError: floating-point pixels, whose white is not known.
    """
    if picture.mode == "F":
        raise ImageError(
            "floating-point pixels are not supported",
            expected="8 or 16 bits a channel",
            remedy="Save the picture as PNG or JPEG",
        )
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float64) / 257.0
        picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, _BACKGROUND), layer)
    return picture.convert("RGB")
