"""How a model was asked for: enough to open it again, as a job that is resumed must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from penstock.engine.files.locate import Files
from penstock.engine.lora.file import Lora
from penstock.errors import JournalError, UsageError
from penstock.profiles.options import Options

_PARTS = tuple(each.name for each in fields(Files))


@dataclass(frozen=True)
class Opening:
    """Where a model is, as `penstock.engine.files.locate.locate` was told, and how it runs.

    Attributes:
        model: a folder, a file or a hub id; None: all parts are in ``files``.
        files: parts given by themselves.
        loras: applied beside the transformer's weights.
        options: as they were asked for; a job's record has them in its plan.
    """

    model: str | None
    files: Files = field(default_factory=Files)
    loras: tuple[Lora, ...] = ()
    options: Options = field(default_factory=Options)

    def values(self) -> dict[str, Any]:
        """Return plain values, for a job's record; places are absolute."""
        given = {name: path for name, path in asdict(self.files).items() if path is not None}
        return {
            "model": None if self.model is None else _absolute(self.model),
            "files": {name: _absolute(path) for name, path in given.items()},
            "loras": [_values(lora) for lora in self.loras],
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Opening:
        """Return what `values` gave, among others.

        Raises:
            JournalError: they name no model, or something else than LoRAs.
        """
        model, files = values.get("model"), values.get("files")
        places = files if isinstance(files, Mapping) else {}
        known = all(name in _PARTS and isinstance(path, str) for name, path in places.items())
        if not known or not (isinstance(model, str) or "transformer" in places):
            raise JournalError(
                "the job's record names no model",
                expected="a model, or files of its parts",
                found=f"model {model!r}, files {files!r}",
            )
        paths = {name: Path(path) for name, path in places.items()}
        loras = _loras(values.get("loras", []))
        return cls(model if isinstance(model, str) else None, Files(**paths), loras)


def _loras(kept: Any) -> tuple[Lora, ...]:
    try:
        return tuple(
            Lora(Path(path), float(strength), expert=expert[0] if expert else None)
            for path, strength, *expert in kept
        )
    except (TypeError, ValueError, UsageError) as error:
        raise JournalError("the job's record names no LoRAs", found=str(error)) from error


def _values(lora: Lora) -> list[Any]:
    expert = [] if lora.expert is None else [lora.expert]
    return [_absolute(lora.path), lora.strength, *expert]


def _absolute(place: str | Path) -> str:
    """Return a path as it is from everywhere; what is no path, such as a hub id or the bare name of
    a file under a ComfyUI root, as it is."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else str(place)
