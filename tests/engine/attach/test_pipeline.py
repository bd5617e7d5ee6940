"""diffusers' own pipelines, attached: the calls of their fast tests, and the same results."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor, nn

import penstock
from penstock.engine.attach import pipe as attach_pipe
from penstock.engine.attach.desk import WHOLE_FRAMES
from penstock.engine.families.wan.cost import vae as vae_cost
from penstock.engine.families.wan.spec import VaeSpec
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.family.protocol import families
from penstock.engine.store.durable import FileOps
from penstock.errors import OverBudget, PenstockError, StorageError, UsageError
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import Weights
from penstock.profiles.tiling import TileGrid
from tests.meter import StorageMeter
from tests.versions import same_after_umt5

VRAM, RAM = "48MiB", "64MiB"
PARTS = ("transformer", "text_encoder", "vae", "image_encoder")


def _weights(pipe: Any) -> list[nn.Parameter]:
    models = [model for name in PARTS if (model := getattr(pipe, name, None)) is not None]
    return [weight for model in models for weight in model.parameters()]


def _open(folder: Path, *, mapped: bool = False) -> Any:
    """The pipeline, its weights in memory that torch gave, as they are wherever they were moved or
    cast; or ``mapped``, as safetensors leaves them: where in the file its header ends.

    Torch's product of a matrix and one vector (as of a timestep) may round otherwise where the
    matrix is not on a boundary of 16 bytes: MKL on an AMD EPYC does.
    """
    i2v = (folder / "image_encoder").is_dir()
    pipe = (WanImageToVideoPipeline if i2v else WanPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for weight in () if mapped else _weights(pipe):
        weight.data = weight.data.clone()
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    small: dict[str, Any] = {"transformer": {"num_layers": 3}, "vae": {"base_dim": 8}}
    return {
        "i2v": write_tiny_model(base / "i2v", seed=1, **small),
        "t2v": write_tiny_model(base / "t2v", seed=2, image_to_video=False, **small),
    }


def _picture() -> Image.Image:
    grey = Image.radial_gradient("L").resize((32, 32))
    return Image.merge("RGB", (grey, grey.rotate(90), grey.transpose(Image.Transpose.ROTATE_180)))


def _call(pipe: Any, **changes: Any) -> Any:
    inputs: dict[str, Any] = {
        "prompt": "dance monkey",
        "negative_prompt": "negative",
        "height": 32,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }
    if isinstance(pipe, WanImageToVideoPipeline):
        inputs["image"] = _picture()
    result = pipe(**{k: v for k, v in (inputs | changes).items() if v is not ...})
    return result[0] if isinstance(result, tuple) else result.frames


def _callback(pipe: Any) -> Any:
    """Sees every step's tensors and changes them, as diffusers' tests do."""
    seen: list[Tensor] = []

    def on_step(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
        seen.append(tensors["latents"].clone())
        return {
            "latents": tensors["latents"] * 0.5,
            "prompt_embeds": tensors["prompt_embeds"] * 1.5,
            "negative_prompt_embeds": tensors["negative_prompt_embeds"],
        }

    frames = _call(
        pipe,
        callback_on_step_end=on_step,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"],
    )
    assert len(seen) == 2
    return torch.cat([frames.flatten(), *(each.flatten() for each in seen)])


def _interrupted(pipe: Any) -> Any:
    """Stops after the first of four steps."""
    steps = []

    def on_step(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        steps.append(step)
        pipe._interrupt = True
        return tensors

    frames = _call(pipe, num_inference_steps=4, callback_on_step_end=on_step, output_type="latent")
    assert steps == [0]
    return frames


def _embedded(pipe: Any) -> Any:
    """Prompts encoded beforehand (gradients choose another attention kernel of torch)."""
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt("a cat", "a dog", max_sequence_length=512)
    return _call(
        pipe, prompt=..., negative_prompt=..., prompt_embeds=prompt, negative_prompt_embeds=negative
    )


def _latents(pipe: Any) -> Any:
    """Noise of one's own."""
    noise = torch.randn(1, 16, 2, 4, 2, generator=torch.Generator().manual_seed(5))
    return _call(pipe, latents=noise, generator=...)


def _picture_states(pipe: Any) -> Any:
    """A picture as a tensor, its states encoded beforehand, and a last picture."""
    states = pipe.encode_image(_picture(), "cpu")
    assert pipe.transformer.config.image_dim == states.shape[-1]
    pixels = torch.linspace(0, 1, 3 * 32 * 16).reshape(1, 3, 32, 16)
    return torch.cat([states.flatten(), _call(pipe, image=pixels).flatten()])


