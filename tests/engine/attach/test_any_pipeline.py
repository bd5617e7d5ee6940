"""`penstock.attach` of pipelines that penstock does not know: the same bits within the budgets."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor, nn

import penstock
from benchmarks.pipelines import attached, class_names, classes, least
from benchmarks.tiny_pipelines import build
from penstock.engine.attach import pipe as attach_pipe
from penstock.errors import OverBudget, UsageError
from tests.engine.attach.zoo import Walk
from tests.versions import DIFFUSERS_0_36, TRANSFORMERS_4

ROOM = "64MiB"


NEW = pytest.mark.skipif(TRANSFORMERS_4 or DIFFUSERS_0_36, reason="its parts are newer")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Wan-Animate", marks=NEW), "Z-Image", "SDXL ControlNet",
        pytest.param("MiniMax-H3", marks=NEW),
    ],
)  # fmt: skip
def test_at_the_least_budget_nothing_changes(name: str, tmp_path: Path) -> None:
    """Interleaved lists; a decoder LM; a UNet beside a ControlNet; a ModularPipeline. The whole
    list is `python -m benchmarks.pipelines`."""
    made = build(name)
    outcome = attached(name, made, tmp_path)
    assert outcome.equal and outcome.equal_after
    assert outcome.peak <= outcome.planned
    assert outcome.vram < outcome.weights
    assert list(tmp_path.iterdir()) == []


class Turns(DiffusionPipeline):
    """Two networks that take turns, step by step, and one that begins."""

    def __init__(self, first: nn.Module, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.register_modules(first=first, left=left, right=right)

    @torch.no_grad()
    def __call__(self, steps: int = 6) -> Tensor:
        x = self.first(torch.linspace(-1, 1, 32).reshape(2, 16))
        for _ in range(steps):
            x = torch.tanh(self.right(self.left(x)))
        self.maybe_free_model_hooks()
        return x


class Headed(Walk):
    """Blocks, and weights outside them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


def _turns() -> Turns:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Turns(Headed(), Headed(), Headed())


def test_networks_that_take_turns_share_the_budget() -> None:
    """What both hold stays, so that a step reads less than all of both."""
    pipe = _turns()
    wanted = pipe()
    need, ram = least(pipe, Path())
    both = sum(p.nbytes for p in (*pipe.left.parameters(), *pipe.right.parameters()))
    with penstock.attach(pipe, vram=need + both, ram=8 * ram) as handle:
        assert torch.equal(pipe(20), pipe(20))
        read = handle.report.read_bytes
        assert torch.equal(pipe(), wanted)
    assert read < 2 * 20 * both / 3


def test_nothing_is_held_between_calls() -> None:
    pipe = _turns()
    buffers = sum(t.nbytes for each in pipe.components.values() for t in each.buffers())
    with penstock.attach(pipe, vram=ROOM, ram=ROOM) as handle:
        pipe()
        assert handle.report.vram_bytes == buffers and handle.report.ram_bytes == 0
        with torch.no_grad():
            pipe.left(torch.zeros(1, 16))
        assert handle.report.vram_bytes > buffers
        handle.unload()
        assert handle.report.vram_bytes == buffers


def test_the_need_in_the_refusal_is_exact() -> None:
    pipe = _turns()
    before = [p.data_ptr() for p in pipe.left.parameters()]
    need, ram = least(pipe, Path())
    for budgets in ({"vram": need - 1, "ram": ram}, {"vram": need, "ram": ram - 1}):
        with pytest.raises(OverBudget):
            penstock.attach(pipe, **budgets)
    with pytest.raises(OverBudget, match="activations"):
        penstock.attach(pipe, vram=need, ram=ram, activations=1 << 20)
    assert [p.data_ptr() for p in pipe.left.parameters()] == before
    with penstock.attach(pipe, vram=need, ram=ram):
        pipe()


