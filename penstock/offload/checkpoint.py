"""Checkpoints as users have them: one safetensors file, a sharded index, or a folder with either.

Opening reads headers only; data is read when asked for, by position, never mapped, never unpickled.
torch is imported by what makes tensors, so that a file can be described without it: importing it
takes seconds and 200 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from penstock.closing import Closing
from penstock.errors import CheckpointError, HeaderError, PickleRefused, TensorMismatch
from penstock.formats.tags import TORCH_NAMES
from penstock.offload.files import FileStamp, WeightFile, check_stamp, looked_at, unreadable
from penstock.offload.header import (
    MAX_HEADER_BYTES,
    Header,
    HeaderFault,
    check_name,
    faults_of,
    parse_object,
    read_header,
)
from penstock.offload.shards import check_complete, one_set, shard_set
from penstock.offload.strangers import START_BYTES, stranger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STEMS = ("model", "diffusion_pytorch_model")
PICKLES = (".bin", ".ckpt", ".pth", ".pt", ".pkl")
_PICKLE_MAGIC = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
_CONVERT = (
    'Convert it where you trust it: python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.clone() for k, v in torch.load('FILE', weights_only=True).items()}, "
    "'FILE.safetensors')\", or download the safetensors version."
)


def torch_dtype(tag: str) -> torch.dtype:
    """Return the torch type of a safetensors tag (``"BF16"``, ``"F8_E4M3"``, ...).

    Raises:
        TensorMismatch: the tag names a packed type, which has no torch type of its own.
    """
    if tag not in TORCH_NAMES:
        raise TensorMismatch(
            "no torch dtype holds these elements",
            expected=", ".join(TORCH_NAMES),
            found=tag,
            remedy="Packed types are read as bytes and unpacked by their format.",
        )
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tag])
    return dtype


def view_as_stored(flat: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return the bytes (uint8, 1-D) as the tensor they store, uncopied; packed types stay flat
    bytes."""
    return flat.view(torch_dtype(dtype)).view(shape) if dtype in TORCH_NAMES else flat


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``nbytes`` at ``offset`` (absolute) of ``file``.

    Attributes:
        dtype: safetensors tag, or the tag of a packed type.
        stamp: what the file was when its header was read; None if nobody looked.
    """

    name: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stamp: FileStamp | None = field(default=None, repr=False)


class Checkpoint(Mapping[str, TensorEntry], Closing):
    """The tensors of a checkpoint by name, in the order of files and bytes.

    Attributes:
        path: what was opened: a file, or an index.
        files: every file that holds tensors, with its stamp.
        metadata: text from the header; for a sharded checkpoint, from all headers together.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, TensorEntry],
        files: Mapping[Path, FileStamp],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self.files = MappingProxyType(dict(files))
        self.metadata = MappingProxyType(dict(metadata))
        self._entries = dict(entries)
        self._open_files: dict[Path, WeightFile] = {}
        self._stack = ExitStack()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of ``path``.

        Args:
            path: one ``.safetensors``, a sharded ``*.index.json``, or a folder that holds one of
                them (``model.*`` or ``diffusion_pytorch_model.*``, also with one variant such as
                ``.fp16``; a single file wins over an index; else the only ``.safetensors``, or the
                only set of shards). A shard stands for its set.

        Raises:
            HeaderError: a header or an index is damaged, lies or belongs to something else.
            PickleRefused: there are only pickles.
            CheckpointError: nothing is there, or more than one candidate.
        """
        with looked_at(path):
            if path.is_dir():
                path = find_checkpoint(path)
        if path.name.endswith(".json"):
            return _open_sharded(path)
        files = shard_set(path)
        if len(files) > 1:
            check_complete(path.parent, files)
        return _open_files(path, files)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str) -> Tensor:
        """Read the tensor ``name`` into new memory on the CPU (packed types as flat uint8).

        Raises:
            CheckpointChanged: the file was truncated or touched since it was opened.
        """
        import torch

        entry = self._entries[name]
        flat = torch.empty(entry.nbytes, dtype=torch.uint8)
        file = self._file(entry.file)
        file.read_into(flat.numpy().data, entry.offset)
        file.check_unchanged()
        return view_as_stored(flat, entry.dtype, entry.shape)

    def read_rows(self, name: str, rows: Sequence[int] | Tensor) -> Tensor:
        """Read the ``rows`` of the tensor ``name`` along its first dimension; nothing else is read.

        Args:
            rows: row numbers in any order, repeats allowed.

        Returns:
            Tensor ``(len(rows), *shape[1:])`` on the CPU.

        Raises:
            TensorMismatch: the tensor has no rows, or not that one.
            CheckpointChanged: the file was truncated or touched since it was opened.
        """
        import torch

        entry = self._entries[name]
        wanted = [int(row) for row in rows]
        count = entry.shape[0] if entry.shape and entry.dtype in TORCH_NAMES else 0
        outside = next((row for row in wanted if not 0 <= row < count), None)
        if outside is not None:
            raise TensorMismatch(
                f"{name} has no such row", expected=f"0 to {count - 1}", found=str(outside)
            )
        row_bytes = entry.nbytes // max(count, 1)
        flat = torch.empty(len(wanted) * row_bytes, dtype=torch.uint8)
        target, file = flat.numpy().data, self._file(entry.file)
        for place, row in enumerate(wanted):
            slot = target[place * row_bytes : (place + 1) * row_bytes]
            file.read_into(slot, entry.offset + row * row_bytes)
        file.check_unchanged()
        return view_as_stored(flat, entry.dtype, (len(wanted), *entry.shape[1:]))

    def check_unchanged(self) -> None:
        """Raise CheckpointChanged if a file was truncated, replaced or touched since opening."""
        for path, stamp in self.files.items():
            try:
                status = path.stat()
            except OSError as error:
                raise unreadable(path, error) from error
            check_stamp(path, status, stamp)

    def _file(self, path: Path) -> WeightFile:
        if path not in self._open_files:
            file = WeightFile(path, self.files[path])
            self._open_files[path] = self._stack.enter_context(file)
        return self._open_files[path]

    def close(self) -> None:
        """Close the files; the entries stay, and a later read opens them again."""
        self._open_files.clear()
        self._stack.close()


def find_checkpoint(folder: Path) -> Path:
    """Find the file or index that makes ``folder`` a checkpoint; see `Checkpoint.open` for the
    rules.

    Raises:
        PickleRefused: there are only pickles.
        CheckpointError: nothing is there, or more than one candidate.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for variant in ("", r"\.[A-Za-z0-9_]+"):
        found = [name for stem in _STEMS for name in _candidates(stem, variant, names)[:1]]
        if variant:
            found = [name for stem in _STEMS for name in _candidates(stem, variant, names)]
        if found:
            return folder / _only(folder, found)
    loose = [name for name in names if name.endswith(".safetensors")]
    if one_set(loose):
        return folder / loose[0]
    if loose:
        return folder / _only(folder, loose)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise pickle_refused(folder / pickles[0])
    raise CheckpointError(
        f"{folder} holds no weights",
        expected="model.safetensors, diffusion_pytorch_model.safetensors or their .index.json",
        found=", ".join(names[:5]) or "an empty folder",
        remedy="Check the path, or finish the download.",
    )


