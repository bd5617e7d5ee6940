"""Folders as diffusers' own tools quantise them: they open, and give the plain model's latents
within their format's error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.engine.files.locate import Files
from penstock.engine.inspect import inspect
from tests.engine import golden
from tests.engine.running import a_request, an_engine
from tests.quant.weights import relative_rms

LIMITS = {"int8 per row": 0.02, "fp8 per row": 0.06, "quanto-int8": 0.03, "quanto-int4": 0.3,
          "nf4": 0.3, "nf4 nested": 0.3}  # fmt: skip
"""Of the latents after two steps, relative to their root mean square."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


def latents(folder: Path, **options: Any) -> torch.Tensor:
    with an_engine(folder, **options) as engine:
        return engine.submit(a_request(steps=2)).result().latents


@pytest.fixture(scope="module")
def expected(model: Path) -> torch.Tensor:
    return latents(model)


def by_diffusers(source: Path, target: Path, config: Any) -> None:
    diffusers = import_module("diffusers")
    network = diffusers.WanTransformer3DModel.from_pretrained(
        source, quantization_config=config, torch_dtype=torch.bfloat16
    )
    network.save_pretrained(target)


def torchao(kind: str) -> Any:
    configs = pytest.importorskip("torchao.quantization")
    return import_module("diffusers").TorchAoConfig(getattr(configs, kind)())


def quanto(kind: str) -> Any:
    pytest.importorskip("optimum.quanto")
    return import_module("diffusers").QuantoConfig(weights_dtype=kind)


def by_bitsandbytes(source: Path, target: Path, *, nested: bool) -> None:
    """What its Linear4bit leaves in a state dict; diffusers itself quantises so on a GPU only."""
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if golden.is_block_matrix(name, tensor):
            layer = name.removesuffix(".weight")
            made |= golden._bitsandbytes(tensor, layer, nested=nested)[0]
        else:
            made[name] = tensor
    target.mkdir()
    save_file(made, target / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (target / "config.json").write_text(json.dumps(config))


def by_transformers(source: Path, target: Path, *, nested: bool) -> None:
    """bitsandbytes on a CPU, as transformers calls it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    network = transformers.UMT5EncoderModel.from_pretrained(
        source, quantization_config=config, torch_dtype=torch.bfloat16
    )
    network.save_pretrained(target)


MMGP = """
import sys
import diffusers, torch
from mmgp import offload
from optimum import quanto
source, target, kind = sys.argv[1:]
network = diffusers.WanTransformer3DModel.from_pretrained(source, torch_dtype=torch.bfloat16)
offload.save_model(network, target, do_quantize=True, quantizationType=getattr(quanto, kind),
                   config_file_path=source + "/config.json")
"""
"""In a process of its own, for mmgp changes what it imports."""


FOLDERS = {
    "torchao int8": lambda s, t: by_diffusers(s, t, torchao("Int8WeightOnlyConfig")),
    "torchao fp8": lambda s, t: by_diffusers(s, t, torchao("Float8WeightOnlyConfig")),
    "quanto int8": lambda s, t: by_diffusers(s, t, quanto("int8")),
    "quanto int4": lambda s, t: by_diffusers(s, t, quanto("int4")),
    "bitsandbytes": lambda s, t: by_bitsandbytes(s, t, nested=False),
    "bitsandbytes nested": lambda s, t: by_bitsandbytes(s, t, nested=True),
}

TEXT_FOLDERS = {
    "transformers bitsandbytes": lambda s, t: by_transformers(s, t, nested=False),
    "transformers bitsandbytes nested": lambda s, t: by_transformers(s, t, nested=True),
}


@pytest.mark.parametrize("kind", [*FOLDERS, *TEXT_FOLDERS])
def test_a_quantised_folder_runs(
    kind: str, model: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    part = "text_encoder" if kind in TEXT_FOLDERS else "transformer"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(part))
    (FOLDERS | TEXT_FOLDERS)[kind](model / part, folder / part)
    described = inspect(folder)
    assert not described.problem  # type: ignore[union-attr]
    (label,) = (each.format for each in described.components if each.component == part)  # type: ignore[union-attr]
    assert all(part.usable and part.arguments for part in described.components)  # type: ignore[union-attr]
    error = relative_rms(latents(folder), expected)
    assert 0 < error < LIMITS[label]
    fast = relative_rms(latents(folder, compute="fast"), expected)
    assert fast < 2 * LIMITS[label]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mmgp") is None, reason="needs mmgp")
@pytest.mark.parametrize(("kind", "label"), [("qint8", "quanto-int8"), ("qint4", "quanto-int4")])
def test_a_file_of_mmgp_runs(
    kind: str, label: str, model: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    words = [sys.executable, "-c", MMGP, str(model / "transformer"), str(file), kind]
    subprocess.run(words, check=True, capture_output=True)
    (described,) = inspect(file).components  # type: ignore[union-attr]
    assert (described.format, described.usable) == (label, True)
    error = relative_rms(latents(model, files=Files(transformer=file)), expected)
    assert 0 < error < LIMITS[label]