CALLS: dict[str, Callable[[Any], Any]] = {
    "plain": _call,
    "np": lambda pipe: _call(pipe, output_type="np"),
    "pil": lambda pipe: np.stack([np.asarray(f) for f in _call(pipe, output_type="pil")[0]]),
    "latent": lambda pipe: _call(pipe, output_type="latent"),
    "tuple": lambda pipe: _call(pipe, return_dict=False),
    "no guidance": lambda pipe: _call(pipe, guidance_scale=1.0, negative_prompt=...),
    "one frame": lambda pipe: _call(pipe, num_frames=1),
    "callback": _callback,
    "interrupt": _interrupted,
    "embeds": _embedded,
    "latents": _latents,
}
ONLY = {
    "i2v": {"picture states": _picture_states},
    "t2v": {"short": lambda pipe: _call(pipe, max_sequence_length=16)},
}
BATCHES = {
    "prompts": lambda pipe: _call(
        pipe,
        prompt=["a cat", "a dog, seen from afar"],
        negative_prompt=["", "blurry"],
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
    ),
    "videos": lambda pipe: _call(pipe, num_videos_per_prompt=2),
}


@dataclass
class Outcome:
    """Results by call: of the plain pipeline, attached, and after it was detached."""

    plain: dict[str, Any]
    attached: dict[str, Any]
    after: dict[str, Any]
    report: penstock.AttachReport
    same_weights: bool


@pytest.fixture(scope="module", params=["i2v", "t2v"])
def outcome(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: Any
) -> Outcome:
    kind = request.param
    pipe = _open(folders[kind])
    calls = CALLS | ONLY[kind] | BATCHES
    if kind == "i2v":
        calls = {name: call for name, call in calls.items() if name != "videos"}
    models = {name: getattr(pipe, name, None) for name in PARTS}
    before = {
        name: [(key, id(p), p.detach().clone()) for key, p in model.named_parameters()]
        for name, model in models.items()
        if model is not None
    }
    config = dict(pipe.config)
    plain = {name: call(pipe) for name, call in calls.items()}
    handle = penstock.attach(pipe, vram=VRAM, ram=RAM, folder=tmp_path_factory.mktemp("live"))
    assert not isinstance(pipe.transformer, type(models["transformer"]))
    attached = {name: call(pipe) for name, call in calls.items()}
    report = handle.report
    penstock.detach(pipe)
    assert dict(pipe.config) == config
    assert all(getattr(pipe, name, None) is model for name, model in models.items())
    same = all(
        id(p) == key and torch.equal(p, values)
        for name, known in before.items()
        for (_, key, values), p in zip(known, models[name].parameters(), strict=True)
    )
    after = {name: calls[name](pipe) for name in ("plain", "callback")}
    return Outcome(plain, attached, after, report, same)


def _equal(one: Any, other: Any) -> bool:
    return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))


def test_every_call_gives_the_bits_of_the_plain_pipeline(outcome: Outcome) -> None:
    wanted = {name: each for name, each in outcome.plain.items() if name not in BATCHES}
    differ = [n for n, each in wanted.items() if not same_after_umt5(outcome.attached[n], each)]
    assert differ == []
    # The calls differ from each other, so that equality means something.
    assert not _equal(outcome.plain["plain"], outcome.plain["no guidance"])
    assert not _equal(outcome.plain["plain"], outcome.plain["embeds"])


def test_weights_mapped_from_a_file_change_no_more_than_rounding(folders: dict[str, Path]) -> None:
    pipe = _open(folders["i2v"], mapped=True)
    assert any(weight.data_ptr() % 16 for weight in _weights(pipe))
    wanted = _call(pipe)
    with penstock.attach(pipe, vram=VRAM, ram=RAM):
        found = _call(pipe)
    assert (wanted - found).abs().max() <= 5e-6  # 2.2e-6 on an EPYC
    # Nothing but where they lie was different: detached they are on boundaries too.
    assert same_after_umt5(_call(pipe), found)


def test_batches_are_those_of_the_plain_pipeline(outcome: Outcome) -> None:
    names = [name for name in BATCHES if name in outcome.plain]
    assert names
    for name in names:
        wanted, found = outcome.plain[name], outcome.attached[name]
        assert wanted.shape == found.shape and wanted.shape[0] == 2
        assert not torch.equal(wanted[0], wanted[1])
        assert (wanted - found).abs().max() <= 2e-5


