"""Pictures that clients send: bytes, base64, data: URLs, and addresses where these are allowed.

Nothing is decoded here: that is the planning process's, which can be lost. Nothing of a client
becomes part of a path.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.errors import ImageError, UsageError

_DATA = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
FETCH_S = 20.0


async def picture_bytes(value: Any, name: str, *, allow_urls: bool, most_bytes: int) -> bytes:
    """Return what a client sent as a picture, as the bytes of its file.

    Args:
        value: bytes, base64, a data: URL, an address, or {"image_url": one of these}.
        name: of the field, for messages.
        allow_urls: http and https addresses are fetched.
        most_bytes: of the file.

    Raises:
        ImageError, UsageError: it is none of these, is too large, or cannot be fetched.
    """
    if isinstance(value, Mapping):
        value = value.get("image_url")
        value = value.get("url") if isinstance(value, Mapping) else value
    if isinstance(value, bytes):
        return _bounded(value, name, most_bytes)
    if not isinstance(value, str):
        raise ImageError(
            f"{name} is not a picture",
            expected="a file of a form, base64, a data: URL or {image_url}",
            found=type(value).__name__,
        )
    if _ADDRESS.match(value):
        if not allow_urls:
            raise UsageError(
                f"{name} is an address",
                expected="the picture itself",
                found="http(s)",
                remedy="Send the image itself, or start the server with --allow-urls.",
            )
        return _bounded(
            await asyncio.to_thread(_fetched, value, name, most_bytes), name, most_bytes
        )
    return _bounded(_decoded(value, name), name, most_bytes)


def _decoded(text: str, name: str) -> bytes:
    start = _DATA.match(text)
    try:
        return base64.b64decode(text[start.end() if start else 0 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"{name} is not a picture", expected="base64 or a data: URL", found="other text"
        ) from error


def _bounded(data: bytes, name: str, most_bytes: int) -> bytes:
    if not 0 < len(data) <= most_bytes:
        raise ImageError(
            f"{name} is empty" if not data else f"{name} is too large",
            expected=f"1 to {most_bytes:,} bytes",
            found=f"{len(data):,}",
        )
    return data


def _fetched(address: str, name: str, most_bytes: int) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=FETCH_S) as answer:
            return bytes(answer.read(most_bytes + 1))
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be fetched", found=type(error).__name__) from error


def keep(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
