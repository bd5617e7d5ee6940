"""What the nodes ask of their worker: plain values, for a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PLAN, MAKE, RESUME = "plan", "make", "resume"


@dataclass(frozen=True)
class NodeOrder:
    """One execution of a node.

    Attributes:
        id: by which it is cancelled.
        do: "plan", "make" or "resume".
        model: as `penstock.engine.model.opening.Opening.values` has it.
        options: of the run (`penstock.profiles.options.Options`), as far as they are said.
        settings: of the request (`penstock.engine.request.settings.Settings`), as far as they are
            said; files by their paths.
        job: the name of the job that is resumed; None: the newest unfinished one.
        video: the mp4 that is made.
        frames: where the frames go as IMAGE has them; None: they are not asked for.
    """

    id: str
    do: str
    model: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    job: str | None = None
    video: str | None = None
    frames: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them again."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NodeOrder:
        """Return the order that `to_json` gave ``value`` for."""
        return cls(**value)