def test_a_pipeline_that_nobody_has_any_more_ends_quietly(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, loud = threading.active_count(), list[Any]()
    monkeypatch.setattr(sys, "unraisablehook", loud.append)
    pipe = _turns()
    penstock.attach(pipe, vram=ROOM, ram=ROOM)
    kept = pipe.left
    with torch.no_grad():
        wanted = kept(torch.ones(1, 16))
    pipe(steps=1)
    del pipe
    gc.collect()
    with torch.no_grad():  # whoever keeps a module keeps what brings its weights
        assert torch.equal(kept(torch.ones(1, 16)), wanted)
    del kept
    gc.collect()
    assert loud == [] and threading.active_count() == threads
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda pipe: pipe.to(torch.bfloat16), "cannot be moved or cast"),
        (lambda pipe: pipe.right.half(), "cannot be moved or cast"),
        (lambda pipe: pipe.left.load_state_dict({}), "load_state_dict"),
        (lambda pipe: penstock.attach(pipe), "attached already"),
        (lambda pipe: penstock.attach(Turns(pipe.first, nn.Identity(), nn.Identity())), "already"),
    ],
)
def test_what_an_attached_pipeline_refuses(use: Any, message: str) -> None:
    pipe = _turns()
    wanted = pipe()
    with penstock.attach(pipe, vram=ROOM, ram=ROOM):
        with pytest.raises(UsageError, match=message):
            use(pipe)
        assert torch.equal(pipe(), wanted)
    assert torch.equal(pipe(), wanted)
    with pytest.raises(UsageError, match="not attached"):
        penstock.detach(pipe)


class _Half(nn.Linear):
    """A VAE that pipelines cast to fp32 in the middle of a call."""

    config = SimpleNamespace(force_upcast=True)
    dtype = torch.float16


def _offloaded(pipe: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.right, ModelHook())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_offloaded, "right is under a hook of accelerate"),
        (lambda pipe: pipe.left.compile(backend="eager"), "left was compiled"),
        (lambda pipe: setattr(pipe, "right", _Half(2, 2)), "cast to fp32 while the pipeline runs"),
        (lambda pipe: pipe.right.to("meta"), "with its values"),
    ],
)
def test_what_is_not_attached(spoil: Any, message: str, cache: Path) -> None:
    pipe = _turns()
    spoil(pipe)
    before = [p.data_ptr() for p in pipe.first.parameters()]
    with pytest.raises(UsageError, match=message):
        penstock.attach(pipe, vram=ROOM, ram=ROOM)
    assert [p.data_ptr() for p in pipe.first.parameters()] == before
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_pipeline_without_torch_modules_is_refused() -> None:
    with pytest.raises(UsageError, match="components that are torch modules"):
        penstock.attach(Turns(nn.Identity(), nn.Identity(), nn.Identity()))


