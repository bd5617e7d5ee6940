"""Every byte of a pack that is read for computing is compared with its checksum first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.files.locate import locate
from penstock.engine.model.files import ModelFiles
from penstock.engine.packs.checked import Placed, RunInspector
from penstock.engine.packs.file import PackFile, PackRun, digest
from penstock.engine.packs.pack import pack
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.jobs import describe
from penstock.errors import CheckpointError
from penstock.offload.files import WeightFile
from penstock.profiles.plan import PhasePlan, Plan, StreamPlan
from tests.engine import golden
from tests.engine.run.test_budget import _run

REQUEST = GenerationRequest(
    prompt="a red circle", negative_prompt="", width=48, height=32, frames=5, steps=3, seed=3,
    guidance_scale=1.0,
)  # fmt: skip
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = golden.write_model(folder / "m", image_to_video=False)
    pack(locate(model), "int8", folder / "int8")
    return folder / "int8"


def opened(folder: Path) -> Engine:
    return Engine.open(folder, device="cpu", vram="256MiB", ram="256MiB")


def placed(plan: Plan, stream: StreamPlan) -> Plan:
    def place(phase: PhasePlan) -> PhasePlan:
        return replace(phase, stream=stream) if phase.name == "denoise" else phase

    return replace(plan, phases=tuple(map(place, plan.phases)))


def flip(path: Path, offset: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


STREAMS = [
    StreamPlan(2, 0, 0, 1, 1),
    StreamPlan(2, 0, 2, 1, 0),
    StreamPlan(2, 1, 0, 1, 1),
    StreamPlan(2, 2, 0),
]


@pytest.mark.parametrize("stream", STREAMS, ids=["disk", "RAM", "mixed", "VRAM"])
@pytest.mark.parametrize("run", ["block 0", "block 1"])
@pytest.mark.parametrize("overlapped", [True, False])
def test_a_flipped_bit_in_a_block_is_found_wherever_the_block_lives(
    tmp_path: Path, packed: Path, run: str, stream: StreamPlan, overlapped: bool
) -> None:
    folder = shutil.copytree(packed, tmp_path / "p")
    place = PackFile.open(folder / TRANSFORMER).runs[run]
    flip(folder / TRANSFORMER, place.offset + place.nbytes // 2)
    with opened(folder) as engine:
        plan = placed(engine.plan(REQUEST), stream)
        with pytest.raises(CheckpointError, match=f"damaged.*the bytes of {run} "):
            _run(engine, REQUEST, plan, overlapped)


@pytest.mark.parametrize(
    ("file", "run"),
    [(TRANSFORMER, "rest"), (TRANSFORMER, "cross 0"), (TRANSFORMER, "cross 1"),
     (TEXT, "embedding"), (TEXT, "rest"), (TEXT, "block 1"), (VAE, "decoder")],
)  # fmt: skip
def test_a_flipped_bit_in_any_other_part_is_found(
    tmp_path: Path, packed: Path, file: str, run: str
) -> None:
    folder = shutil.copytree(packed, tmp_path / "p")
    place = PackFile.open(folder / file).runs[run]
    flip(folder / file, place.offset + place.nbytes - 1, 128)
    with (
        opened(folder) as engine,
        pytest.raises(CheckpointError, match=f"damaged.*the bytes of {run} "),
    ):
        _run(engine, REQUEST, engine.plan(REQUEST), True)


class Flipping:
    """One bit of a file comes wrong from the disk, once."""

    def __init__(self, path: Path, offset: int, after: int) -> None:
        self.path, self.offset, self.after = path, offset, after
        self._read = WeightFile.read_into

    def __call__(
        self, file: WeightFile, target: memoryview, offset: int, *, on_page: bool = False
    ) -> int:
        direct = self._read(file, target, offset, on_page=on_page)
        if file.path == self.path and offset <= self.offset < offset + len(target):
            self.after -= 1
            if self.after == -1:
                target[self.offset - offset] ^= 1
        return direct


@pytest.fixture
def uninterrupted(packed: Path) -> Iterator[torch.Tensor]:
    with opened(packed) as engine:
        yield engine.submit(REQUEST).result().latents


def test_a_job_that_reads_a_wrong_bit_stops_is_kept_and_goes_on(
    tmp_path: Path, packed: Path, uninterrupted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed / TRANSFORMER
    place = PackFile.open(path).runs["block 1"]
    stream = StreamPlan(2, 0, 0, 1, 1)
    read = Flipping(path, place.offset + 1000, after=2)
    with opened(packed) as engine, monkeypatch.context() as patch:
        patch.setattr(
            WeightFile, "read_into", lambda self, *args, **options: read(self, *args, **options)
        )
        patch.setattr(
            engine,
            "plan",
            lambda request, **how: placed(Engine.plan(engine, request, **how), stream),
        )
        with pytest.raises(CheckpointError, match="the bytes of block 1"):
            engine.submit(REQUEST, job_dir=tmp_path / "job").result()
    kept = describe(tmp_path / "job")
    assert (kept.state, kept.step, kept.steps) == ("failed", 2, 3)
    with opened(packed) as engine:
        found = engine.resume(tmp_path / "job").result().latents
    assert torch.equal(found, uninterrupted)


def test_a_pack_whose_sums_are_damaged_is_not_opened(tmp_path: Path, packed: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "p")
    flip(folder / TRANSFORMER, (folder / TRANSFORMER).stat().st_size - 40)
    with pytest.raises(CheckpointError, match="damaged.*the bytes of sums"):
        ModelFiles.open(folder)


def test_an_inspector_sees_a_run_in_any_pieces_and_nothing_beside_it() -> None:
    data = bytes(range(256)) * 40
    run = PackRun("block 0", 0, 9000, digest(data[500:9500]))
    for step in (1, 7, 4096, 10240):
        inspector = RunInspector([Placed(Path("x"), run, 500)])
        for start in range(0, len(data), step):
            inspector.feed(memoryview(data)[start : start + step], start)
        inspector.finish()
    for at in (500, 5000, 9499):
        spoiled = bytearray(data)
        spoiled[at] ^= 1
        inspector = RunInspector([Placed(Path("x"), run, 500)])
        inspector.feed(memoryview(spoiled), 0)
        with pytest.raises(CheckpointError, match="block 0"):
            inspector.finish()