def test_two_videos_of_one_picture(folders: dict[str, Path]) -> None:
    """diffusers 0.42 fails where one picture meets two videos: it is asked with two prompts."""
    pipe = _open(folders["i2v"])
    wanted = _call(pipe, prompt=["a cat"] * 2, negative_prompt=["blurry"] * 2)
    with penstock.attach(pipe, vram=VRAM, ram=RAM):
        found = _call(pipe, prompt="a cat", negative_prompt="blurry", num_videos_per_prompt=2)
    assert found.shape == wanted.shape and found.shape[0] == 2
    assert not torch.equal(found[0], found[1])
    assert (wanted - found).abs().max() <= 2e-5


def test_detached_it_is_what_it_was(outcome: Outcome) -> None:
    assert outcome.same_weights
    for name, wanted in outcome.after.items():
        assert _equal(wanted, outcome.plain[name])


def test_nothing_is_held_between_calls(outcome: Outcome) -> None:
    report = outcome.report
    assert (report.vram_bytes, report.ram_bytes) == (0, 0)
    assert 0 < report.peak_vram_bytes <= report.vram_limit_bytes
    assert 0 < report.peak_ram_bytes <= report.ram_limit_bytes
    assert report.copied_bytes > report.disk_bytes > 0


def test_memory_is_back_after_detach(folders: dict[str, Path]) -> None:
    pipe = _open(folders["i2v"])
    weights = _weights(pipe)
    nbytes = sum(p.nbytes for p in weights)
    with StorageMeter(weights) as meter:
        handle = penstock.attach(pipe, vram=VRAM, ram=RAM)
        assert meter.live <= 0.01 * nbytes
        assert sum(p.nbytes for p in weights) == 0  # the pipeline's own memory is free
        _call(pipe)
        assert meter.live <= 0.01 * nbytes and handle.report.vram_bytes == 0
        with pytest.raises(ZeroDivisionError):
            _call(pipe, callback_on_step_end=lambda *_: 1 / 0)
        assert handle.report.vram_bytes > 0  # the step's weights
        handle.unload()
        assert meter.live <= 0.01 * nbytes and handle.report.vram_bytes == 0
        penstock.detach(pipe)
        assert sum(p.nbytes for p in weights) == nbytes
        assert meter.live <= 1.01 * nbytes


def test_a_small_budget_is_kept_by_chunks_and_tiles(folders: dict[str, Path]) -> None:
    pipe = _open(folders["t2v"])
    with StorageMeter() as meter:
        wanted = _call(pipe, height=64, width=48)
    with penstock.attach(pipe, vram="1MiB", ram=RAM), pytest.raises(OverBudget) as refused:
        _call(pipe, height=64, width=48)
    limit = refused.value.need_bytes
    with penstock.attach(pipe, vram=limit, ram=RAM) as handle:
        found = _call(pipe, height=64, width=48)
        assert handle.report.peak_vram_bytes <= limit
    assert (wanted - found).abs().max() <= 2e-5
    assert limit < 0.6 * meter.peak  # weights that the plain pipeline touched, and its activations


@pytest.mark.parametrize("name", ["i2v", "t2v"])
def test_a_pipeline_opened_lazily(name: str, folders: dict[str, Path]) -> None:
    plain = _open(folders[name])
    wanted = _call(plain)
    nbytes = sum(weight.nbytes for weight in _weights(plain))
    with StorageMeter() as meter:
        pipe = penstock.load_pipeline(folders[name], vram=VRAM, ram=RAM)
        assert meter.peak < 0.1 * nbytes  # rotary tables
    assert type(pipe) is type(plain) and pipe.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    assert {k: v for k, v in pipe.transformer.config.items() if k[0] != "_"} == {
        k: v for k, v in plain.transformer.config.items() if k[0] != "_"
    }
    assert same_after_umt5(_call(pipe), wanted)
    penstock.detach(pipe)
    with pytest.raises(UsageError, match="was detached"):
        _call(pipe)


