"""The picture a video starts from, opened safely: upright, opaque, in RGB, and of a sane size.

What decoding will take is known from the file's header (`measure`), so that a plan counts it. What
is made of the decoded picture is made in bands of rows.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from penstock.errors import ImageError
from penstock.profiles.manifest import Picture
from penstock.regular import open_regular

MAX_PIXELS = 64_000_000
MAX_ASPECT = 100
"""Of the longer to the shorter side: the shorter one is scaled up to what the encoder sees."""

_RGB = 4  # bytes of a pixel: Pillow keeps three channels in four bytes
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_CODEC = {"JPEG": 8, "MPO": 8, "WEBP": 20, "AVIF": 24, "TIFF": 8, "GIF": 5}
"""Bytes of a pixel that decoders hold beside the picture: the coefficients of a progressive JPEG,
WebP's and AVIF's whole frames, a TIFF of one strip, a GIF's frame and its colours."""

_BAND_PIXELS = 1 << 20
_BAND_BYTES = 20
"""Of a pixel of a band: as it is, with alpha, the white, over it, and in RGB."""

_BASE_BYTES = 1 << 19  # tables, lines and the like, whatever the picture
# Decoders that only decode: Pillow's EPS reader, for one, starts another program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
    zlib.error,
)  # fmt: skip
_BACKGROUND = (255, 255, 255, 255)

_UPRIGHT = 1
_TURN = Image.Transpose
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90,
}  # fmt: skip
"""What makes a picture upright, by its EXIF orientation."""

_SIDEWAYS = (5, 6, 7, 8)


def measure(path: Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Return what the header of the picture in a file says; no pixel is decoded.

    Raises:
        ImageError: missing, unreadable, no picture of a known format, too large or too narrow.
    """
    with _opened(path, max_pixels) as (picture, size_bytes):
        width, height = picture.size
        turned = _orientation(picture, path)
        if turned in _SIDEWAYS:
            width, height = height, width
        return Picture(width, height, _decode_bytes(picture, size_bytes, turned != _UPRIGHT))


def open_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open the picture in a file, upright, opaque and in RGB.

    The first frame of an animation; EXIF orientation applied; transparency laid over white; 16-bit
    grey scaled to 8 bits. The size is checked before a pixel is decoded; `measure` says what this
    takes.

    Raises:
        ImageError: as `measure`, or damaged.
    """
    with _opened(path, max_pixels) as (picture, _):
        return _decode(picture, path)


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[tuple[Image.Image, int]]:
    """Provide the picture, its pixels not decoded, and the bytes of its file."""
    try:
        with _open_file(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oversize and metadata warnings: we check ourselves
            picture = _identify(file, path)
            _check_size(picture.size, path, max_pixels)
            yield picture, os.fstat(file.fileno()).st_size
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


def _check_size(size: tuple[int, int], path: Path, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            "the picture is too large",
            expected=f"at most {max_pixels:,} pixels",
            found=f"{path}: {width} x {height} = {width * height:,} pixels",
            remedy="Scale it down first",
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            "the picture is too narrow",
            expected=f"sides that differ by a factor of at most {MAX_ASPECT}",
            found=f"{path}: {width} x {height}",
            remedy="Cut it to the video's shape first",
        )


def _orientation(picture: Image.Image, path: Path, *, loaded: bool = False) -> int:
    """Return the orientation by the header alone, or by the whole file: a PNG may say it after its
    pixels."""
    try:
        exif = picture.getexif() if loaded else Image.Image.getexif(picture)
        found = exif.get(ExifTags.Base.Orientation, _UPRIGHT)
    except _BROKEN as error:
        raise _damaged(path, error) from error
    return found if isinstance(found, int) and 1 < found < 9 else _UPRIGHT


def _decode_bytes(picture: Image.Image, size_bytes: int, turned: bool) -> int:
    """Return the most that `open_image` holds at a time: decoder and pixels, then pixels and RGB,
    then RGB as it was and upright."""
    stored = _STORED.get(picture.mode, _RGB)
    codec = _CODEC.get(picture.format or "", 0)
    if picture.format in ("JPEG", "MPO") and "progressive" not in picture.info:
        codec = 0
    whole_file = size_bytes if picture.format in ("WEBP", "AVIF") else 0
    pixels = picture.width * picture.height
    plain = picture.mode == "RGB" and not picture.has_transparency_data
    converted = 0 if plain else stored + _RGB
    band = 0 if plain else _BAND_BYTES * min(pixels, max(_BAND_PIXELS, picture.width))
    upright = 2 * _RGB if turned or picture.format == "PNG" else 0
    most = max(codec + stored, converted, upright)
    return _BASE_BYTES + band + most * pixels + 2 * whole_file


def _decode(picture: Image.Image, path: Path) -> Image.Image:
    try:
        picture.load()
        turned = _orientation(picture, path, loaded=True)
        rgb = to_rgb(picture)
        if rgb is not picture:
            picture.close()  # its pixels; a caller still knows it
        return rgb if turned == _UPRIGHT else rgb.transpose(_TURNS[turned])
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
    """Return the picture in mode RGB: alpha over white, 16-bit grey scaled, palettes and CMYK
    resolved.

    Raises:
        ImageError: floating-point pixels, whose white is not known.
    """
    if picture.mode == "F":
        raise ImageError(
            "floating-point pixels are not supported",
            expected="8 or 16 bits a channel",
            remedy="Save the picture as PNG or JPEG",
        )
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    made = Image.new("RGB", picture.size)
    rows = max(_BAND_PIXELS // picture.width, 1)
    for top in range(0, picture.height, rows):
        box = (0, top, picture.width, min(top + rows, picture.height))
        made.paste(_band_to_rgb(picture.crop(box)), box)
    return made


def _band_to_rgb(band: Image.Image) -> Image.Image:
    if band.mode.startswith("I"):
        # Rounded to the nearest of 257ths: 257 is odd, so that there is no half
        grey = np.asarray(band).astype(np.int32).clip(0, 65535)
        band = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if band.has_transparency_data:
        layer = band.convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", layer.size, _BACKGROUND), layer)
    return band.convert("RGB")
