"""The pack: a plain safetensors file whose runs of tensors begin on pages and carry checksums.

The runs are placed as `packs.layout` says: a block, its cross-attention K/V projections, the rest;
last the sums, a byte tensor of text with the checksum of the header and of each run. The file is
written front to back, so the sums come last and the header never changes.

Checksums are XXH3-128 (https://xxhash.com): a modern disk gives 7 GB/s, which cryptographic hashes
do not follow on one core, and what is guarded against is damage, not forgery.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from penstock.blocks import PAGE_BYTES
from penstock.engine.files.fields import parse_object
from penstock.engine.files.storage import PACK_METADATA
from penstock.engine.packs.layout import PlacedTensor, PlannedRun, Spec, header_of, place_runs
from penstock.errors import CheckpointError, HeaderError
from penstock.offload.files import WeightFile, looked_at
from penstock.offload.header import MAX_HEADER_BYTES, Header, read_header
from penstock.regular import open_regular
from penstock.units import align_up

if TYPE_CHECKING:
    import xxhash

VERSION = 1
SUMS = "__sums__"
_DIGEST_HEX = 32
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class PackLayout:
    """Where everything in a pack goes, before any of it is made.

    Attributes:
        header: the first bytes of the file, header length included; whole pages.
        runs: in the order of their bytes.
        sums_offset, sums_bytes: place of the sums, from the start of the data.
    """

    header: bytes
    runs: tuple[PlannedRun, ...]
    sums_offset: int
    sums_bytes: int

    @property
    def data_start(self) -> int:
        """First byte of the data in the file."""
        return len(self.header)

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + self.sums_offset + self.sums_bytes


def lay_out(
    runs: Mapping[str, Mapping[str, Spec]],
    metadata: Mapping[str, Any],
    texts: Mapping[str, str] = MappingProxyType({}),
) -> PackLayout:
    """Place ``runs`` (tensors with dtype tag and shape, by run and name) one after the other.

    Args:
        metadata: what the pack says of itself, as JSON values.
        texts: further entries of the header's metadata.
    """
    placed = place_runs(runs)
    end = placed[-1].offset + placed[-1].nbytes if placed else 0
    sums_offset = align_up(end, PAGE_BYTES)
    sums_bytes = len(sums_text(b"", [b""] * len(placed)))
    table = {"version": VERSION, **metadata, "runs": {r.name: [r.offset, r.nbytes] for r in placed}}
    sums = PlacedTensor(SUMS, "U8", (sums_bytes,), sums_offset, sums_bytes)
    header = header_of(
        (*(tensor for run in placed for tensor in run.tensors), sums),
        {"format": "pt", PACK_METADATA: json.dumps(table), **texts},
    )
    return PackLayout(header, placed, sums_offset, sums_bytes)


def sums_text(header: bytes, runs: Sequence[bytes]) -> bytes:
    """Return the sums: checksums of the header and the runs in hex, a line each, and of these
    lines."""
    lines = [digest.hex().ljust(_DIGEST_HEX, "0") for digest in (header, *runs)]
    text = "\n".join(lines) + "\n"
    return (text + digest(text.encode()).hex() + "\n").encode()


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the checksum of a piece of a pack."""
    checksum = running_digest()
    checksum.update(data)
    return checksum.digest()


def running_digest() -> xxhash.xxh3_128:
    """Return a checksum that is fed piece by piece (``update``, ``digest``). xxhash is loaded with
    the first one: what reads no packs runs without it."""
    import xxhash

    return xxhash.xxh3_128()


@dataclass(frozen=True)
class PackRun:
    """A run of an existing pack: its place in the file and the checksum of its bytes."""

    name: str
    offset: int
    nbytes: int
    checksum: bytes


@dataclass(frozen=True)
class PackFile:
    """An existing pack, its header and sums already verified.

    Attributes:
        about: what the pack says of itself: component, format, source and so on.
        runs: by name, in the order of their bytes.
        sums_offset: first byte of the sums in the file.
    """

    path: Path
    about: Mapping[str, Any]
    runs: Mapping[str, PackRun]
    sums_offset: int

    @classmethod
    def open(cls, path: Path) -> PackFile:
        """Read and verify the header and the sums of ``path``.

        Raises:
            HeaderError: no safetensors file, or a damaged one.
            CheckpointError: no pack, a newer one, or damaged.
        """
        with WeightFile(path) as file:
            header = read_header(file)
            about = _about(path, header)
            raw = _read(file, 0, header.data_start)
            place = header.tensors[SUMS]
            sums = _read(file, header.data_start + place.start, place.end - place.start)
        digests = _checked_sums(path, sums, len(about["runs"]))
        if digest(raw) != digests[0]:
            raise damaged(path, "header")
        runs = {
            name: PackRun(name, header.data_start + offset, nbytes, checksum)
            for (name, (offset, nbytes)), checksum in zip(
                about["runs"].items(), digests[1:], strict=True
            )
        }
        sums_offset = header.data_start + place.start
        return cls(path, MappingProxyType(about), MappingProxyType(runs), sums_offset)