def test_a_lazy_transformer_never_holds_its_weights_whole(tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path / "deep",
        image_to_video=False,
        transformer={"num_layers": 24, "ffn_dim": 2048},
        vae={"base_dim": 8},
    )
    pipe = penstock.load_pipeline(folder, vram="10MiB", ram="16MiB")
    model = pipe.transformer.attached._desk.model.transformer
    nbytes = sum(layout.nbytes for layout in model.blocks)
    latents, text = torch.randn(1, 16, 2, 4, 2), torch.randn(1, 512, 48)
    with StorageMeter([latents, text]) as meter:
        out = pipe.transformer(latents, torch.tensor([5.0]), text).sample
    report = pipe.transformer.attached.report
    # The meter sees the buffers in host memory too.
    assert meter.peak <= report.peak_vram_bytes + report.peak_ram_bytes + out.nbytes
    assert report.peak_vram_bytes <= report.vram_limit_bytes
    assert report.peak_ram_bytes <= report.ram_limit_bytes
    assert meter.peak < 0.6 * nbytes
    penstock.detach(pipe)


@pytest.mark.parametrize(("format", "least"), [("int8", 0.999), ("fp8", 0.98)])
def test_quantised(folders: dict[str, Path], format: str, least: float) -> None:
    pipe = _open(folders["t2v"])
    wanted = _call(pipe, output_type="latent").flatten().double()
    with penstock.attach(pipe, vram=VRAM, ram=RAM, format=format):
        found = _call(pipe, output_type="latent").flatten()
    assert torch.nn.functional.cosine_similarity(wanted, found.double(), dim=0) >= least
    # 4.5e-4 and more; rounding alone, had nothing been quantised, makes some 1e-6.
    assert (wanted - found).norm() > 1e-4 * wanted.norm()
    lazy = penstock.load_pipeline(folders["t2v"], vram=VRAM, ram=RAM, format=format)
    lazy.set_progress_bar_config(disable=True)
    assert torch.equal(_call(lazy, output_type="latent").flatten(), found)
    penstock.detach(lazy)


def _hooked(pipe: Any) -> None:
    pipe.transformer._hf_hook = object()


def _adapted(pipe: Any) -> None:
    pipe.transformer.blocks[0].attn1.to_q.base_layer = nn.Identity()


def _processed(pipe: Any) -> None:
    pipe.transformer.blocks[1].attn1.processor = object()


def _cached(pipe: Any) -> None:
    pipe.transformer._is_cached = True  # what cache_dit.enable_cache leaves


def _flexible(pipe: Any) -> None:
    pipe.transformer.set_attention_backend("flex")


def _lost(pipe: Any) -> None:
    pipe.text_encoder = None


