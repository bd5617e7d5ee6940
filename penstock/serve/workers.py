"""Workers on this machine's devices, or on those of a Ray cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.errors import UsageError
from penstock.profiles.hardware import probe
from penstock.profiles.options import Options
from penstock.profiles.policy import AUTO
from penstock.profiles.profile import choose, load
from penstock.serve.crew import ProcessWorker, Worker

_DEVICE = re.compile(r"cpu|(?:cuda:)?(\d{1,3})")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Models:
    """What all workers of a door know.

    Attributes:
        places: models by name.
        options: of every job; memory of this machine is shared out already (`shared_out`).
        cache: where packs are kept; None: as everywhere.
    """

    places: Mapping[str, str]
    options: Options
    cache: Path | None = None


@dataclass(frozen=True)
class Device:
    """Where a worker computes.

    Attributes:
        name: for people, such as "cuda:1" or "cpu".
        index: of the card among those that this process may use; None: the CPU.
    """

    name: str
    index: int | None

    def environment(self, of: Mapping[str, str]) -> dict[str, str]:
        """Return what its process is told by variables, where this one has ``of``: that card
        alone."""
        if self.index is None:
            return {}
        seen = [each.strip() for each in of.get(_VISIBLE, "").split(",") if each.strip()]
        if not seen:
            return {_VISIBLE: str(self.index)}
        if self.index >= len(seen):
            raise UsageError(
                f"there is no device {self.index}",
                expected=f"one of the {len(seen)} in {_VISIBLE}",
                found=",".join(seen),
            )
        return {_VISIBLE: seen[self.index]}


def devices_of(text: str) -> list[Device]:
    """Return the devices from such as "0,1", "cuda:0,cuda:1" or "cpu,cpu".

    Raises:
        UsageError: something else, or the same card twice.
    """
    found: list[Device] = []
    for word in text.split(","):
        match = _DEVICE.fullmatch(word.strip().lower())
        if match is None:
            raise UsageError(
                "not a list of devices", expected='such as "0,1" or "cpu,cpu"', found=text
            )
        index = None if match[1] is None else int(match[1])
        found.append(Device("cpu" if index is None else f"cuda:{index}", index))
    cards = [device.index for device in found if device.index is not None]
    if len(set(cards)) < len(cards):
        raise UsageError("a GPU is listed twice", expected="each once", found=text)
    if 0 < len(cards) < len(found):
        raise UsageError("GPUs and the CPU cannot be mixed", expected="either of them", found=text)
    return found


def shared_out(options: Options, workers: int, device: str) -> Options:
    """Return ``options`` for each of several workers of one machine: host memory that no option
    names is divided among them. No device is asked, and nothing heavy imported.

    Args:
        workers: on the machine.
        device: "cuda" or "cpu", where VRAM is host memory too.
    """
    if workers < 2:
        return options
    hardware = probe("cpu")  # whose VRAM and RAM are halves of what the host has free
    if device != "cpu":
        hardware = replace(hardware, ram_bytes=hardware.ram_bytes + hardware.vram_bytes)
    hardware = choose(load(options.profile or AUTO), options, hardware).hardware
    if options.ram is None:
        options = replace(options, ram=hardware.ram_bytes // workers)
    if options.vram is None and device == "cpu":
        options = replace(options, vram=hardware.vram_bytes // workers)
    return options


def threads_each(workers: int) -> int:
    """Return the threads that each of several workers may compute with: their sum is the machine's
    cores."""
    return max(1, (os.cpu_count() or 1) // workers)


def on_devices(models: Models, devices: Sequence[Device]) -> list[Worker]:
    """Return a process on each device.

    Raises:
        UsageError: a card that is not there.
    """
    bound = {} if _THREADS in os.environ or len(devices) < 2 else {
        _THREADS: str(threads_each(len(devices)))
    }  # fmt: skip
    return [
        ProcessWorker(
            models.places,
            models.options,
            models.cache,
            env=bound | device.environment(os.environ),
            name=_name(device, place, devices),
        )
        for place, device in enumerate(devices)
    ]


def _name(device: Device, place: int, devices: Sequence[Device]) -> str:
    many = device.index is None and len(devices) > 1
    return f"{device.name} {place + 1}" if many else device.name


@dataclass(frozen=True)
class Crowd:
    """Who shall do the jobs.

    Attributes:
        devices: of this machine, or of a Ray cluster without accelerators; None: one worker on the
            device that the options name, or one on each of the cluster's accelerators.
        ray: address of a cluster (`penstock.serve.cluster.connected`); None: no Ray.
    """

    devices: Sequence[Device] | None = None
    ray: str | None = None

    @classmethod
    def of(cls, devices: str | None, ray: str | None) -> Crowd:
        """Make it from what flags say.

        Raises:
            UsageError: not a list of devices, or cards by number with Ray, which chooses itself.
        """
        found = None if devices is None else devices_of(devices)
        if ray is not None and found is not None and found[0].index is not None:
            raise UsageError(
                "--devices cannot list GPUs with --ray: Ray finds them",
                expected='--devices "cpu,cpu", or none',
                found=devices,
            )
        return cls(found, ray)

    def shared_out(self, options: Options) -> Options:
        """Return ``options`` for each worker, the kind of its device among them (`shared_out`)."""
        if self.devices is None:
            return options
        device = "cpu" if self.devices[0].index is None else "cuda"
        if options.device is None:
            options = replace(options, device=device)
        return shared_out(options, len(self.devices), device)

    @contextmanager
    def workers(
        self, places: Mapping[str, str], options: Options, cache: Path | None = None
    ) -> Iterator[Sequence[Worker]]:
        """Provide the workers, none of them started; with Ray, connected until the context ends.

        Args:
            places: models by name.
            options: of every job, shared out.
            cache: where packs are kept; None: as everywhere.

        Raises:
            UsageError: a card that is not there; Ray is not installed, or there is no such cluster.
        """
        models = Models(places, options, cache)
        if self.ray is not None:
            from penstock.serve.cluster import connected, on_ray

            ray = connected(self.ray)
            try:
                yield on_ray(ray, models, None if self.devices is None else len(self.devices))
            finally:
                ray.shutdown()
        elif self.devices is None:
            yield [ProcessWorker(places, options, cache)]
        else:
            yield on_devices(models, self.devices)
