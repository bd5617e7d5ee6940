"""What a worker is told to do, and what it answers: plain values, for a pipe or another machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from penstock.engine.request.settings import Settings
from penstock.errors import OverBudget, PenstockError, UsageError

JOURNAL, VIDEO = "journal", "video.mp4"
"""In a job's folder: what the engine keeps of it, and what it makes."""

IMAGE, LAST_IMAGE, BEFORE = "image", "last_image", "before.mp4"
"""Likewise: pictures as they were sent, and the video that is gone on from."""

PICTURES = (IMAGE, LAST_IMAGE)
FILES = {IMAGE: IMAGE, LAST_IMAGE: LAST_IMAGE, "after": BEFORE}
"""Settings that name files, and what these are called in a job's folder."""

COMPLETED, STOPPED, FAILED = "completed", "stopped", "failed"
"""How a worker's run of a job may end."""

UNSEEN = "unseen"
"""In the notice of a worker that does not see a job's folder: what it does is lost with it."""

Tell = Callable[[Mapping[str, Any]], None]
"""Takes what a job tells: ``{"event": "progress", ...}`` or ``{"event": "notice", ...}``."""


@dataclass(frozen=True)
class Order:
    """One job.

    Attributes:
        id: that clients use.
        model: the name of a model that the worker knows.
        settings: of the request (`Settings`), all of them said; files by their names in ``folder``.
        folder: where the job is kept, and its video comes to.
        loras: "PATH" or "PATH:STRENGTH" each.
        cache: the step cache, or None for the server's own option.
        preview_every: steps from one preview to the next; None: there are none.
    """

    id: str
    model: str
    settings: Mapping[str, Any]
    folder: str
    loras: tuple[str, ...] = ()
    cache: str | None = None
    preview_every: int | None = 1

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them again."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Order:
        """Return the order that `to_json` gave ``value`` for, whatever lies beside it there.

        Raises:
            TypeError: something is missing.
        """
        own = {each.name: value[each.name] for each in fields(cls) if each.name in value}
        return cls(**{**own, "loras": tuple(own.get("loras", ()))})

    @property
    def journal(self) -> Path:
        """The engine's folder for the job."""
        return Path(self.folder) / JOURNAL

    @property
    def video(self) -> Path:
        """What is made."""
        return Path(self.folder) / VIDEO


def settings_of(values: Mapping[str, Any], folder: Path) -> Settings:
    """Return the engine's settings from an order's; files are those in ``folder``.

    Raises:
        UsageError: a setting that is none.
    """
    known = {each.name for each in fields(Settings)}
    if unknown := sorted(values.keys() - known):
        raise UsageError("no such setting", expected=", ".join(known), found=", ".join(unknown))
    files = {name: folder / FILES[name] for name in FILES if values.get(name) is not None}
    return Settings(**{**values, **files})


def error_values(error: BaseException) -> dict[str, Any]:
    """Return an error as clients see it: what penstock raises on purpose with all that it says,
    anything else by its kind alone."""
    if not isinstance(error, PenstockError):
        return {
            "code": "internal",
            "message": f"An unexpected {type(error).__name__}; the server's log says more.",
        }
    told: dict[str, Any] = {
        "code": error.code,
        "message": str(error),
        "expected": error.expected,
        "found": error.found,
        "remedy": error.remedy,
    }
    if isinstance(error, OverBudget):
        told |= {
            "resource": error.resource,
            "need_bytes": error.need_bytes,
            "limit_bytes": error.limit_bytes,
            "consumers": [list(each) for each in error.consumers],
        }
    return told
