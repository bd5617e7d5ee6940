"""Bad input, at the door of the engine: each kind has its own clear error and leaves nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from penstock.engine.engine import Engine
from penstock.engine.request.generation import GenerationRequest
from penstock.errors import (
    HeaderError,
    ImageError,
    NonFinite,
    OutputError,
    OverBudget,
    PenstockError,
    PickleRefused,
    RequestError,
    TensorMismatch,
)

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def _request(image: Path | None, **changes: Any) -> GenerationRequest:
    plain = GenerationRequest(
        prompt="a cat yawns", image=image, width=64, height=48, frames=5, steps=2, seed=1
    )
    return replace(plain, **changes)


def _open(folder: Path) -> Engine:
    return Engine.open(folder, device="cpu", vram="100MiB", ram="100MiB")


@pytest.fixture
def model(i2v_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(i2v_folder, tmp_path / "model"))


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _fails(folder: Path, kind: type[PenstockError], message: str | None = None) -> str:
    with pytest.raises(kind, match=message) as caught:
        _open(folder)
    return str(caught.value)


def test_a_missing_tensor_is_named_and_counted(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["blocks.3.attn1.to_q.weight"]

    _rewrite(model / WEIGHTS, change)
    text = _fails(model, TensorMismatch, "does not hold|missing")
    assert "blocks.3.attn1.to_q.weight" in text
    assert "1 missing" in text


def test_an_unknown_tensor_is_named_and_counted(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.9.extra"] = torch.zeros(3)
        tensors["more"] = torch.zeros(3)

    _rewrite(model / WEIGHTS, change)
    text = _fails(model, PenstockError, "unknown|not used|extra")
    assert "2" in text


def test_a_misshaped_tensor_is_named_with_both_shapes(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.2.ffn.net.2.weight"] = torch.zeros(96, 100)

    _rewrite(model / WEIGHTS, change)
    text = _fails(model, TensorMismatch, "blocks.2.ffn.net.2.weight")
    assert "224" in text
    assert "100" in text


def test_a_truncated_file_is_refused(model: Path) -> None:
    path = model / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    assert str(path) in _fails(model, HeaderError)


def test_a_header_that_lies_about_its_length_is_refused(model: Path) -> None:
    path = model / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    assert str(path) in _fails(model, HeaderError)


def test_a_foreign_file_is_refused(model: Path) -> None:
    path = model / WEIGHTS
    path.write_bytes(b"\x00" * 4096)
    assert str(path) in _fails(model, HeaderError)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pth", ".pt"])
def test_a_pickle_is_refused_with_the_remedy(suffix: str, model: Path) -> None:
    path = model / WEIGHTS
    torch.save({"a": torch.zeros(1)}, path.with_suffix(suffix))
    path.unlink()
    text = _fails(model, PickleRefused, "pickle")
    assert "safetensors" in text


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "model_index.json" in _fails(tmp_path, PenstockError)


def test_another_pipeline_is_refused(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionPipeline"})
    )
    assert "StableDiffusionPipeline" in _fails(model, PenstockError)


def _picture(path: Path, kind: str) -> Path:
    if kind == "text":
        path.write_text("no picture at all")
    elif kind == "cut short":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "200 megapixels":
        Image.new("1", (20_000, 10_000)).save(path)
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "cut short", "200 megapixels"])
def test_a_bad_picture_is_an_image_error(kind: str, i2v_folder: Path, tmp_path: Path) -> None:
    request = _request(_picture(tmp_path / "cat.png", kind))
    output = tmp_path / "out" / "cat.mp4"
    output.parent.mkdir()
    with _open(i2v_folder) as engine, pytest.raises(ImageError):
        engine.submit(request, output).result()
    assert list(output.parent.iterdir()) == []


def test_the_output_is_checked_before_anything_is_loaded(
    i2v_folder: Path, picture: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken.mp4"
    taken.write_bytes(b"mine")
    with _open(i2v_folder) as engine:
        for path in (tmp_path / "absent" / "x.mp4", taken, tmp_path, tmp_path / "x.exe"):
            with pytest.raises(OutputError):
                engine.submit(_request(picture), path)
    assert taken.read_bytes() == b"mine"


def test_nan_in_the_weights_stops_at_the_first_step(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_out.bias"].fill_(float("nan"))

    _rewrite(model / WEIGHTS, change)
    output = tmp_path / "out.mp4"
    with _open(model) as engine:
        job = engine.submit(_request(picture), output)
        with pytest.raises(NonFinite, match="step 1 of 2"):
            job.result()
    assert not output.exists()


def test_a_picture_for_the_wrong_kind_of_model(
    i2v_folder: Path, t2v_folder: Path, picture: Path
) -> None:
    with _open(i2v_folder) as engine, pytest.raises(RequestError, match="image-to-video"):
        engine.plan(_request(None))
    with _open(t2v_folder) as engine, pytest.raises(RequestError, match="text-to-video"):
        engine.plan(_request(picture))


def test_a_budget_no_plan_fits(i2v_folder: Path, picture: Path, tmp_path: Path) -> None:
    with (
        Engine.open(i2v_folder, device="cpu", vram="1MiB", ram="1GiB") as engine,
        pytest.raises(OverBudget) as caught,
    ):
        engine.submit(_request(picture), tmp_path / "x.mp4")
    assert caught.value.resource == "VRAM"
    assert caught.value.need_bytes > caught.value.limit_bytes == 1 << 20
    assert list(tmp_path.iterdir()) == []


def test_a_cut_prompt_is_told(i2v_folder: Path, picture: Path) -> None:
    with _open(i2v_folder) as engine:
        job = engine.submit(_request(picture, prompt="word " * 400 + "tail"))
        report = job.result().report
    (notice,) = [text for text in report.notices if "too long" in text]
    assert notice.endswith("tail'")