def _candidates(stem: str, variant: str, names: Sequence[str]) -> list[str]:
    """Return the names of this stem and variant: single files before indexes."""
    single = re.compile(rf"{stem}{variant}\.safetensors")
    index = re.compile(
        rf"{stem}{variant}\.safetensors\.index\.json|{stem}\.safetensors\.index{variant}\.json"
    )
    return [name for pattern in (single, index) for name in names if pattern.fullmatch(name)]


def _only(folder: Path, names: Sequence[str]) -> str:
    if len(names) > 1:
        raise CheckpointError(
            f"{folder} holds more than one checkpoint",
            expected="one",
            found=", ".join(names),
            remedy="Name the file you mean.",
        )
    return names[0]


def _open_files(path: Path, files: Sequence[Path]) -> Checkpoint:
    entries: dict[str, TensorEntry] = {}
    stamps: dict[Path, FileStamp] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header, stamps[file] = _open_header(file)
        metadata |= header.metadata
        for name, found in _entries(file, stamps[file], header).items():
            with faults_of(path):
                if name in entries:
                    raise HeaderFault(f"{name} once", f"{entries[name].file.name} and {file.name}")
            entries[name] = found
    return Checkpoint(path, entries, stamps, metadata)


def _open_header(path: Path) -> tuple[Header, FileStamp]:
    if path.name.endswith(PICKLES):
        raise pickle_refused(path)
    with WeightFile(path) as file:
        start = bytearray(min(9, file.stamp.size))
        file.read_into(memoryview(start), 0)
        # A header length may begin with the same bytes as a pickle; a header begins with "{".
        if _PICKLE_MAGIC.match(start) and start[8:9] != b"{":
            raise pickle_refused(path)
        try:
            return read_header(file), file.stamp
        except HeaderError as error:
            raise _stranger(file) or error from None