def _foreign(pipe: Any) -> None:
    pipe.vae = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_hooked, "transformer is hooked"),
        (_adapted, r"blocks\.0\.attn1\.to_q carries an adapter.*fuse_lora"),
        (_processed, r"blocks\.1\.attn1 has an attention processor"),
        (_cached, "cache of cache-dit"),
        (_flexible, r"blocks\.0\.attn1 has an attention backend of its own.*found flex"),
        (lambda pipe: pipe.transformer.compile(backend="eager"), "transformer was compiled"),
        (_lost, "text_encoder cannot be run.*found none"),
        (_foreign, "vae cannot be run.*found Linear"),
        (lambda pipe: pipe.vae.to("meta"), "cannot be streamed"),
    ],
)
def test_what_is_refused(
    spoil: Any,
    message: str,
    folders: dict[str, Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A model's set_attention_backend changes the backend of every model of the process.
    backends = importlib.import_module("diffusers.models.attention_dispatch")
    registry = backends._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    pipe = _open(folders["t2v"])
    spoil(pipe)
    models = {name: getattr(pipe, name, None) for name in PARTS}
    with pytest.raises(UsageError, match=message):
        penstock.attach(pipe, vram=VRAM, ram=RAM)
    assert all(getattr(pipe, name, None) is model for name, model in models.items())
    assert not cache.exists() or list(cache.iterdir()) == []


def test_what_the_weights_took_is_free(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, held = _open(folders["t2v"]), list[int]()
    weights, honest = _weights(pipe), attach_pipe.budgets

    def watched(*arguments: Any) -> Hardware:
        held.append(sum(weight.nbytes for weight in weights))
        return replace(honest(*arguments), vram_bytes=(48 << 20) + len(held))

    monkeypatch.setattr(attach_pipe, "budgets", watched)
    with penstock.attach(pipe) as attached:
        assert attached.report.vram_limit_bytes == (48 << 20) + 2
    assert held[0] > held[1] == 0


def test_a_gpu_is_the_same_with_and_without_its_index(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = _open(folders["t2v"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with penstock.attach(pipe, vram=VRAM, ram=RAM):
        part = pipe.transformer
        part.device = torch.device("cuda", 1)
        assert part.to("cuda") is part and part.to("cuda:1") is part
        with pytest.raises(UsageError, match="cannot be moved"):
            part.to("cuda:0")


def test_what_an_attached_pipeline_refuses(folders: dict[str, Path]) -> None:
    pipe = _open(folders["i2v"])
    with pytest.raises(UsageError, match="not attached"):
        penstock.detach(pipe)
    with pytest.raises(UsageError, match="Linear cannot be attached"):
        penstock.attach(nn.Linear(2, 2))
    kept = pipe.transformer
    penstock.attach(pipe, vram=VRAM, ram=RAM)
    part = pipe.transformer
    with pytest.raises(UsageError, match="attached already"):
        penstock.attach(pipe, vram=VRAM, ram=RAM)
    pipe.to("cpu")
    for move in ({"dtype": torch.float16}, {"device": "meta"}):
        with pytest.raises(UsageError, match="cannot be moved or cast"):
            pipe.to(**move)
    with pytest.raises(UsageError, match="does not take attention_kwargs"):
        _call(pipe, attention_kwargs={"scale": 0.5})
    with pytest.raises(UsageError, match="takes padded prompts"):
        pipe.text_encoder(torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(UsageError, match=r"hidden_states\[-2\] alone"):
        pipe.image_encoder(torch.zeros(1, 3, 32, 32)).hidden_states[-1]
    with pytest.raises(UsageError, match="mode alone"):
        pipe.vae.encode(torch.zeros(1, 3, 1, 16, 16)).latent_dist.sample()
    with pytest.raises(AttributeError, match=r"penstock\.detach"):
        pipe.transformer.blocks  # noqa: B018
    with pytest.raises(UsageError, match="is not on the device"):
        kept(torch.zeros(1, 36, 1, 2, 2), torch.tensor([1]), torch.zeros(1, 512, 48))
    penstock.detach(pipe)
    with pytest.raises(UsageError, match="was detached"):
        part(torch.zeros(1, 36, 1, 2, 2), torch.tensor([1.0]), torch.zeros(1, 512, 48))


def test_a_pipeline_that_nobody_has_any_more_ends_quietly(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    loud = list[Any]()
    monkeypatch.setattr(sys, "unraisablehook", loud.append)
    pipe = _open(folders["t2v"])
    penstock.attach(pipe, vram=VRAM, ram=RAM)
    del pipe
    gc.collect()
    assert loud == [] and list(cache.iterdir()) == []


def test_a_full_disk_leaves_the_pipeline_as_it_was(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = _open(folders["t2v"])
    wanted = _call(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(FileOps, "free_bytes", lambda self, folder: 1000)
        with pytest.raises(StorageError, match="no space"):
            penstock.attach(pipe, vram=VRAM, ram=RAM)
    assert torch.equal(_call(pipe), wanted)


def test_every_family_says_whether_it_has_parts() -> None:
    for family in families():
        assert not family.claims(object())  # type: ignore[attr-defined]
        assert callable(getattr(family, "has_parts_for", None))


def test_a_foreign_scheduler_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders["t2v"], folder)
    for name in ("WanPipeline", "os.system", "__name__"):
        text = f'{{"_class_name": "{name}"}}'
        (folder / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(PenstockError, match="scheduler cannot be used"):
            penstock.load_pipeline(folder, vram=VRAM, ram=RAM)


@pytest.mark.parametrize("latent", [(1, 4, 6), (3, 6, 8), (6, 4, 4)])
def test_whole_frames_take_no_more_than_is_reserved(latent: tuple[int, int, int]) -> None:
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(base_dim=16, num_res_blocks=1).eval()
    weights = Weights(0, (), 4)
    spec = VaeSpec(weights, weights, 16, 16, (1, 2, 4, 4), 1, (False, True, True))
    frames, height, width = 4 * latent[0] - 3, 8 * latent[1], 8 * latent[2]
    clip = torch.randn(1, 3, frames, height, width)
    ours = replace(spec), TileGrid(1, 1)
    for call, given, cost in (
        (vae.decode, torch.randn(1, 16, *latent), vae_cost.decode_bytes),
        (vae.encode, clip, vae_cost.encode_bytes),
    ):
        reserved = WHOLE_FRAMES * sum(n for _, n in cost(ours[0], latent, ours[1], 4).device)
        with torch.no_grad(), StorageMeter(vae.parameters()) as meter:
            given = given.clone()
            call(given)
        assert meter.peak <= reserved + 2 * clip.nbytes