class Alone(DiffusionPipeline):
    """One network, called with what it is asked."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, **asked: Any) -> Any:
        return self.transformer(**asked)


def _flux() -> tuple[Alone, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        module = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=4, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        asked = {
            "hidden_states": torch.randn(1, 16, 4), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": torch.randn(1, 6, 32), "return_dict": False,
            "pooled_projections": torch.randn(1, 32), "img_ids": torch.randn(16, 3),
            "txt_ids": torch.randn(6, 3),
        }  # fmt: skip
        return Alone(module.eval().requires_grad_(False)), asked


def test_a_lora_in_the_pipeline_works_as_before() -> None:
    from peft import LoraConfig

    pipe, asked = _flux()
    plain = pipe(**asked)[0]
    config = LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe.transformer.add_adapter(config)
    wanted = [pipe(**asked, joint_attention_kwargs={"scale": s})[0] for s in (1.0, 0.25)]
    need, ram = least(pipe, Path())
    with penstock.attach(pipe, vram=need, ram=ram):
        found = [pipe(**asked, joint_attention_kwargs={"scale": s})[0] for s in (1.0, 0.25)]
        with pytest.raises(UsageError, match="add_adapter"):
            pipe.transformer.add_adapter(config, "another")
    assert all(map(torch.equal, found, wanted)) and not torch.equal(plain, wanted[0])


def test_what_the_modules_hold_of_a_gpu_is_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = _turns()
    monkeypatch.setattr(attach_pipe, "held_bytes", lambda module, hardware: 1 << 20)
    free = attach_pipe.budgets("cpu", "64MiB", ROOM)
    monkeypatch.setattr(attach_pipe, "budgets", lambda *_: free)
    with penstock.attach(pipe, device="cpu") as handle:
        assert handle.report.vram_limit_bytes == free.vram_bytes + (3 << 20)
    with penstock.attach(pipe, vram="64MiB", device="cpu") as handle:
        assert handle.report.vram_limit_bytes == free.vram_bytes


@NEW
def test_a_transformer_that_asks_for_dtypes_runs_quantised(tmp_path: Path) -> None:
    """MiniMax-H3's blocks and token refiner cast what they compute with to their layers' dtype."""
    tiny = build("MiniMax-H3")
    transformer = tiny.pipe.transformer
    wanted = tiny.call()[0]
    with penstock.attach(tiny.pipe, vram=ROOM, ram=ROOM, format="fp8", folder=tmp_path):
        found = tiny.call()[0]
        assert type(transformer.transformer_blocks[0].attn.to_q).__name__ == "QuantLinear"
    assert not torch.equal(found, wanted)
    assert (found - wanted).abs().mean() < 0.1 * wanted.std()


def test_a_step_cache_saves_its_transfers() -> None:
    """Five steps of which the cache computes the first block alone, after one that is whole."""
    pipe, asked = _flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))

    def steps() -> list[Tensor]:
        with pipe.transformer.cache_context("cond"):
            made = [
                pipe(**{**asked, "timestep": torch.tensor([t])})[0] for t in (0.9, 0.8, 0.7, 0.6)
            ]
        pipe.transformer._reset_stateful_cache()
        return made

    wanted = steps()
    need, ram = least(pipe, Path())
    with penstock.attach(pipe, vram=need, ram=ram) as handle:
        found = steps()
        read = handle.report.read_bytes
    assert all(map(torch.equal, found, wanted))
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    first = sum(p.nbytes for p in pipe.transformer.transformer_blocks[0].parameters())
    assert read <= weights + 3 * first  # no more than what is computed


def test_a_decoder_lm_writes_with_its_cache() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model: Any = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
        )).eval()  # fmt: skip
    pipe = Alone(model)
    ids = torch.tensor([[5, 9, 12]])

    def written() -> Tensor:
        made: Tensor = pipe.transformer.generate(ids, max_new_tokens=6, do_sample=False)
        return made

    wanted = written()
    need, ram = least(pipe, Path())
    with penstock.attach(pipe, vram=need, ram=ram):
        assert torch.equal(written(), wanted)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_hunyuan_video_15_needs_no_mask_of_all_by_all() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module = HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=2, num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=20,
            image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=64, task_type="t2v",
        ).eval()  # fmt: skip
        asked = {
            "hidden_states": torch.randn(2, 9, 2, 4, 4), "timestep": torch.tensor([500.0, 300.0]),
            "encoder_hidden_states": torch.randn(2, 12, 32),
            "encoder_attention_mask": torch.arange(12)[None] < torch.tensor([[7], [4]]),
            "encoder_hidden_states_2": torch.randn(2, 8, 20),
            "encoder_attention_mask_2": torch.arange(8)[None] < torch.tensor([[3], [0]]),
            "image_embeds": torch.zeros(2, 5, 12), "return_dict": False,
        }  # fmt: skip
    pipe = Alone(module)
    wanted = pipe(**asked)[0]
    with penstock.attach(pipe, vram=ROOM, ram=ROOM, exact=True) as handle:
        assert torch.equal(pipe(**asked)[0], wanted) and handle.notices == ()
    masks: list[Any] = []
    honest = nn.functional.scaled_dot_product_attention

    def watched(*arguments: Any, **named: Any) -> Any:
        masks.append(named.get("attn_mask"))
        return honest(*arguments, **named)

    with (
        pytest.MonkeyPatch.context() as patch,
        penstock.attach(pipe, vram=ROOM, ram=ROOM) as handle,
    ):
        patch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        found = pipe(**asked)[0]
    assert "padded text is left out" in handle.notices[0]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    blocks = [each for each in masks if each is None]
    assert len(blocks) >= 2 * 2  # two blocks, a sample at a time
    assert torch.equal(pipe(**asked)[0], wanted)


@pytest.mark.faults
def test_classes_of_pipelines_get_a_verdict() -> None:
    assert len(class_names()) > 200
    looked_at = ("MochiPipeline", "DiffusionPipeline", "StableDiffusionXLPipeline")
    assert {*looked_at} <= {*class_names()}
    verdicts = {each.pipeline: each for each in classes(looked_at)}
    mochi = verdicts["MochiPipeline"]
    assert mochi.verdict == "should run" and "MochiTransformer3DModel" in mochi.why
    assert verdicts["DiffusionPipeline"].verdict == "refused"
    assert "VAE in fp16" in verdicts["StableDiffusionXLPipeline"].why
