"""What other programs say of this machine; nothing where they are not installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def output(*command: str) -> str:
    """Return what a program prints; "" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def nvidia_smi(device: torch.device, fields: Sequence[str]) -> dict[str, str]:
    """Return what NVIDIA's own tool says of a GPU, by the names that it has for its ``fields``.

    It counts GPUs in another order than torch, and others too (CUDA_VISIBLE_DEVICES): so the one
    that is meant is named by its UUID, which torch tells since 2.5.
    """
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = str(device.index or 0) if uuid is None else f"GPU-{uuid}"
    flags = ("--format=csv,noheader,nounits", f"--query-gpu={','.join(fields)}", f"--id={which}")
    words = [word.strip() for word in output("nvidia-smi", *flags).split(",") if word.strip()]
    return dict(zip(fields, words, strict=True)) if len(words) == len(fields) else {}
