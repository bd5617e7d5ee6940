"""A plan and a refusal come from configs and headers: neither torch nor a library of models is
loaded for them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.families.wan import config
from penstock.engine.files.locate import open_component
from tests.engine import golden
from tests.engine.lora_files import linears, pairs, write_diffusers

HEAVY = ("accelerate", "bitsandbytes", "comfy_kitchen", "diffusers", "torch", "transformers")

CHILD = f"""
import sys
from penstock.cli.main import app
from penstock.profiles import hardware
hardware.shows_gpu = lambda: sys.argv[1] == "GPU"
try:
    code = app(sys.argv[2:], standalone_mode=False) or 0
except SystemExit as end:
    code = end.code
print("\\n" + repr((code, [name for name in {HEAVY!r} if name in sys.modules])))
"""

IMPORTER = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            raise ImportError("the header path imports " + name)
sys.meta_path.insert(0, Refuse())
import penstock.cli.main, penstock.cli.plan_view, penstock.engine.prepared
import penstock.engine.request.settings, penstock.engine.variants
"""
"""What a plan or a refusal imports, all of it at its first line: a traceback shows the chain."""

SIZE = ("--size", "64x64", "--frames", "5")


def child(*arguments: object, sign: str = "none") -> subprocess.CompletedProcess[str]:
    """``penstock`` with these arguments on a machine that shows that sign of a GPU."""
    command = [sys.executable, "-c", CHILD, sign, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def planned(*arguments: object) -> dict[str, Any]:
    """The plan, after a check that nothing heavy was loaded for it."""
    done = child("plan", *arguments, "--json", *SIZE)
    *plan, told = done.stdout.strip().splitlines()
    assert told == "(0, [])", done.stderr
    found: dict[str, Any] = json.loads("".join(plan))
    return found


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("t2v") / "m", image_to_video=False)


def test_what_a_plan_needs_imports_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_plan_of_a_folder(i2v_folder: Path, device: str) -> None:
    plan = planned("--model", i2v_folder, "--device", device)
    assert plan["phases"][0]["name"] == "text"


def test_torch_is_asked_where_there_is_a_sign_of_a_gpu(i2v_folder: Path) -> None:
    done = child("plan", "--model", i2v_folder, "--json", *SIZE, sign="GPU")
    assert done.stdout.strip().endswith("(0, ['torch'])"), done.stderr


def test_a_plan_in_another_format(
    i2v_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    plan = planned("--model", i2v_folder, "--device", "cpu", "--format", "int8")
    assert plan["weight_format"] == "int8" and plan["phases"][0]["name"] == "pack"


def test_a_plan_for_another_machine(i2v_folder: Path) -> None:
    assert planned("--model", i2v_folder, "--card", "RTX 3060 12GB")["weight_format"] == "fp32"


@pytest.mark.parametrize("model", ["files", "synthetic"])
def test_attention_in_8_bits_for_another_machine_is_assumed(model: str, i2v_folder: Path) -> None:
    """Neither torch nor the library is there."""
    which = ("--model", i2v_folder) if model == "files" else ("--synthetic", "wan2.1-i2v-14b")
    flags = ("--card", "RTX 4090 24GB", "--attention", "int8", "--compute", "fast")
    plan = planned(*which, *flags)
    assert plan["attention"] == "int8"
    assert ["attention", "int8", "flag"] in [list(each.values()) for each in plan["origins"]]


def test_a_plan_of_gguf_files(t2v: Path, tmp_path: Path) -> None:
    for part, file, architecture in (
        ("transformer", "dit.gguf", "wan"),
        ("text_encoder", "t5.gguf", "t5encoder"),
    ):
        tensors = golden.load(t2v, part)
        wan = part == "transformer"
        names = (golden.original_names(part, list(tensors)) if wan
                 else golden.llama_names(list(tensors)))  # fmt: skip
        golden.write_gguf(tmp_path / file, tensors, names, "Q8_0", architecture)
    plan = planned("--model", t2v, "--transformer", tmp_path / "dit.gguf",
                   "--text-encoder", tmp_path / "t5.gguf", "--device", "cpu")  # fmt: skip
    assert plan["weight_format"] == "gguf-q8_0"


def test_a_plan_of_a_single_fp8_file_with_a_lora(t2v: Path, tmp_path: Path) -> None:
    tensors = golden.load(t2v, "transformer")
    names = golden.original_names("transformer", list(tensors))
    path = golden.make(tensors, names, "comfy old").save(tmp_path / "fp8.safetensors")
    source = open_component(t2v / "transformer")
    layers = pairs(source, linears(source, outside=False)[:2])
    lora = write_diffusers(tmp_path / "lora.safetensors", layers)
    plan = planned("--model", t2v, "--transformer", path, "--lora", lora, "--device", "cpu")
    assert plan["weight_format"] == "fp8"


def refused(folder: Path, picture: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return child("generate", "--model", folder, "--prompt", "x", "--image", picture, "--vram",
                 "1MiB", "-o", "never.mp4", *arguments)  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_refused_job(i2v_folder: Path, picture: Path, device: str) -> None:
    done = refused(i2v_folder, picture, "--device", device)
    assert "error: no plan fits the VRAM budget: expected at least" in done.stderr
    assert "found a limit of 1,048,576 bytes (largest consumer: " in done.stderr
    assert "What fits: --profile 4gb" in done.stderr
    assert done.stdout.strip().splitlines()[-1] == "(1, [])"


def test_the_defaults_are_those_of_the_libraries() -> None:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, UMT5Config

    for ours, made in ((config.TRANSFORMER, WanTransformer3DModel), (config.VAE, AutoencoderKLWan)):
        theirs = inspect.signature(made.__init__).parameters
        for name, value in ours.items():
            default = theirs[name].default
            assert value == (tuple(default) if isinstance(default, list) else default), name
    for ours, found in ((config.TEXT, UMT5Config()), (config.IMAGE, CLIPVisionConfig())):
        assert {name: getattr(found, name) for name in ours} == dict(ours)


def test_building_waits_for_its_first_use(i2v_folder: Path) -> None:
    from penstock.engine.model.files import ModelFiles

    model = ModelFiles.open(i2v_folder)
    for part in model.components():
        assert "_parts" not in vars(part.skeleton)
    assert type(model.text.module).__name__ == "UMT5EncoderModel"
    assert model.text.module is model.text.module
    assert model.vae_decoder.module is not model.vae_encoder.module
    model.close()


def test_a_job_imports_no_library_of_models(
    i2v_folder: Path, picture: Path, tmp_path: Path
) -> None:
    """They take more than all else of a small job; what they state of Wan is written down here."""
    request = ("--prompt", "a cat", "--image", picture, "--steps", "1", *SIZE)
    output = ("-o", tmp_path / "x.mp4")
    for more in ((), ("--clip-crop", "center", "--sampler", "euler")):
        done = child("generate", "--model", i2v_folder, *request, *more, *output, "--force")
        assert done.stdout.strip().splitlines()[-1] == "(0, ['torch'])", done.stderr
