"""What this machine is and does, finding by finding, each with what to do about it."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.engine.attention.kernels import attention
from penstock.engine.attention.probe import probe as probe_attention
from penstock.engine.machine.calibrate import Effort, calibrate
from penstock.engine.software import versions
from penstock.errors import ProfileError, UsageError
from penstock.profiles.attending import BACKENDS
from penstock.profiles.hardware import Hardware, available_ram_bytes, probe
from penstock.profiles.rates import Rates, store_rates
from penstock.units import GIB, format_bytes

LITTLE_RAM_BYTES = 8 * GIB
LITTLE_DISK_BYTES = 40 * GIB
SLOW_COPY_BYTES_PER_S = 5e9
SLOW_READ_BYTES_PER_S = 1e9
LOADED = 0.5
"""Programs a processor from which on what is measured is not the machine's own."""
UNSTEADY = 1.25
"""Median seconds over the best, likewise."""


@dataclass(frozen=True)
class Finding:
    """One fact about the machine.

    Attributes:
        topic: what it is about.
        found: the fact.
        remedy: what to do, or None where all is well.
    """

    topic: str
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the measured rates, and the file they are kept in (None: nowhere; a finding
    says why)."""

    machine: str
    findings: tuple[Finding, ...]
    rates: Rates
    stored_in: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps."""
        return asdict(self) | {"stored_in": self.stored_in and str(self.stored_in)}


def examine(
    device: str = "auto", folder: Path | None = None, effort: Effort | None = None
) -> Diagnosis:
    """Look at everything, measure the rates, and keep them for the planner.

    Args:
        device: "auto", "cuda" or "cpu".
        folder: on the disk that the models are on (the temporary directory by default).

    Raises:
        UsageError: no file can be made in ``folder``; nothing has been measured.
    """
    if folder is not None:
        _check(folder)
    chosen = torch.device(_resolved(device))
    hardware = probe(chosen.type)
    effort = effort or Effort.on(chosen)
    load = _load()
    rates = calibrate(chosen, folder, effort)
    findings = [
        *_software(),
        *_device(hardware),
        *_kernels(chosen),
        *_other_attention(chosen, rates),
        *_other_products(rates),
        *_memory(),
        *_disk(folder),
        *_spill(chosen, platform.release(), sys.platform),
        *_speed(rates, chosen),
        steadiness(load, effort.spreads),
    ]
    stored = _stored(hardware.name, rates, findings)
    return Diagnosis(hardware.name, tuple(findings), rates, stored)


def _check(folder: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="penstock-doctor-"):
            pass
    except OSError as error:
        raise UsageError(
            "this disk cannot be measured",
            expected="a folder in which a file can be written and read back",
            found=f"{folder}: {error.strerror}",
        ) from error


def _load() -> float:
    """Return the programs that want a processor, for each that there is, in the last minute: with
    1, none is left to measure on."""
    import psutil

    return float(psutil.getloadavg()[0]) / (psutil.cpu_count() or 1)


def steadiness(load: float, spreads: Sequence[float]) -> Finding:
    """Return whether the rates are those of a machine that does nothing else.

    Args:
        load: as `_load` gives it, before anything was measured.
        spreads: of what was measured, as `Effort.spreads`.
    """
    widest = max(spreads, default=1.0)
    loaded = load > LOADED or widest > UNSTEADY
    return Finding(
        "steadiness",
        f"repetitions take up to {widest:.2f} of the best, which are kept; load {load:.2f} a "
        "processor before",
        "The machine is busy, and its rates may be higher: close other programs, and run penstock "
        "doctor again."
        if loaded
        else None,
    )


def _stored(machine: str, rates: Rates, findings: list[Finding]) -> Path | None:
    """Keep the rates; where that cannot be, what was measured is told all the same."""
    try:
        return store_rates(machine, rates)
    except (OSError, ProfileError) as error:
        findings.append(Finding("rates", f"not kept: {error}", _UNKEPT))
        return None


_UNKEPT = "Plans use assumed rates: set PENSTOCK_CONFIG to a folder that can be written."


