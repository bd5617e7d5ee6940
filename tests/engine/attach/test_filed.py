"""`penstock.stream` of modules without weights: these go from their files to the stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import penstock
from penstock.errors import CheckpointChanged, CheckpointError, TensorMismatch, UsageError
from tests.engine.attach.test_stream import ROOM, _least
from tests.engine.attach.zoo import Walk, make
from tests.meter import StorageMeter


def _empty(build: Callable[[], Any]) -> Any:
    with init_empty_weights(include_buffers=False):
        return build()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Walk, Path]:
    """A module, and its weights in a file."""
    module = Walk()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    return module, tmp_path


def _pass(module: Walk) -> Tensor:
    with torch.no_grad():
        return module(torch.linspace(-1, 1, 32).reshape(2, 16))


def test_the_bits_of_the_loaded_module_and_no_pack(saved: tuple[Walk, Path], cache: Path) -> None:
    loaded, folder = saved
    module = _empty(Walk)
    before = {name: (id(p), p.shape) for name, p in module.named_parameters()}
    small = {"vram": _least(loaded, "blocks"), "ram": 1 << 13}
    with penstock.stream(module, "blocks", files=folder, **small) as streamed:
        for _ in range(3):
            assert torch.equal(_pass(module), _pass(loaded))
        report = streamed.report
        assert report.disk_bytes == 0 and report.host_resident < 6
        assert report.read_bytes >= 2 * report.weight_bytes
        assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert all(p.is_meta for p in module.parameters())
    assert before == {name: (id(p), p.shape) for name, p in module.named_parameters()}


def test_weights_outside_the_blocks_and_types_are_the_files(tmp_path: Path) -> None:
    """A module made in fp32 runs in what its files hold, and is as it was made in the end."""
    case = make("t5")
    module: Any = case.module.to(torch.bfloat16)
    module.save_pretrained(tmp_path)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        wanted = module(ids).last_hidden_state
    empty = _empty(lambda: type(module)(module.config.__class__.from_pretrained(tmp_path))).eval()
    empty.to(torch.float32)
    with penstock.stream(empty, "encoder.block", files=tmp_path, vram=ROOM, ram=ROOM):
        assert empty.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(empty(ids).last_hidden_state, wanted)
    assert empty.dtype == torch.float32 and empty.shared.weight.is_meta


def test_quantised_from_files_as_from_memory(saved: tuple[Walk, Path]) -> None:
    loaded, folder = saved
    with penstock.stream(loaded, "blocks", format="int8", vram=ROOM, ram=ROOM):
        wanted = _pass(loaded)
    module = _empty(Walk)
    with penstock.stream(module, "blocks", files=folder, format="int8", vram=ROOM, ram=ROOM):
        assert torch.equal(_pass(module), wanted)


def test_the_module_is_never_held_whole(saved: tuple[Walk, Path]) -> None:
    """What torch has made at most is what the budgets hold, from the first line on."""
    _, folder = saved
    small = _least(Walk(), "blocks")
    with StorageMeter() as meter:
        module = _empty(lambda: nn.ModuleDict({"walk": Walk()})["walk"])
        buffers = sum(b.nbytes for b in module.buffers())
        meter.peak = meter.live
        with penstock.stream(module, "blocks", files=folder, vram=small, ram=small) as streamed:
            _pass(module)
            report = streamed.report
    work = 16 * 2 * 4 * 8  # states and what a block makes of them
    held = report.peak_vram_bytes + report.peak_ram_bytes
    assert meter.peak <= held + buffers + 2 * 56 * 4 * 4 + work
    assert meter.peak < report.weight_bytes


def _without(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (_without("blocks.3.0.weight"), CheckpointError, r"lack 1 of 25 .*blocks\.3\.0\.weight"),
        (
            lambda t: t.update({"blocks.3.0.bias": torch.zeros(7)}),
            TensorMismatch,
            r"blocks\.3\.0\.bias does not fit.*\(32,\).*\(7,\)",
        ),
        (
            lambda t: t.update({"blocks.3.0.bias": torch.zeros(32, dtype=torch.int8)}),
            TensorMismatch,
            "does not compute in.*I8",
        ),
    ],
)
def test_files_of_something_else(
    saved: tuple[Walk, Path], spoil: Callable[[Any], object], error: type[Exception], said: str
) -> None:
    tensors = load_file(saved[1] / "model.safetensors")
    spoil(tensors)
    save_file(tensors, saved[1] / "model.safetensors")
    module = _empty(Walk)
    with pytest.raises(error, match=f"(?s){said}"):
        penstock.stream(module, "blocks", files=saved[1], vram=ROOM, ram=ROOM)
    assert all(p.is_meta and p.dtype == torch.float32 for p in module.parameters())


def test_a_module_with_its_weights_and_files(saved: tuple[Walk, Path]) -> None:
    with pytest.raises(UsageError, match=r"(?s)not streamed from files.*0\.0\.weight"):
        penstock.stream(saved[0], "blocks", files=saved[1], vram=ROOM, ram=ROOM)


def test_buffers_that_nobody_has(saved: tuple[Walk, Path]) -> None:
    module = Walk()
    module.register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(UsageError, match=r"(?s)table has no values.*include_buffers=False"):
        penstock.stream(module.to("meta"), "blocks", files=saved[1], vram=ROOM, ram=ROOM)


def test_a_file_that_changes_meanwhile(saved: tuple[Walk, Path]) -> None:
    module, path = _empty(Walk), saved[1] / "model.safetensors"
    with penstock.stream(module, "blocks", files=path, vram=1 << 15, ram=1 << 14):
        path.write_bytes(path.read_bytes())
        with pytest.raises(CheckpointChanged):
            for _ in range(3):
                _pass(module)
