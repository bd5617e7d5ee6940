"""Snapshots of the Hugging Face hub, by huggingface_hub: its cache, progress bar and resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Fetch: TypeAlias = Callable[[str, bool], Path]
"""``fetch(hub id, offline)`` gives the folder of a snapshot; FileNotFoundError where there is none
in the local cache (offline), ConnectionError where there is no way to the hub."""


def hub_snapshot(model: str, offline: bool) -> Path:
    """Return the snapshot folder of a hub id (``name`` or ``name@revision``); pickles are left out.

    Raises:
        FileNotFoundError: not in the cache, or no such repository.
        ConnectionError: no way to the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = model.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                local_files_only=offline,
                ignore_patterns=["*.pth", "*.pt", "*.bin", "*.ckpt", "*.msgpack", "*.h5"],
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise FileNotFoundError(str(error)) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if offline:
            raise FileNotFoundError(str(error)) from error
        raise ConnectionError(str(error)) from error
