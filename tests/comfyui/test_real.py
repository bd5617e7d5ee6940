"""The pack in a real ComfyUI; see `tests.comfyui.running`."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from penstock.engine.engine import Engine
from penstock.engine.files.locate import Files
from penstock.engine.media.video import read_frames
from penstock.engine.request.demo import MINI, demo_picture
from penstock.engine.request.settings import Settings, resolve
from penstock.engine.run.jobs import list_jobs
from tests.comfyui import workflows
from tests.comfyui.running import CHECKOUT, MINI_FILE, TINY_FILE, Comfy
from tests.engine import lora_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHECKOUT is None, reason="PENSTOCK_COMFYUI names no ComfyUI"),
]

BUDGETS = {"vram": "256MiB", "ram": "512MiB", "device": "cpu"}
SMALL = {"width": 32, "height": 32, "frames": 5, "steps": 2, "shift": 5.0, "cfg": 4.0}
MANY_STEPS = {"steps": 40}
LORA = "four.safetensors"


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    folder = tmp_path_factory.mktemp("comfy") / "base"
    running = Comfy(folder)
    yield running
    running.close()


def parts(comfy: Comfy) -> dict[str, Path]:
    """The model in the box as its files lie under ComfyUI."""
    models = comfy.folder / "models"
    return {
        "transformer": models / "diffusion_models" / MINI_FILE,
        "text_encoder": models / "text_encoders" / MINI_FILE,
        "vae": models / "vae" / MINI_FILE,
        "image_encoder": models / "clip_vision" / MINI_FILE,
        "tokenizer": MINI / "tokenizer",
    }


def model_inputs(**more: str) -> dict[str, str]:
    names = ("transformer", "text_encoder", "vae", "image_encoder")
    return dict.fromkeys(names, MINI_FILE) | {"tokenizer": str(MINI / "tokenizer")} | more


def prompt(seed: int = 3, images: bool = False, **more: Any) -> dict[str, Any]:
    """A prompt that makes one video, in node 3."""
    asked = {"prompt": "a cat", "seed": seed, **SMALL, **BUDGETS, **more}
    made = {
        "1": {"class_type": "PenstockModel", "inputs": model_inputs()},
        "2": {"class_type": "LoadImage", "inputs": {"image": "demo.png"}},
        "3": {
            "class_type": "PenstockGenerate",
            "inputs": {"model": ["1", 0], "start_image": ["2", 0], "images": images, **asked},
        },
        "4": save_video(["3", 1]),
    }
    if images:
        made["5"] = save_images(["3", 0])
    return made


def save_video(link: list[Any]) -> dict[str, Any]:
    given = {"video": link, "filename_prefix": "v", "format": "auto", "codec": "auto"}
    return {"class_type": "SaveVideo", "inputs": given}


def save_images(link: list[Any]) -> dict[str, Any]:
    return {"class_type": "SaveImage", "inputs": {"images": link, "filename_prefix": "f"}}


def generated(folder: Path, files: dict[str, Path], *flags: str) -> np.ndarray:
    """The frames of the file that ``penstock generate`` writes."""
    output = folder / "expected.mp4"
    named = [
        word for part, path in files.items() for word in (f"--{part.replace('_', '-')}", str(path))
    ]
    command = [
        sys.executable, "-m", "penstock", "generate", "-o", str(output), "--force", *named,
        "--vram", "256MiB", "--ram", "512MiB", "--device", "cpu", "--no-resume", *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return frames_of(output)


def frames_of(video: Path) -> np.ndarray:
    return np.stack(list(read_frames(video)))


def small_flags(**more: Any) -> list[str]:
    said = SMALL | more
    size = f"{said['width']}x{said['height']}"
    return [
        "--size", size, "--frames", str(said["frames"]), "--steps", str(said["steps"]),
        "--shift", str(said["shift"]), "--cfg", str(said["cfg"]),
    ]  # fmt: skip


def expected_frames(
    files: dict[str, Path], seed: int = 3, loras: Any = (), **more: Any
) -> torch.Tensor:
    """The frames themselves, as the engine makes them in this process."""
    said = SMALL | more
    settings = Settings(
        prompt="a cat", image=demo_picture(), size=f"{said['width']}x{said['height']}", seed=seed,
        frames=said["frames"], steps=said["steps"], guidance_scale=said["cfg"],
        shift=said["shift"],
    )  # fmt: skip
    options = {"vram": "256MiB", "ram": "512MiB", "device": "cpu"}
    with Engine.open(None, files=Files(**files), loras=loras, **options) as engine:
        return engine.submit(resolve(settings, engine.model)).result().video


def pictures(paths: list[Path]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])


def test_the_pack_loads_without_a_warning(comfy: Comfy) -> None:
    told = [line for line in comfy.log if "penstock" in line.lower()]
    assert len(told) == 1 and "seconds:" in told[0] and "FAILED" not in told[0], told
    assert not any("pyproject" in line for line in comfy.log)
    ours = {name for name in comfy.info if name.startswith("Penstock")}
    assert ours == {
        "PenstockModel", "PenstockLora", "PenstockPlan", "PenstockGenerate", "PenstockResume",
    }  # fmt: skip
    choices = comfy.info["PenstockModel"]["input"]["required"]["transformer"][1]["options"]
    assert choices == ["none", MINI_FILE, TINY_FILE]  # the last by --extra-model-paths-config


@pytest.mark.parametrize("name", workflows.NAMES)
def test_a_workflow_runs_and_its_frames_are_those_of_generate(
    comfy: Comfy, name: str, tmp_path: Path
) -> None:
    made = workflows.api_form(workflows.load(name), comfy.info)
    tiny = name == "text_to_video"
    files = parts(comfy)
    if tiny:
        places = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
        files = {part: comfy.extra / folder / TINY_FILE for part, folder in places.items()}
        files["tokenizer"] = comfy.extra / "whole" / "tokenizer"
    lora = comfy.folder / "models" / "loras" / LORA
    if name == "four_steps":
        write_lora(files, lora)
    for node in made.values():
        made_small(node, files, tiny)
    ended = comfy.run(made)
    saved = next(i for i, node in made.items() if node["class_type"] == "SaveVideo")
    video = frames_of(comfy.output(ended, saved)[0])
    picture = [] if tiny else ["--image", str(demo_picture())]
    asked = "the cat turns its head and yawns"
    if name == "four_steps":
        flags = ["--distilled", "--lora", f"{lora}:1.0", "--size", "32x32", "--frames", "5"]
        generated(tmp_path, files, "--prompt", asked, "--seed", "0", *picture, *flags)
        settings = Settings(
            prompt=asked, image=demo_picture(), size="32x32", frames=5, seed=0, distilled=True
        )
        options = {"vram": "256MiB", "ram": "512MiB", "device": "cpu"}
        with Engine.open(None, files=Files(**files), loras=[lora], **options) as engine:
            raw = engine.submit(resolve(settings, engine.model)).result().video
        grafted = made | {"9": save_images(["4", 0])}
        assert torch.equal(pictures(comfy.output(comfy.run(grafted), "9")), raw)
        assert len(video) == 5
        return
    expected = generated(
        tmp_path, files, "--prompt", asked, "--seed", "0", *picture, *small_flags()
    )
    if name == "long_video":
        first = tmp_path / "first.mp4"
        (tmp_path / "expected.mp4").rename(first)
        expected = generated(
            tmp_path, files, "--prompt", "the cat gets up and walks away", "--seed", "0",
            "--continue", str(first), "--frames", "13", "--window", "9", "--overlap", "4",
            "--steps", "2", "--shift", "5.0", "--cfg", "4.0",
        )  # fmt: skip
        assert len(expected) == 5 + 13 - 1
    assert np.array_equal(video, expected)
    if name == "image_to_video":
        text = ended["outputs"]["3"]["text"][0]
        assert text.startswith("plan for CPU: it fits") and "denoise" in text


def write_lora(files: dict[str, Path], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with Engine.open(None, files=Files(**files), device="cpu") as engine:
        source = engine.model.source.streamed
        modules = lora_files.linears(source, outside=False)[:6]
        lora_files.write_comfy(path, lora_files.pairs(source, modules))


def made_small(node: dict[str, Any], files: dict[str, Path], tiny: bool) -> None:
    """The same node with the tests' models and sizes."""
    kind, given = node["class_type"], node["inputs"]
    if kind == "LoadImage":
        given["image"] = "demo.png"
    elif kind == "PenstockModel":
        chosen = dict.fromkeys(("transformer", "text_encoder", "vae"), TINY_FILE)
        given |= chosen if tiny else model_inputs()
        given["tokenizer"] = str(files["tokenizer"])
    elif kind == "PenstockLora":
        given["lora"] = LORA
    elif kind in ("PenstockGenerate", "PenstockPlan"):
        asked = SMALL
        if given["distilled"]:
            asked = {"width": 32, "height": 32, "frames": 5}
        elif "after" in given:
            asked = {"frames": 13, "window": 9, "overlap": 4, "steps": 2, "shift": 5.0, "cfg": 4.0}
        given |= asked | BUDGETS


