"""Any file of weights, opened by its header alone: safetensors, sharded safetensors, GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import CheckpointError, PickleRefused
from penstock.offload.checkpoint import PICKLES, Checkpoint, TensorEntry, pickle_refused
from penstock.offload.files import FileStamp, looked_at
from penstock.offload.gguf import is_gguf, read_gguf
from penstock.regular import check_regular, open_regular


@dataclass(frozen=True)
class RawFile:
    """What a file holds under its own names.

    Attributes:
        path: the file, index or folder that was given.
        kind: "safetensors" or "gguf".
        entries: places of the tensors.
        metadata: of the header (of all shards together).
        stamps: the files that hold the tensors, as they were when their headers were read.
    """

    path: Path
    kind: str
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, Any]
    stamps: Mapping[Path, FileStamp]


def open_raw(path: Path) -> RawFile:
    """Read the header of ``path``: a .safetensors, an index, a folder of either, or a GGUF file.

    Raises:
        PickleRefused: a pickle.
        HeaderError: a damaged or foreign header.
        CheckpointError: there is no such file.
    """
    with looked_at(path):
        if path.is_symlink() and not path.exists():
            raise dangling(path)
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist",
                expected="a .safetensors or .gguf file, or a folder with one",
                remedy="Check the path.",
            )
        if not path.is_dir():
            check_regular(path)
        if path.is_file() and path.suffix.lower() in PICKLES:
            raise refusal_of(path)
        if path.is_file() and is_gguf(path):
            header = read_gguf(path)
            return RawFile(path, "gguf", header.entries, header.metadata, {path: header.stamp})
    with Checkpoint.open(path) as found:
        return RawFile(path, "safetensors", dict(found), found.metadata, found.files)


def dangling(path: Path) -> CheckpointError:
    """Return the error for a link to nothing."""
    return CheckpointError(
        f"{path} is a link to a file that is not there",
        expected=str(path.readlink()),
        remedy="Connect the disk that it is on, or finish the download, or make the link anew.",
    )


def refusal_of(pickle: Path) -> PickleRefused:
    """Return the error for a pickle of a model's part, which is to be had as safetensors."""
    return pickle_refused(
        pickle,
        "Get the same model as safetensors: the -Diffusers repository of Wan-AI, or Comfy-Org's "
        "repackaged files (text encoder, VAE and clip_vision_h among them).",
    )


def read_bytes(entry: TensorEntry) -> bytes:
    """Read the bytes of a small tensor.

    Raises:
        CheckpointError: the file ends before them.
    """
    with looked_at(entry.file), open_regular(entry.file) as file:
        file.seek(entry.offset)
        data = file.read(entry.nbytes)
    if len(data) != entry.nbytes:
        raise CheckpointError(
            f"{entry.file} was cut short",
            expected=f"{entry.nbytes} bytes of {entry.name}",
            found=f"{len(data)} bytes",
            remedy="Copy the file again.",
        )
    return data
