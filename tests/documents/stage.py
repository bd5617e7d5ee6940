"""A folder in which the names that the documents use are there, and small.

What stands for what: every model is the small one in the box at 32x32, 5 frames and 2 steps; each
LoRA one of random values for it; pictures are the demo's; `clip.mp4` a video of the model;
`jobs.jsonl` two lines; `JOB` a job that was stopped after its first step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor

import penstock
from penstock.engine.engine import Engine
from penstock.engine.files.locate import locate
from penstock.engine.request.demo import MINI, demo_picture
from tests.engine import lora_files

MODELS = ("Wan2.1-I2V-14B-720P-Diffusers", "DIR")
LORAS = (
    "style.safetensors",
    "motion.safetensors",
    "wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors",
)
SMALL = {"width": 32, "height": 32, "frames": 5, "steps": 2}
COMFY = {
    "transformer": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "image_encoder": "clip_vision",
}


def prepare(stage: Path) -> None:
    """Put everything there but the job."""
    for name in MODELS:
        small_model(stage / name)
    comfy(stage / "ComfyUI")
    pairs = lora_files.pairs(
        (source := locate(MINI).streamed), lora_files.linears(source, outside=False)
    )
    for name in LORAS:
        lora_files.write_comfy(stage / name, pairs)
    shutil.copy(demo_picture(), stage / "cat.png")
    with Engine.open(stage / "DIR", vram="1GiB", ram="1GiB", device="cpu") as engine:
        engine.submit(request(stage), stage / "clip.mp4").result()
    lines = ({"prompt": "a cat", "image": "cat.png", "id": name} for name in ("one", "two"))
    (stage / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def small_model(folder: Path) -> None:
    """The model in the box, with smaller defaults."""
    folder.mkdir()
    for part in MINI.iterdir():
        if part.name != "defaults.json":
            (folder / part.name).symlink_to(part)
    own = json.loads((MINI / "defaults.json").read_text())
    (folder / "defaults.json").write_text(json.dumps(own | SMALL))


def comfy(root: Path) -> None:
    """The same as ComfyUI keeps files, the tokenizer beside the text encoder."""
    for part, folder in COMFY.items():
        place = root / "models" / folder
        shutil.copytree(MINI / part, place)
    shutil.copytree(MINI / "tokenizer", root / "models" / "text_encoders", dirs_exist_ok=True)


def request(stage: Path) -> penstock.GenerationRequest:
    """The smallest video."""
    return penstock.GenerationRequest(prompt="a cat", image=stage / "cat.png", seed=1, **SMALL)


def stopped_job(stage: Path) -> None:
    """A job called JOB, if there is none."""
    if (stage / "JOB").exists():
        return

    def enough(step: int, latents: Tensor) -> None:
        raise penstock.JobCancelled("that will do")

    with Engine.open(stage / "DIR", vram="1GiB", ram="1GiB", device="cpu") as engine:
        job = engine.submit(
            request(stage), stage / "job.mp4", job_dir=stage / "JOB", on_step=enough, force=True
        )
        try:
            job.result()
        except penstock.JobCancelled:
            return
    raise AssertionError("the job was not stopped")