def _stranger(file: WeightFile) -> HeaderError | None:
    """Return the error for a file that never was one of weights."""
    start = bytearray(min(START_BYTES, file.stamp.size))
    file.read_into(memoryview(start), 0)
    return stranger(file.path, bytes(start), file.stamp.size)


def _entries(path: Path, stamp: FileStamp, header: Header) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(
            name=name,
            file=path,
            offset=header.data_start + tensor.start,
            dtype=tensor.dtype,
            shape=tensor.shape,
            nbytes=tensor.end - tensor.start,
            stamp=stamp,
        )
        for name, tensor in header.tensors.items()
    }


def _open_sharded(path: Path) -> Checkpoint:
    with faults_of(path):
        weight_map = _read_index(path)
    shards = sorted(set(weight_map.values()))
    check_complete(path.parent, [path.parent / s for s in shards if not s.endswith(PICKLES)])
    checkpoint = _open_files(path, [path.parent / shard for shard in shards])
    lost = [name for name in weight_map if name not in checkpoint]
    unknown = [name for name in checkpoint if name not in weight_map]
    for names, what in ((lost, "missing from the shards"), (unknown, "not in the index")):
        if names:
            raise TensorMismatch(
                f"{path} and its shards do not agree",
                expected=f"the same {len(weight_map)} tensors",
                found=f"{len(names)} {what}, the first is {names[0]}",
                remedy="Download the folder again: index and shards come from different versions.",
            )
    with faults_of(path):
        _check_places(checkpoint, weight_map)
    return checkpoint


def _check_places(checkpoint: Checkpoint, weight_map: Mapping[str, str]) -> None:
    for name, shard in weight_map.items():
        found = checkpoint[name].file.name
        if found != shard:
            raise HeaderFault(f"{name} in {shard}", f"it is in {found}")


def _read_index(path: Path) -> dict[str, str]:
    with WeightFile(path) as file:
        if file.stamp.size > MAX_HEADER_BYTES:
            raise HeaderFault(f"an index of at most {MAX_HEADER_BYTES:,} bytes", file.stamp.size)
        text = bytearray(file.stamp.size)
        file.read_into(memoryview(text), 0)
    # Libraries write the total size (which nobody reads) as a float now and then.
    weight_map: Any = parse_object(bytes(text), fractions=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderFault("a weight_map from tensors to shards", weight_map)
    for name, shard in weight_map.items():
        check_name(name)
        if not isinstance(shard, str):
            raise HeaderFault(f"the file name of {name}", shard)
        check_name(shard)
        if "/" in shard:
            raise HeaderFault("shards beside the index", shard)
    return weight_map


def pickle_refused(path: Path, elsewhere: str = "") -> PickleRefused:
    """Return the error for a pickle.

    Args:
        elsewhere: a sentence that says where the same weights are found as safetensors.
    """
    return PickleRefused(
        f"{path} is a pickle, which can run any code when it is opened",
        expected="safetensors",
        found=path.suffix or "a pickle's first bytes",
        remedy=f"{elsewhere} {_CONVERT}".strip(),
    )
