"""How a model was asked for: enough to open it again, as a job that is resumed must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.locate import Files
from penstock.errors import JournalError

if TYPE_CHECKING:  # torch is not needed to read a job's record
    from penstock.quant.compute import Mode
    from penstock.quant.scaled import Gemm

_NAMES = ("model", "files", "format", "compute")


@dataclass(frozen=True)
class Opening:
    """What `penstock.engine.engine.Engine.open` was given.

    Attributes:
        model: a folder, a file or a hub id; None: all parts are in ``files``.
        files: parts given by themselves.
        format: of the transformer's matrices; None: as they are stored.
        compute: "exact" decodes quantised weights; "fast" multiplies in 8 bits where it can.
        working: the 8-bit products that the device has shown to work (empty for "exact").
    """

    model: str | None
    files: Files = field(default_factory=Files)
    format: str | None = None
    compute: Mode = "exact"
    working: frozenset[Gemm] = frozenset()

    @property
    def told(self) -> str:
        """How it computes, for reports: "exact", "fast", "fast (fp8, int8)"."""
        paths = f" ({', '.join(sorted(self.working))})" if self.working else ""
        return self.compute + paths

    def values(self) -> dict[str, Any]:
        """Plain values, for a job's record; places are absolute."""
        files = {name: path for name, path in asdict(self.files).items() if path is not None}
        return {
            "model": None if self.model is None else _absolute(self.model),
            "files": {name: _absolute(path) for name, path in files.items()},
            "format": self.format,
            "compute": self.compute,
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Opening:
        """What `values` gave, among others.

        Raises:
            JournalError: they name no model.
        """
        model, files = values.get("model"), values.get("files") or {}
        if not (isinstance(model, str) or "transformer" in files):
            raise JournalError("the job's record names no model")
        paths = {name: Path(path) for name, path in files.items()}
        return cls(model, Files(**paths), values.get("format"), values.get("compute", "exact"))

    @staticmethod
    def strip(values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` without those of an opening."""
        return {name: value for name, value in values.items() if name not in _NAMES}


def _absolute(place: str | Path) -> str:
    """A path as it is from everywhere; a hub id (which no path is) as it is."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else str(place)