def _about(path: Path, header: Header) -> dict[str, Any]:
    if PACK_METADATA not in header.metadata or SUMS not in header.tensors:
        raise CheckpointError(
            f"{path} is not a pack", expected="a file made by penstock pack", found="another file"
        )
    try:
        about: dict[str, Any] = parse_object(header.metadata[PACK_METADATA], str(path))
        version, runs = about["version"], about["runs"]
        whole = all(
            len(place) == 2 and all(type(n) is int for n in place) for place in runs.values()
        )
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, "header") from error
    if not whole:
        raise damaged(path, "header")
    if version != VERSION:
        raise CheckpointError(
            f"{path} was made by another version of penstock",
            expected=f"pack version {VERSION}",
            found=str(version),
            remedy="Pack the model again.",
        )
    return about


def _checked_sums(path: Path, sums: bytes, runs: int) -> list[bytes]:
    lines = sums.split(b"\n")
    text = sums[: -(_DIGEST_HEX + 1)]
    try:
        digests = [bytes.fromhex(line.decode("ascii")) for line in lines[:-2]]
    except ValueError as error:
        raise damaged(path, "sums") from error
    sound = len(digests) == runs + 1 and sums == sums_text(digests[0], digests[1:])
    if not sound or not text:
        raise damaged(path, "sums")
    return digests


def _read(file: WeightFile, offset: int, nbytes: int) -> bytes:
    if nbytes > MAX_HEADER_BYTES + 8:
        raise HeaderError(f"{file.path} cannot be a pack", found=f"{nbytes:,} bytes of header")
    buffer = bytearray(nbytes)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def damaged(path: Path, what: str) -> CheckpointError:
    """Return the error for bytes that are not those that were written."""
    return CheckpointError(
        f"{path} is damaged",
        expected=f"the bytes of {what} that were packed",
        found="others (a checksum differs)",
        remedy="Pack the model again, and check the disk: `penstock verify` lists all damage.",
    )


@dataclass(frozen=True)
class Verification:
    """What `verify` found: ``damage`` names every damaged part of each file."""

    files: int
    runs: int
    nbytes: int
    damage: tuple[tuple[Path, str], ...]


def verify(path: Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check every byte of a pack, or of all packs under a folder.

    Args:
        progress: called with the bytes done and their sum.

    Raises:
        CheckpointError: there is no pack.
    """
    with looked_at(path):
        paths = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        for file in paths:
            open_regular(file).close()  # what cannot be read is not damaged
        total = sum(file.stat().st_size for file in paths)
    if not paths:
        raise CheckpointError(
            f"{path} holds no pack", expected="a file or folder made by penstock pack"
        )
    done = runs = 0
    damage: list[tuple[Path, str]] = []
    for file in paths:
        found, count = _verify_file(file, _reporter(progress, done, total))
        damage += [(file, what) for what in found]
        runs += count
        done += file.stat().st_size
    return Verification(len(paths), runs, total, tuple(damage))


def _reporter(
    progress: Callable[[int, int], None] | None, base: int, total: int
) -> Callable[[int], None]:
    def report(nbytes: int) -> None:
        if progress is not None:
            progress(base + nbytes, total)

    return report


def _verify_file(path: Path, report: Callable[[int], None]) -> tuple[list[str], int]:
    try:
        pack = PackFile.open(path)
    except HeaderError as error:
        return [f"header ({error.expected})"], 0
    except CheckpointError as error:
        return [error.expected or error.what], 0
    bad: list[str] = []
    with WeightFile(path) as file:
        end = 0
        for run in pack.runs.values():
            if end and not _is_zero(file, end, run.offset):
                bad.append(f"padding before {run.name}")
            if _digest_of(file, run, report) != run.checksum:
                bad.append(run.name)
            end = run.offset + run.nbytes
        if not _is_zero(file, end, pack.sums_offset):
            bad.append("padding at the end")
    return bad, len(pack.runs)


def _digest_of(file: WeightFile, run: PackRun, report: Callable[[int], None]) -> bytes:
    state = running_digest()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, run.nbytes)))
    for start in range(0, run.nbytes, _CHUNK_BYTES):
        piece = buffer[: min(_CHUNK_BYTES, run.nbytes - start)]
        file.read_into(piece, run.offset + start)
        state.update(piece)
        report(run.offset + start + len(piece))
    return state.digest()


def _is_zero(file: WeightFile, start: int, stop: int) -> bool:
    """Return whether the padding from ``start`` to ``stop`` is what was written."""
    if start > stop or stop - start > PAGE_BYTES:
        return False
    return not any(_read(file, start, stop - start))
