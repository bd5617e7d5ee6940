"""What determines a result to the bit, as plain values: a resume compares them.

Bit-identity is promised only where all of it is the same: library versions, the device and its
driver, the numerics that were chosen, and the model's files.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from penstock._version import __version__
from penstock.engine.machine.programs import nvidia_smi
from penstock.engine.software import package_version
from penstock.engine.store.digest import stamp
from penstock.engine.store.sums import FileSum
from penstock.errors import FingerprintMismatch

log = logging.getLogger(__name__)

SUM = "xxh3_128"
"""Of every byte of a large file, beside its samples in a fingerprint."""

Fingerprint = dict[str, Any]
Difference = tuple[str, object, object]


def fingerprint(
    device: torch.device, numerics: Mapping[str, Any], files: Iterable[tuple[str, Path]]
) -> Fingerprint:
    """Return the fingerprint of a job.

    Args:
        device: where it computes.
        numerics: what was chosen and alters rounding: dtypes, attention backend, chunk.
        files: ``(name, path)`` of all that is read: weights, the picture.

    Raises:
        StorageError: a file cannot be read.
    """
    return {
        "versions": _versions(),
        "device": _device(device),
        "numerics": _switches() | dict(numerics),
        "files": {name: stamp(path) for name, path in files},
    }


def with_sums(now: Mapping[str, Any], sums: Mapping[str, FileSum]) -> Fingerprint:
    """Return ``now`` with checksums of whole files, by their names."""
    files = {
        name: entry | ({SUM: sums[name].value} if name in sums else {})
        for name, entry in now["files"].items()
    }
    return {**now, "files": files}


def compare_fingerprint(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return the fields that differ, as ``(dotted name, old, new)``, sorted by name."""
    then, now = dict(_flat(old)), dict(_flat(new))
    return [
        (field, then.get(field), now.get(field))
        for field in sorted(then.keys() | now.keys())
        if (field in then, then.get(field)) != (field in now, now.get(field))
    ]


def check_fingerprint(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    paths: Mapping[str, Path] | None = None,
    *,
    allow_nonidentical: bool,
) -> list[Difference]:
    """Return what differs, where that is allowed.

    Args:
        old, new: fingerprints.
        paths: the files in ``new``, by name, to tell which of them have changed.
        allow_nonidentical: differences are no error.

    Raises:
        FingerprintMismatch: something differs and is not allowed to.
    """
    differences = compare_fingerprint(old, new)
    for name, then, now in differences:
        log.info("%s was %r and is %r", name, then, now)
    if differences and not allow_nonidentical:
        fields = [field for field, _, _ in differences]
        changed = [
            str(path)
            for name, path in (paths or {}).items()
            if any(field.startswith(f"files.{name}.") for field in fields)
        ]
        raise FingerprintMismatch(differences, changed)
    return differences


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(item) if isinstance(item, tuple) else item


def _versions() -> dict[str, str | int | None]:
    return {
        "penstock": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn_version(),
        "diffusers": package_version("diffusers"),
        "transformers": package_version("transformers"),
    }


def _cudnn_version() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {
            "type": device.type,
            "name": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    return {
        "type": "cuda",
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "driver": nvidia_smi(device, ["driver_version"]).get("driver_version"),
    }


def _switches() -> dict[str, Any]:
    cuda: Any = torch.backends.cuda  # untyped in torch
    cudnn = torch.backends.cudnn
    return {
        "threads": torch.get_num_threads(),
        "matmul_precision": _said(torch.get_float32_matmul_precision),
        "cudnn_tf32": _said(lambda: cudnn.allow_tf32),
        "cudnn_benchmark": cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "bf16_reduction": _said(lambda: cuda.matmul.allow_bf16_reduced_precision_reduction),
        "fp16_reduction": _said(lambda: cuda.matmul.allow_fp16_reduced_precision_reduction),
        "attention_kernels": [
            name
            for name, enabled in (
                ("flash", cuda.flash_sdp_enabled),
                ("mem_efficient", cuda.mem_efficient_sdp_enabled),
                ("cudnn", cuda.cudnn_sdp_enabled),
                ("math", cuda.math_sdp_enabled),
            )
            if enabled()
        ],
    }


def _said(switch: Callable[[], object]) -> object:
    """Return a switch of torch's; it refuses to tell where its older and newer settings were
    mixed."""
    try:
        return switch()
    except RuntimeError:
        return "older and newer settings mixed"
