"""A whole job gives what diffusers' modular pipeline gives, and goes on where it was stopped."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.engine import Engine
from penstock.engine.families.minimax_h3.layout import unpack
from penstock.engine.files.locate import Files, open_component
from penstock.engine.request.generation import GenerationRequest
from penstock.errors import RequestError
from penstock.profiles.options import Options
from tests.engine.families.minimax_h3 import tiny

SIZE = {"height": 32, "width": 64}
STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyH3:
    return tiny.write(tmp_path_factory.mktemp("h3"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.picture(tmp_path_factory.mktemp("h3 picture") / "picture.png")


def _request(engine: Engine, **asked: Any) -> GenerationRequest:
    values = {**engine.model.official.request_defaults, **SIZE, "frames": 124, "steps": STEPS}
    return GenerationRequest("a red fox", grid=engine.model.grid, seed=5, **(values | asked))


@dataclass
class Seen:
    """What a job has told of its steps: the latents after each, video and sound packed."""

    steps: list[Tensor]

    def __call__(self, step: int, latents: Tensor) -> None:
        """As ``on_step``."""
        self.steps.append(latents)


def _ours(model: tiny.TinyH3, **asked: Any) -> tuple[Tensor, Tensor]:
    """Video and sound, as latents."""
    seen = Seen([])
    with Engine.open(model.folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        request = _request(engine, **asked)
        result = engine.submit(request, on_step=seen).result()
        video, sound = unpack(seen.steps[-1], engine.model.sizes(request.video_shape))
    assert torch.equal(video, result.latents)
    assert len(seen.steps) == STEPS - 1
    assert result.video.shape == (124, 32, 64, 3)
    return video, sound


def _theirs(model: tiny.TinyH3, **pictures: Any) -> dict[str, Any]:
    return model.theirs(
        prompt="a red fox", num_frames=124, num_inference_steps=STEPS, output_type="pt",
        generator=torch.Generator().manual_seed(5), output=["latents", "audio_latents"], **SIZE,
        **pictures,
    )  # fmt: skip


@pytest.mark.parametrize("ends", [(), ("image",), ("image", "last_image"), ("last_image",)])
def test_a_job_gives_what_the_makers_pipeline_gives(
    model: tiny.TinyH3, picture: Path, ends: tuple[str, ...]
) -> None:
    ours = _ours(model, **dict.fromkeys(ends, picture))
    theirs = _theirs(model, **{name: Image.open(picture) for name in ends})
    for found, wanted in zip(ours, (theirs["latents"], theirs["audio_latents"]), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_job_that_was_stopped_goes_on_to_the_bit(
    model: tiny.TinyH3, picture: Path, tmp_path: Path
) -> None:
    asked = {"image": picture, "steps": 5}
    with Engine.open(model.folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        whole = Seen([])
        engine.submit(_request(engine, **asked), on_step=whole).result()

        def stop(step: int, latents: Tensor) -> None:
            if step == 2:
                raise KeyboardInterrupt

        job = engine.submit(_request(engine, **asked), on_step=stop, job_dir=tmp_path / "job")
        with pytest.raises(KeyboardInterrupt):
            job.result()
        rest = Seen([])
        engine.resume(tmp_path / "job", on_step=rest).result()
    assert len(rest.steps) == 3
    assert torch.equal(rest.steps[-1], whole.steps[-1])


def test_a_pass_reads_its_blocks_and_the_tables_are_read_once(model: tiny.TinyH3) -> None:
    """From disk alone: what each phase reads is what its plan says, and no pass after the first
    touches an AdaLN projection."""
    with Engine.open(
        model.folder, device="cpu", vram="1GiB", ram="1GiB", options=Options(disk="auto")
    ) as engine:
        request = _request(engine)
        parts = engine.model.parts["transformer"]
        tables = sum(layout.read_bytes for layout in parts.cross)
        blocks = sum(layout.read_bytes for layout in parts.blocks)
        plan = engine.plan(request)
        result = engine.submit(request).result()
    assert not any("adaln_proj" in name for layout in parts.blocks for name in layout.places)
    phases = {phase.name: phase for phase in result.report.phases}
    assert phases["context"].read_bytes == tables
    passes = plan["denoise"].read_bytes // blocks
    assert phases["denoise"].read_bytes == blocks * max(passes, 1)


def test_what_the_model_cannot_do_is_refused_before_anything_runs(model: tiny.TinyH3) -> None:
    with Engine.open(model.folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        for asked, told in (
            ({"guidance_scale": 5.0}, "guidance"),
            ({"sampler": "unipc"}, "its own noise levels"),
            ({"steps": 1}, "one step computes nothing"),
            ({"window": 124, "frames": 141}, "no context windows"),
        ):
            with pytest.raises(RequestError, match=told):
                engine.plan(_request(engine, **asked))
        for frames, nearest in ((100, 124), (125, 124), (346, 345), (133, 141)):
            with pytest.raises(RequestError, match=str(nearest)):
                _request(engine, frames=frames)
        with pytest.raises(RequestError, match="nearest legal width is 64"):
            _request(engine, width=70)
        with pytest.raises(RequestError, match="24 frames a second"):
            engine.submit(_request(engine, fps=16)).result()


def _makers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer as ComfyUI's file has it: the makers' names, queries, keys and values stacked,
    the gate's rows first."""
    renamed = {
        "transformer_blocks.": "blocks.", "token_refiner.refiner_blocks.": "token_refiner.blocks.",
        "audio_proj_in.": "audio_patch_proj.", "proj_in.": "video_patch_proj.",
        "context_embedder.": "condition_proj.", "time_embedder.linear_1.": "time_embedder.proj_in.",
        "time_embedder.linear_2.": "time_embedder.proj_out.", "norm_out.norm.": "final_layer.norm.",
        "norm_out.linear.": "final_layer.adaln_proj.linear.",
        "audio_proj_out.": "final_layer.audio_out.", "proj_out.": "final_layer.video_out.",
    }  # fmt: skip
    inside = {
        ".attn.norm_q.": ".attn.q_norm.", ".attn.norm_k.": ".attn.k_norm.",
        ".attn.to_out.0.": ".attn.out_proj.", ".ff.net.0.proj.": ".mlp.fc1.",
        ".ff.net.2.": ".mlp.fc2.",
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.to_k." in name or ".attn.to_v." in name:
            continue
        theirs = next(
            (new + name[len(old) :] for old, new in renamed.items() if name.startswith(old)), name
        )
        for old, new in inside.items():
            theirs = theirs.replace(old, new)
        if ".attn.to_q." in name:
            stacked = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            theirs, tensor = theirs.replace("to_q", "qkv_proj"), torch.cat(stacked)
        if theirs.endswith("mlp.fc1.weight"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        found[f"model.diffusion_model.{theirs}"] = tensor.contiguous()
    return found


def test_a_single_file_in_the_makers_names_is_the_same_model(
    model: tiny.TinyH3, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "minimax_h3.safetensors"
    # The tiny model's heads turn less than a file without a config is taken to
    shutil.copy(model.folder / "transformer" / "config.json", tmp_path)
    save_file(_makers_names(model.parts["transformer"].state_dict()), file)
    source = open_component(file)
    assert (source.naming, source.component) == ("MiniMax", "transformer")
    latents = []
    for files in (Files(), Files(transformer=file)):
        seen = Seen([])
        with Engine.open(
            model.folder, files=files, device="cpu", vram="1GiB", ram="1GiB"
        ) as engine:
            job = engine.submit(_request(engine, steps=2), on_step=seen)
            job.result()
        latents.append(seen.steps[-1])
    assert (latents[0] - latents[1]).norm() <= 1e-6 * latents[0].norm()


def _lora(state: dict[str, Tensor], *modules: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA of some modules, in the names of ``state``, and the weights with it merged."""
    draw, merged, found = torch.Generator().manual_seed(9), dict(state), {}
    for module in modules:
        name = next(key for key in state if key.endswith(f"{module}.weight"))
        rows, columns = state[name].shape
        down, up = torch.randn(4, columns, generator=draw), torch.randn(rows, 4, generator=draw)
        start = name.removesuffix("weight")
        found |= {f"{start}lora_A.weight": 0.1 * down, f"{start}lora_B.weight": 0.1 * up}
        merged[name] = state[name] + 0.01 * up @ down
    return found, merged


def test_a_lora_in_the_makers_names_counts(model: tiny.TinyH3, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copy(model.folder / "transformer" / "config.json", tmp_path)
    state = _makers_names(model.parts["transformer"].state_dict())
    added, merged = _lora(
        state, "blocks.1.attn.qkv_proj", "blocks.0.mlp.fc1", "blocks.2.adaln_proj.linear",
        "token_refiner.blocks.0.attn.out_proj",
    )  # fmt: skip
    short = {name.removeprefix("model."): tensor for name, tensor in added.items()}
    for name, tensors in (("plain", state), ("merged", merged), ("lora", short)):
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            tmp_path / f"{name}.safetensors",
        )
    latents = []
    for file, loras in (("plain", ["lora"]), (None, ["lora"]), ("merged", []), ("plain", [])):
        seen = Seen([])
        own = Files() if file is None else Files(transformer=tmp_path / f"{file}.safetensors")
        with Engine.open(
            model.folder, files=own, device="cpu", vram="1GiB", ram="1GiB",
            loras=[tmp_path / f"{each}.safetensors" for each in loras],
        ) as engine:  # fmt: skip
            engine.submit(_request(engine, steps=2), on_step=seen).result()
        latents.append(seen.steps[-1])
    beside, beside_diffusers, folded, without = latents
    assert (beside - folded).norm() <= 1e-5 * folded.norm()
    assert (beside_diffusers - folded).norm() <= 1e-5 * folded.norm()
    assert (folded - without).norm() > 1e-3 * folded.norm()


def test_a_pack_in_8_bits_is_made_by_the_first_job(model: tiny.TinyH3, tmp_path: Path) -> None:
    latents = []
    for options in (Options(), Options(format="int8")):
        seen = Seen([])
        with Engine.open(
            model.folder, device="cpu", vram="1GiB", ram="1GiB", options=options, cache=tmp_path
        ) as engine:
            result = engine.submit(_request(engine, steps=2), on_step=seen).result()
        latents.append(seen.steps[-1])
    assert result.report.weight_format == "int8"
    assert 0 < (latents[1] - latents[0]).norm() <= 0.02 * latents[0].norm()
    packed = open_component(next(tmp_path.rglob("transformer")))
    entries = packed.entries()
    assert entries["transformer_blocks.0.attn.to_q.weight"].dtype == "I8"
    assert entries["transformer_blocks.0.adaln_proj.linear.weight"].dtype == "F32"


def test_a_pack_of_every_part_makes_the_same_video(
    model: tiny.TinyH3, picture: Path, tmp_path: Path
) -> None:
    """The vision tower lies in the text encoder's pack, and is read by its layers."""
    packed = tmp_path / "packed"
    words = ["pack", "--model", str(model.folder), "--format", "int8", "-o", str(packed)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    latents = []
    for folder, options in ((packed, Options()), (model.folder, Options(format="int8"))):
        seen = Seen([])
        with Engine.open(
            folder, device="cpu", vram="1GiB", ram="1GiB", options=options, cache=tmp_path / "cache"
        ) as engine:
            engine.submit(_request(engine, steps=2, image=picture), on_step=seen).result()
        latents.append(seen.steps[-1])
    assert torch.equal(*latents)
