"""What lies in the place of a file of weights now and then, by its first bytes: named, so that
nobody looks for damage in a file that never was there."""

from __future__ import annotations

import re
from pathlib import Path

from penstock.errors import HeaderError

START_BYTES = 512
"""How much of a file is looked at."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = re.compile(rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype|html|head|\?xml|error)\b", re.I | re.S)
_SIZE = re.compile(rb"^size (\d{1,20})$", re.M)


def stranger(path: Path, start: bytes, size: int) -> HeaderError | None:
    """Return the error for a file of ``size`` bytes that begins with ``start``; None if that is
    nothing known."""
    if start.startswith(_POINTER):
        meant = _SIZE.search(start)
        return HeaderError(
            f"{path} is a Git LFS pointer, not the file that it points to",
            expected=f"{int(meant[1]):,} bytes" if meant else "the file itself",
            found=f"{size:,} bytes of text",
            remedy="Run `git lfs pull` in that repository, or download the file from its page.",
        )
    if _PAGE.match(start):
        return HeaderError(
            f"{path} is a web page, not a file of weights",
            expected="safetensors or GGUF",
            found=repr(start[:60].decode("utf-8", "replace")),
            remedy="The site answered with a page (a login, a limit, a wrong link): sign in, take "
            "the link of the file itself, and download it again.",
        )
    if start[:2] in (b'{"', b"{\n") and size < START_BYTES:
        return HeaderError(
            f"{path} is a message, not a file of weights",
            expected="safetensors or GGUF",
            found=repr(start.decode("utf-8", "replace")),
            remedy="The site answered with it instead of the file: download it again.",
        )
    if size > len(start) == START_BYTES and not any(start):
        return HeaderError(
            f"{path} begins with nothing but zeros",
            expected="safetensors or GGUF",
            found="space for a download that has not arrived",
            remedy="Let the download finish, or start it again.",
        )
    return None
