"""The tensors of a network by name, wherever they lie: one file, or shards beside an index.

Opened by headers alone and read by position; nothing is mapped into memory, so that a file which
shrinks under us is an error and not a crash.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from penstock.errors import CheckpointChanged, CheckpointError, HeaderError, TensorMismatch
from penstock.offload.files import FileReader
from penstock.offload.header import TensorEntry, read_header, refuse_pickle

_STEMS = ("diffusion_pytorch_model", "model")
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def torch_dtype(tag: str) -> torch.dtype:
    """The torch type of a safetensors tag.

    Raises:
        HeaderError: penstock computes with no such type.
    """
    try:
        return _DTYPES[tag]
    except KeyError:
        raise HeaderError(
            "unsupported tensor type", expected=", ".join(_DTYPES), found=tag
        ) from None


@dataclass(frozen=True)
class FileStamp:
    """What a file was when it was opened."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """The stamp of ``path`` now."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class Checkpoint(Mapping[str, TensorEntry]):
    """Tensor entries by name. Make one with :meth:`open`."""

    def __init__(
        self, entries: Mapping[str, TensorEntry], stamps: Mapping[Path, FileStamp]
    ) -> None:
        self._entries = dict(entries)
        self.stamps = dict(stamps)
        self._reader = FileReader()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a .safetensors file, an index of shards, or a folder that holds one of them.

        Raises:
            CheckpointError: there is none; HeaderError, PickleRefused: it cannot be used.
        """
        path = Path(path)
        if path.is_dir():
            path = _in_folder(path)
        if path.name.endswith(".index.json"):
            return cls._open_shards(path)
        stamp = FileStamp.of(path)
        return cls({entry.name: entry for entry in read_header(path).entries}, {path: stamp})

    @classmethod
    def _open_shards(cls, index: Path) -> Checkpoint:
        weight_map = _weight_map(index)
        entries: dict[str, TensorEntry] = {}
        stamps = {}
        for name in sorted(set(weight_map.values())):
            shard = index.parent / name
            if not shard.is_file():
                raise CheckpointError(
                    f"a shard of {index} is missing", expected=str(shard), found="no such file",
                    remedy="Copy or download the model again",
                )  # fmt: skip
            stamps[shard] = FileStamp.of(shard)
            for entry in read_header(shard).entries:
                if weight_map.get(entry.name) != name:
                    raise TensorMismatch(
                        f"{shard} and {index.name} disagree",
                        expected=f"{entry.name} in {weight_map.get(entry.name, 'no shard')}",
                        found=f"it in {name}",
                    )
                entries[entry.name] = entry
        absent = weight_map.keys() - entries.keys()
        if absent:
            raise TensorMismatch(
                f"{len(absent)} tensors of {index} are in no shard", found=min(absent)
            )
        return cls(entries, stamps)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        entry = self[name]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._reader.read_into(entry.file, entry.offset, buffer)
        return buffer.view(torch_dtype(entry.dtype)).view(entry.shape)

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """The given rows (len(rows), ...) of a tensor, on the CPU; nothing else of it is read.

        Raises:
            IndexError: there is no such row.
        """
        entry = self[name]
        count = entry.shape[0]
        width = entry.nbytes // count
        buffer = torch.empty((len(rows), width), dtype=torch.uint8)
        for place, row in zip(buffer, rows, strict=True):
            if not 0 <= row < count:
                raise IndexError(f"{name} has {count} rows, not one numbered {row}")
            self._reader.read_into(entry.file, entry.offset + row * width, place)
        return buffer.view(torch_dtype(entry.dtype)).view(len(rows), *entry.shape[1:])

    def check_unchanged(self) -> None:
        """Compare size, time and identity of all files with what they were at opening.

        Raises:
            CheckpointChanged: names the first file that differs.
        """
        for path, stamp in self.stamps.items():
            try:
                now = FileStamp.of(path)
            except OSError:
                now = None
            if now != stamp:
                raise CheckpointChanged(
                    f"{path} was changed after it was opened",
                    expected=str(stamp),
                    found=str(now) if now else "no such file",
                    remedy="Leave the model alone while a job runs; start the job again",
                )

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _in_folder(folder: Path) -> Path:
    for suffix in (".safetensors.index.json", ".safetensors"):
        found = [
            p for stem in _STEMS for p in folder.glob(f"{stem}*{suffix}") if "-of-" not in p.name
        ]
        exact = [p for p in found if p.name in {f"{stem}{suffix}" for stem in _STEMS}]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if found:
            raise CheckpointError(
                f"{folder} holds several variants", expected="one",
                found=", ".join(sorted(p.name for p in found)), remedy="Keep the one you want",
            )  # fmt: skip
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.suffix in (".bin", ".ckpt", ".pth", ".pt"):
            refuse_pickle(path)
    raise CheckpointError(
        f"no weights in {folder}",
        expected=" or ".join(f"{stem}.safetensors" for stem in _STEMS),
        found="neither, nor an index of shards",
        remedy="Copy or download the model again",
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeaderError(f"{index} cannot be read", found=str(error)) from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{index} is no index of shards", expected='an object "weight_map"')
    for name in weight_map.values():
        plain = isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
        if not plain or not name.isprintable():
            raise HeaderError(
                f"{index} names a file outside its folder",
                expected="names of .safetensors files beside it",
                found=repr(name)[:80],
            )
    return weight_map
