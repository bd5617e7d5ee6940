"""A plan and a refusal come from configs and headers: no library of models is loaded for them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

from penstock.engine.wan import config

CHILD = """
import sys
from penstock.cli import app
code = 0
try:
    code = app(sys.argv[1:], standalone_mode=False) or 0
except SystemExit as end:
    code = end.code
except Exception as error:
    code = getattr(error, "exit_code", None) or type(error).__name__
heavy = {"diffusers", "transformers", "accelerate"} & sys.modules.keys()
print("\\n" + repr((code, sorted(heavy))))
"""


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=240
    )


def test_a_plan_of_a_folder_loads_no_library_of_models(i2v_folder: Path) -> None:
    done = child("plan", "--model", str(i2v_folder), "--device", "cpu", "--json",
                 "--size", "64x48", "--frames", "5")  # fmt: skip
    *plan, told = done.stdout.strip().splitlines()
    assert told == "(0, [])", done.stderr
    assert json.loads("".join(plan))["phases"][0]["name"] == "text"


def test_a_refused_job_loads_no_library_of_models(i2v_folder: Path, picture: Path) -> None:
    done = child("generate", "--model", str(i2v_folder), "--prompt", "x", "--image", str(picture),
                 "--device", "cpu", "--vram", "1MiB", "-o", "never.mp4")  # fmt: skip
    assert "no plan fits the VRAM budget" in done.stderr
    told = done.stdout.strip().splitlines()[-1]
    assert told.endswith(", [])") and not told.startswith("(0,")


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
    from penstock.engine.model import ModelFiles

    model = ModelFiles.open(i2v_folder)
    for part in model.components():
        assert "_parts" not in vars(part.skeleton)
    assert type(model.text.module).__name__ == "UMT5EncoderModel"
    assert model.text.module is model.text.module
    assert model.vae_decoder.module is not model.vae_encoder.module
    model.close()