def _resolved(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _software() -> Iterator[Finding]:
    yield Finding("software", ", ".join(f"{name} {found}" for name, found in versions().items()))


def _device(hardware: Hardware) -> Iterator[Finding]:
    yield Finding("device", f"{hardware.name}, {format_bytes(hardware.vram_bytes)} for a budget")
    if hardware.device == "cpu":
        yield Finding(
            "driver",
            "no CUDA device",
            "For a GPU: a CUDA build of torch and NVIDIA's driver; without one everything works, "
            "slowly.",
        )
        return
    major, minor = torch.cuda.get_device_capability()
    old = None if (major, minor) >= (7, 5) else "Turing (7.5) or newer is what penstock is for."
    yield Finding("architecture", f"sm{major}{minor}, CUDA {torch.version.cuda}", old)


def _kernels(device: torch.device) -> Iterator[Finding]:
    """Run each kernel once on the device; what it raises is the finding."""
    for name, work in _probes(device):
        try:
            finite = bool(torch.isfinite(work().float()).all())
        except (RuntimeError, ValueError, AttributeError) as error:
            yield Finding(f"kernel {name}", f"no: {str(error).splitlines()[0]}", _UNUSED)
            continue
        yield Finding(
            f"kernel {name}", "works" if finite else "gives NaN", None if finite else _UNUSED
        )


_UNUSED = "Plans do without it: --compute exact never uses it."


def _other_attention(device: torch.device, rates: Rates) -> Iterator[Finding]:
    """Yield what ``--attention`` would do here; ``rates`` have measured what works."""
    for word, backend in BACKENDS.items():
        if backend.rate is None:
            continue
        rate, what = getattr(rates, backend.rate), f"attention ({word})"
        if rate is not None:
            told = ", counted as if it attended to all" if backend.sparse else ""
            yield Finding(what, f"works, {rate / 1e12:.3g} TFLOP/s{told}")
        else:
            report = probe_attention(word, device, torch.bfloat16, 1, 128)
            yield Finding(what, f"no: {report.reason}", _OPTIONAL)


def _other_products(rates: Rates) -> Iterator[Finding]:
    """Yield what ``--compute fast`` multiplies in here, of what was measured."""
    for name in ("fp8", "int8", "nvfp4", "mxfp8"):
        rate = rates.product_flops(name)
        if rate is not None:
            yield Finding(f"products ({name})", f"works, {rate / 1e12:.3g} TFLOP/s")


_OPTIONAL = "Plans do without it unless asked: --attention sdpa, the default, is torch's own."


def _probes(device: torch.device) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    half = torch.ones(1, 64, 2, 64, device=device, dtype=torch.bfloat16)
    codes = torch.ones(32, 32, device=device, dtype=torch.int8)
    yield "attention (bf16)", lambda: attention(half, half, half)
    yield "int8 product", lambda: torch._int_mm(codes, codes)
    yield "fp8 product", lambda: _fp8_product(device)
    yield (
        "convolution (bf16)",
        lambda: torch.nn.functional.conv2d(
            torch.ones(1, 12, 8, 8, device=device, dtype=torch.bfloat16),
            torch.ones(4, 12, 3, 3, device=device, dtype=torch.bfloat16),
        ),
    )


def _fp8_product(device: torch.device) -> torch.Tensor:
    codes = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    unit = torch.ones((), device=device)
    return torch._scaled_mm(codes, codes.t(), scale_a=unit, scale_b=unit, out_dtype=torch.float32)


def _memory(root: Path = Path("/")) -> Iterator[Finding]:
    import psutil

    total, free = int(psutil.virtual_memory().total), available_ram_bytes(root)
    little = free < LITTLE_RAM_BYTES
    yield Finding(
        "host memory",
        f"{format_bytes(free)} free (control groups counted) of {format_bytes(total)}",
        "Close other programs, or let blocks stream from disk: a plan does so by itself."
        if little
        else None,
    )


def _disk(folder: Path | None) -> Iterator[Finding]:
    where = Path.cwd() if folder is None else folder
    free = shutil.disk_usage(where).free
    yield Finding(
        "disk",
        f"{format_bytes(free)} free where {where.resolve().name or where} is",
        "The 14B model takes 33 GB in bf16 and 17 GB in 8 bits."
        if free < LITTLE_DISK_BYTES
        else None,
    )


def _spill(device: torch.device, release: str, system: str) -> Iterator[Finding]:
    """On Windows and WSL the driver moves VRAM into system memory instead of failing."""
    if device.type == "cuda" and (system == "win32" or "microsoft" in release.lower()):
        yield Finding(
            "system-memory spill",
            "the driver may move VRAM into system memory, silently and slowly",
            "In NVIDIA's control panel set 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem "
            "Fallback'. penstock caps its own allocator below that in any case.",
        )
    else:
        yield Finding("system-memory spill", "none on this platform")


def _speed(rates: Rates, device: torch.device) -> Iterator[Finding]:
    attention_rate = rates.attention_flops or rates.flops
    yield Finding(
        "computing",
        f"{rates.flops / 1e12:.3g} TFLOP/s in products, {attention_rate / 1e12:.3g} in attention, "
        f"{(rates.conv_flops or rates.flops) / 1e12:.3g} in convolutions",
    )
    slow_link = device.type == "cuda" and rates.copy_bytes_per_s < SLOW_COPY_BYTES_PER_S
    yield Finding(
        "host to device",
        f"{rates.copy_bytes_per_s / 1e9:.2f} GB/s",
        "The card seems to sit in a slow slot: look for one with 8 or 16 lanes to the processor."
        if slow_link
        else None,
    )
    yield Finding(
        "disk reads",
        f"{rates.read_bytes_per_s / 1e9:.2f} GB/s",
        "Put the models on an NVMe disk, or give more RAM, so that fewer blocks stream from disk."
        if rates.read_bytes_per_s < SLOW_READ_BYTES_PER_S
        else None,
    )