def test_images_are_the_engines_own_and_the_same_again_is_cached(comfy: Comfy) -> None:
    asked = prompt(seed=5, images=True)
    ended = comfy.run(asked)
    assert torch.equal(pictures(comfy.output(ended, "5")), expected_frames(parts(comfy), seed=5))
    before = len(comfy.events)
    comfy.run(asked)
    cached = next(e for e in comfy.events[before:] if e["type"] == "execution_cached")
    assert "3" in cached["data"]["nodes"]
    assert list((comfy.folder / "temp" / "penstock").glob("*.fp32")) == []


def test_images_that_are_linked_and_not_asked_for_are_an_error_at_once(comfy: Comfy) -> None:
    asked = prompt(seed=6) | {"5": save_images(["3", 0])}
    ended = comfy.ended(comfy.queue(asked))
    assert "VIDEO and IMAGE" in str(ended["status"]["messages"])


def test_progress_and_previews_arrive(comfy: Comfy) -> None:
    before = len(comfy.events)
    comfy.run(prompt(seed=7, steps=4))
    heard = comfy.events[before:]
    values = [
        e["data"]["value"] for e in heard if e["type"] == "progress" and e["data"]["node"] == "3"
    ]
    assert values == sorted(values) and len(set(values)) > 3
    shown = [Image.open(io.BytesIO(e["data"])) for e in heard if e["type"] == "preview"]
    assert len(shown) >= 4 and all(each.format == "JPEG" for each in shown)


