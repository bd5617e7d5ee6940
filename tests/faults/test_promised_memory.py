"""A process that may take 5 % more than what a report promised for it finishes (``make faults``):
jobs of random budgets, by RLIMIT_AS and by a memory cgroup where one can be made."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.machine.memory import resident_bytes
from penstock.engine.request.demo import MINI, demo_settings
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.settings import resolve
from penstock.engine.run.events import Replanned
from penstock.errors import OverBudget
from penstock.profiles.plan import Plan
from tests.engine.run.test_resume import a_request
from tests.faults.test_memory_limit import (
    MemoryCgroup,
    limit_address_space,
    memory_cgroup,  # noqa: F401
)

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux"),
]
JOBS = int(os.environ.get("PENSTOCK_TEST_JOBS", "50"))
SLACK = 1.05


@dataclass(frozen=True)
class Subject:
    """What runs: a model, a request, and what its process takes beside the buffers."""

    folder: Path
    request: GenerationRequest
    beside_bytes: int

    def promised_bytes(self, plan: Plan) -> int:
        """Of the process in all, as `penstock plan` tells it for a CPU."""
        return max(each.ram_bytes + each.vram_bytes for each in plan.phases) + self.beside_bytes


def demo() -> tuple[Path, GenerationRequest]:
    with Engine.open(MINI, device="cpu", vram="1GiB", ram="1GiB") as engine:
        request = resolve(demo_settings(), engine.model)
    return MINI, request


def large(folder: Path) -> tuple[Path, GenerationRequest]:
    """1 GB of blocks."""
    shape = {
        "num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 6144, "num_layers": 18,
    }  # fmt: skip
    write_tiny_model(folder, image_to_video=False, vae={"base_dim": 8}, transformer=shape)
    return folder, a_request(None, steps=2, guidance_scale=1.0)


@pytest.fixture(scope="module", params=["demo", "1 GB"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder, asked = (
        demo() if request.param == "demo" else large(tmp_path_factory.mktemp("large") / "model")
    )
    with Engine.open(folder, device="cpu", vram="2GiB", ram="2GiB") as engine:
        engine.submit(asked).result()  # libraries are mapped: their address space is not memory
    readable, writable = os.pipe()

    def measured() -> int:
        with Engine.open(folder, device="cpu", vram="2GiB", ram="2GiB") as engine:
            report = engine.submit(asked).result().report
        os.write(writable, str(report.beside_bytes).encode())
        return 0

    assert child(measured) == 0
    return Subject(folder, asked, int(os.read(readable, 64)))


def child(body: Callable[[], int]) -> int:
    """The exit code of a fork that does ``body``."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = body()
        finally:
            if code == 99:
                import traceback

                traceback.print_exc()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return 90 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def plans(subject: Subject, rng: random.Random, saved: bool) -> Iterator[tuple[str, str, Plan]]:
    """Random budgets that can be met, down to the smallest, and their plans."""
    with Engine.open(subject.folder, device="cpu", vram="2GiB", ram="2GiB") as engine:
        whole = engine.plan(subject.request, saved=saved)
    while True:
        shares = (rng.uniform(0.02, 1.1), rng.uniform(0.02, 1.1))
        vram = f"{max(1, int(shares[0] * whole.peak_vram_bytes))}"
        ram = f"{max(1, int(shares[1] * whole.peak_ram_bytes))}"
        try:
            with Engine.open(subject.folder, device="cpu", vram=vram, ram=ram) as engine:
                yield vram, ram, engine.plan(subject.request, saved=saved)
        except OverBudget:
            continue


def test_address_space_of_what_was_promised(subject: Subject) -> None:
    found, smaller = plans(subject, random.Random(1), saved=False), 0
    for number in range(JOBS):
        vram, ram, plan = next(found)
        promised = subject.promised_bytes(plan)

        def limited(vram: str = vram, ram: str = ram, promised: int = promised) -> int:
            limit_address_space(int(SLACK * promised) - resident_bytes())
            with Engine.open(subject.folder, device="cpu", vram=vram, ram=ram) as engine:
                job = engine.submit(subject.request)
                smaller = any(isinstance(event, Replanned) for event in job.events())
                job.result()
            return int(smaller)

        code = child(limited)
        assert code in (0, 1), f"job {number}: {vram} and {ram} bytes"
        smaller += code
    print(f"\n{JOBS} jobs of random budgets under RLIMIT_AS at {SLACK} of what was promised for "
          f"the process: all finished, {smaller} under a smaller plan")  # fmt: skip
    assert smaller == 0


def test_a_cgroup_of_what_was_promised(
    subject: Subject,
    tmp_path: Path,
    memory_cgroup: MemoryCgroup,  # noqa: F811
) -> None:
    """The command as a person runs it, in a group of its own from its first instruction."""
    own = {"PENSTOCK_DATA_DIR": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    given = ["--model", str(subject.folder), *words(subject.request), "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "penstock.cli.main", "generate", *given]

    def run(vram: str, ram: str, limit: Callable[[], None] | None) -> dict[str, Any]:
        output = ["--vram", vram, "--ram", ram, "-o", str(tmp_path / "x.mp4"), "--force"]
        done = subprocess.run(
            [*command, *output], capture_output=True, text=True, check=False, preexec_fn=limit,
            env=os.environ | own,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-1500:]}"
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    run("2GiB", "2GiB", None)
    (kept,) = (tmp_path / "data").rglob("memory.json")
    found, most = plans(subject, random.Random(2), saved=True), 0.0
    for _ in range(JOBS // 2):
        vram, ram, plan = next(found)
        beside = json.loads(kept.read_text())["cpu"]
        promised = replace(subject, beside_bytes=beside).promised_bytes(plan)
        bound = int(SLACK * promised)
        report = run(vram, ram, lambda bound=bound: memory_cgroup.limit(bound))["report"]
        most = max(most, report["process_peak_bytes"] / promised)
    print(f"\n{JOBS // 2} jobs of random budgets in a cgroup of {SLACK} of what was promised for "
          f"the process: all finished; the most that one took is {most:.3f} of it")  # fmt: skip
    assert most <= SLACK


def words(request: GenerationRequest) -> list[str]:
    """The flags of a request."""
    flags = {
        "--prompt": request.prompt, "--size": f"{request.width}x{request.height}",
        "--frames": request.frames, "--steps": request.steps, "--cfg": request.guidance_scale,
        "--seed": request.seed or 0, "--fps": request.fps,
    }  # fmt: skip
    picture = [] if request.image is None else ["--image", str(request.image)]
    return [*picture, *(str(word) for pair in flags.items() for word in pair)]
