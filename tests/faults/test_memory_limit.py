"""A process whose memory is limited by the system to 60-120 % of the plan (``make faults``): by
RLIMIT_AS, which refuses an allocation, and by a cgroup, which kills."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.run.events import Replanned
from penstock.engine.store.journal import read_record
from penstock.errors import OutOfMemory
from tests.engine.run.test_resume import a_request, an_engine

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as on Linux"),
]

REQUEST = a_request(None, steps=2, guidance_scale=1.0)
THREADS_BYTES = 128 << 20
"""Address space of stacks and malloc arenas of the threads: not memory, but limited with it."""

FINISHED, SHRUNK, RESUMABLE, KILLED = 0, 1, 2, 3
NAMES = {
    FINISHED: "finished",
    SHRUNK: "finished smaller",
    RESUMABLE: "ended resumable",
    KILLED: "killed by the system, and resumable",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model of 0.8 GB, all of whose blocks are resident in the plan."""
    folder = write_tiny_model(
        tmp_path_factory.mktemp("large"),
        image_to_video=False,
        vae={"base_dim": 8},
        transformer={
            "num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 6144, "num_layers": 14,
        },
    )  # fmt: skip
    with an_engine(folder, vram="2GiB", ram="2GiB") as engine:
        yield engine


def address_space_bytes() -> int:
    """What RLIMIT_AS counts."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def limit_address_space(room_bytes: int) -> None:
    """This process gets no more than ``room_bytes`` from now on."""
    limit = address_space_bytes() + THREADS_BYTES + room_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limited(
    engine: Engine,
    latents: torch.Tensor,
    folder: Path,
    percent: int,
    limit: Callable[[int], None] = limit_address_space,
) -> int:
    """Run the job in a child that calls ``limit`` with its room; returns one of `NAMES`."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            plan = engine.plan(REQUEST, saved=True)
            limit((plan.peak_vram_bytes + plan.peak_ram_bytes) * percent // 100)
            code = _run(engine, latents, folder)
        finally:
            if code == 99:
                import traceback

                traceback.print_exc()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"killed by signal {os.WTERMSIG(status)}"
        return KILLED
    return os.WEXITSTATUS(status)


def _run(engine: Engine, latents: torch.Tensor, folder: Path) -> int:
    job = engine.submit(REQUEST, job_dir=folder)
    smaller = [event for event in job.events() if isinstance(event, Replanned)]
    try:
        result = job.result()
    except OutOfMemory:
        return RESUMABLE
    assert torch.equal(result.latents, latents)
    return SHRUNK if smaller else FINISHED


def outcomes(
    engine: Engine, folder: Path, limit: Callable[[int], None], percents: range
) -> dict[int, int]:
    """What comes of the job under each limit; one that ended early is continued without any."""
    latents = engine.submit(REQUEST).result().latents
    told = {}
    for percent in percents:
        code = limited(engine, latents, folder / f"{percent}", percent, limit)
        assert code in NAMES, f"{percent} %"
        told[percent] = code
        if code in (RESUMABLE, KILLED):
            state = "failed" if code == RESUMABLE else "running"
            assert read_record(folder / f"{percent}").state == state
            result = engine.resume(folder / f"{percent}", allow_nonidentical=True).result()
            assert torch.allclose(result.latents, latents, atol=1e-4)
    print("\nlimit in % of the plan: " + ", ".join(f"{p} {NAMES[c]}" for p, c in told.items()))
    return told


def test_address_space_of_60_to_120_percent_of_the_plan(engine: Engine, tmp_path: Path) -> None:
    told = outcomes(engine, tmp_path, limit_address_space, range(10, 121, 10))
    assert KILLED not in told.values()
    assert all(code == FINISHED for percent, code in told.items() if percent >= 100)


@dataclass(frozen=True)
class MemoryCgroup:
    """A new cgroup below this process's own, of version 2 or 1."""

    folder: Path
    limit_file: str

    @classmethod
    def make(cls) -> MemoryCgroup:
        """Skips the test where none can be made."""
        parent, limit_file = cls._parent()
        if limit_file == "memory.max":
            given = (parent / "cgroup.subtree_control").read_text().split()
            if "memory" not in given:
                pytest.skip(f"{parent} gives its children no memory controller")
        group = parent / f"penstock-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup can be made in {parent}: {error}")
        return cls(group, limit_file)

    @staticmethod
    def _parent() -> tuple[Path, str]:
        root = Path("/sys/fs/cgroup")
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers == "" and (root / "cgroup.controllers").exists():
                return root / own.lstrip("/"), "memory.max"
            if "memory" in controllers.split(","):
                return root / "memory" / own.lstrip("/"), "memory.limit_in_bytes"
        pytest.skip("no memory cgroup")

    def limit(self, room_bytes: int) -> None:
        """This process joins, and what it takes from now on is limited."""
        (self.folder / self.limit_file).write_text(str(room_bytes))
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def memory_cgroup() -> Iterator[MemoryCgroup]:
    group = MemoryCgroup.make()
    yield group
    group.folder.rmdir()


def test_cgroup_of_60_to_120_percent_of_the_plan(
    engine: Engine, tmp_path: Path, memory_cgroup: MemoryCgroup
) -> None:
    """A cgroup has no refusal: what is over its limit is killed, and its job continues."""

    def limit(room_bytes: int) -> None:
        memory_cgroup.limit(THREADS_BYTES + room_bytes)

    told = outcomes(engine, tmp_path, limit, range(20, 121, 20))
    assert KILLED in told.values()
    assert all(code == FINISHED for percent, code in told.items() if percent >= 100)
