"""A process whose memory is limited by the system to 60-120 % of the plan (``make faults``)."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.events import Replanned
from penstock.engine.journal import read_record
from penstock.engine.synthetic import write_tiny_model
from penstock.errors import OutOfMemory
from tests.engine.test_resume import a_request, an_engine

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as on Linux"),
]

REQUEST = a_request(None, steps=2, guidance_scale=1.0)
THREADS_BYTES = 128 << 20
"""Address space of stacks and malloc arenas of the threads: not memory, but limited with it."""

FINISHED, SHRUNK, RESUMABLE = 0, 1, 2
NAMES = {FINISHED: "finished", SHRUNK: "finished smaller", RESUMABLE: "ended resumable"}


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


def limited(engine: Engine, latents: torch.Tensor, folder: Path, percent: int) -> int:
    """Run the job in a child under a limit; returns one of `NAMES`."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            plan = engine.plan(REQUEST)
            room = (plan.peak_vram_bytes + plan.peak_ram_bytes) * percent // 100
            limit = address_space_bytes() + THREADS_BYTES + room
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            code = _run(engine, latents, folder)
        finally:
            if code == 99:
                import traceback

                traceback.print_exc()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFSIGNALED(status), f"killed by signal {os.WTERMSIG(status)}"
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


def test_limits_of_60_to_120_percent_of_the_plan(engine: Engine, tmp_path: Path) -> None:
    latents = engine.submit(REQUEST).result().latents
    told = {}
    for percent in range(10, 121, 10):
        code = limited(engine, latents, tmp_path / f"{percent}", percent)
        assert code in NAMES, f"{percent} %"
        told[percent] = code
        if code == RESUMABLE:
            assert read_record(tmp_path / f"{percent}").state == "failed"
            result = engine.resume(tmp_path / f"{percent}", allow_nonidentical=True).result()
            assert torch.allclose(result.latents, latents, atol=1e-4)
    print("\nlimit in % of the plan: " + ", ".join(f"{p} {NAMES[c]}" for p, c in told.items()))
    assert all(code == FINISHED for percent, code in told.items() if percent >= 100)
