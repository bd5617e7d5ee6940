"""What the files in a job's directory are called.

job-0.json, job-1.json              request, plan, fingerprint, state; the newer file counts
conditioning.safetensors            encoded prompt and picture
state-0.safetensors, state-1...     the sampler's state after a step; likewise
picture, last-picture               copies of the request's pictures
latents.safetensors                 the final latents
tile-ROWSxCOLUMNS-N.safetensors     decoded pixels of one VAE tile
call-N.safetensors                  what one call of a network gave, where diffusers runs the loop
reserve                             disk space kept for those still to come
lock                                held while a process works on the job
ANY.JOB.new                         one that is being written; JOB begins the job's id
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from penstock.engine.store.durable import NEW_SUFFIX

JOB_FILES = ("job-0.json", "job-1.json")
STATE_FILES = ("state-0.safetensors", "state-1.safetensors")
CONDITIONING_FILE = "conditioning.safetensors"
LATENTS_FILE = "latents.safetensors"
PICTURE_FILE = "picture"
LAST_PICTURE_FILE = "last-picture"
PICTURES: Mapping[str, str] = MappingProxyType(
    {"image": PICTURE_FILE, "last_image": LAST_PICTURE_FILE}
)
"""By the entry of a job's request that tells its size and checksum."""
RESERVE_FILE = "reserve"
LOCK_FILE = "lock"

_FIXED = (
    *JOB_FILES,
    *STATE_FILES,
    CONDITIONING_FILE,
    *PICTURES.values(),
    LATENTS_FILE,
    RESERVE_FILE,
    LOCK_FILE,
)
_TILE = re.compile(r"tile-(\d+)x(\d+)-(\d+)\.safetensors")
_CALL = re.compile(r"call-(\d{1,9})\.safetensors")
_NEW = re.compile(rf"(.+)\.([0-9a-f]{{12}}){re.escape(NEW_SUFFIX)}")


def tag_of(job: str) -> str:
    """Return the part of a job's id that files being written carry in their names."""
    return job[:12]


def is_job_file(name: str) -> bool:
    """Return whether a job's directory may hold a file of this name."""
    unfinished = _NEW.fullmatch(name)
    name = name if unfinished is None else unfinished[1]
    return name in _FIXED or any(each.fullmatch(name) for each in (_TILE, _CALL))


def is_unfinished(name: str, job: str | None = None) -> bool:
    """Return whether a file of this name was being written (for ``job``), and is of no use
    since."""
    match = _NEW.fullmatch(name)
    return match is not None and is_job_file(name) and (job is None or match[2] == tag_of(job))


def is_sealed(name: str) -> bool:
    """Return whether a file of this name is a sealed document of tensors."""
    return name in (*STATE_FILES, CONDITIONING_FILE, LATENTS_FILE) or any(
        each.fullmatch(name) for each in (_TILE, _CALL)
    )


def tile_name(grid: tuple[int, int], index: int) -> str:
    """Return the file of the pixels of tile ``index`` of a grid of rows and columns."""
    return f"tile-{grid[0]}x{grid[1]}-{index}.safetensors"


def tile_of(name: str) -> tuple[tuple[int, int], int] | None:
    """Return the grid and index of the tile that a file of this name holds, if it does."""
    match = _TILE.fullmatch(name)
    if match is None:
        return None
    rows, columns, index = map(int, match.groups())
    return (rows, columns), index


def call_name(number: int) -> str:
    """Return the file of what the call of this number gave."""
    return f"call-{number}.safetensors"


def is_call(name: str) -> bool:
    """Return whether a file of this name holds what a call gave."""
    return _CALL.fullmatch(name) is not None