def interrupted_in_the_midst(comfy: Comfy, asked: dict[str, Any]) -> str:
    """Interrupt a prompt at its third preview; returns the name of the job that is kept."""
    place = len(comfy.events)
    queued = comfy.queue(asked)
    for _ in range(3):
        place = comfy.wait(lambda e: e["type"] == "preview", after=place)
    comfy.client.post("/interrupt", json={})
    ended = comfy.ended(queued)
    kinds = [kind for kind, _ in ended["status"]["messages"]]
    assert "execution_interrupted" in kinds
    (job,) = [info for info in list_jobs(comfy.jobs) if info.unfinished]
    assert job.state == "stopped" and 0 < job.step < job.steps
    return job.name


def test_an_interrupt_keeps_the_job_and_the_same_again_goes_on(comfy: Comfy) -> None:
    asked = prompt(seed=8, images=True, **MANY_STEPS)
    interrupted_in_the_midst(comfy, asked)
    ended = comfy.run(asked)
    expected = expected_frames(parts(comfy), seed=8, **MANY_STEPS)
    assert torch.equal(pictures(comfy.output(ended, "5")), expected)
    assert list_jobs(comfy.jobs) == []  # what is done needs no job any more


def test_resume_goes_on_with_a_job(comfy: Comfy) -> None:
    name = interrupted_in_the_midst(comfy, prompt(seed=9, **MANY_STEPS))
    ended = comfy.run(
        {
            "1": {"class_type": "PenstockResume", "inputs": {"job": name, "images": True}},
            "2": save_images(["1", 0]),
            "3": save_video(["1", 1]),
        }
    )
    expected = expected_frames(parts(comfy), seed=9, **MANY_STEPS)
    assert torch.equal(pictures(comfy.output(ended, "2")), expected)


def test_two_prompts_run_in_order(comfy: Comfy) -> None:
    before = len(comfy.events)
    first, second = comfy.queue(prompt(seed=10)), comfy.queue(prompt(seed=11))
    for each in (first, second):
        assert comfy.ended(each)["status"]["status_str"] == "success"
    wanted = ("execution_start", "execution_success")
    order = [
        (e["type"], e["data"]["prompt_id"]) for e in comfy.events[before:] if e["type"] in wanted
    ]
    assert order == [(kind, each) for each in (first, second) for kind in wanted]


def test_a_worker_that_is_killed_is_the_nodes_error_and_the_job_goes_on(comfy: Comfy) -> None:
    asked = prompt(seed=12, images=True, **MANY_STEPS)
    place = len(comfy.events)
    queued = comfy.queue(asked)
    for _ in range(3):
        place = comfy.wait(lambda e: e["type"] == "preview", after=place)
    (worker,) = comfy.workers()
    worker.kill()
    told = str(comfy.ended(queued)["status"]["messages"])
    assert "was ended by signal 9" in told and "queue the same again" in told
    ended = comfy.run(asked)
    expected = expected_frames(parts(comfy), seed=12, **MANY_STEPS)
    assert torch.equal(pictures(comfy.output(ended, "5")), expected)


def test_the_free_memory_request_ends_the_worker(comfy: Comfy) -> None:
    comfy.run(prompt(seed=13))
    workers = comfy.workers()
    assert len(workers) == 1
    while psutil.wait_procs(workers, timeout=1)[1]:  # ComfyUI misses one that comes too early
        comfy.client.post("/free", json={"unload_models": True})
    assert comfy.workers() == []
    comfy.run(prompt(seed=14))
    assert len(comfy.workers()) == 1


def test_the_worker_ends_with_a_comfyui_that_is_killed(tmp_path: Path) -> None:
    comfy = Comfy(tmp_path / "base")
    comfy.run(prompt(seed=15))
    workers = comfy.workers()
    assert len(workers) == 1
    comfy.kill()
    psutil.wait_procs(workers)
    assert not workers[0].is_running()
