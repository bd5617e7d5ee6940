from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.model.binding import bind, bound, skeleton, unbind, unbound
from penstock.errors import TensorMismatch
from tests.tiny_transformer import TINY, inputs, tiny_transformer

BLOCK = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "cross_attn_norm": True}


class Int8Linear(nn.Module):
    """A linear layer whose storage has other names than `nn.Linear`'s."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8, device="meta"))
        self.register_buffer("weight_scale", torch.empty(rows, 1, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.weight_scale).T


def test_a_skeleton_has_no_bytes_no_grad_and_is_in_eval_mode() -> None:
    model = skeleton(WanTransformer3DModel, TINY)
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert set(unbound(model)) == set(model.state_dict())


def test_a_skeleton_keeps_the_random_state() -> None:
    before = torch.get_rng_state()
    skeleton(WanTransformerBlock, BLOCK)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_that_no_checkpoint_carries_are_real() -> None:
    expected = WanTransformer3DModel(**TINY).rope
    rope = skeleton(WanTransformer3DModel, TINY).rope
    assert torch.equal(rope.freqs_cos, expected.freqs_cos)
    assert torch.equal(rope.freqs_sin, expected.freqs_sin)

    clip = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    positions = [b for n, b in skeleton(CLIPVisionModel, clip).named_buffers() if "position" in n]
    assert [p.tolist() for p in positions] == [[[0, 1, 2, 3, 4]]]


def test_skeleton_of_a_saved_config(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m") / "transformer"
    saved = WanTransformer3DModel.from_pretrained(folder)
    model = skeleton(WanTransformer3DModel, WanTransformer3DModel.load_config(folder))
    shapes = {name: tensor.shape for name, tensor in saved.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_a_bound_skeleton_computes_what_the_model_does() -> None:
    model = tiny_transformer()
    twin = skeleton(WanTransformer3DModel, TINY)
    bind(twin, model.state_dict())
    latents, text, _ = inputs(model, (2, 4, 6), torch.float32)
    step = torch.tensor([500])
    assert torch.equal(twin(latents, step, text).sample, model(latents, step, text).sample)


def test_a_transformers_model_too() -> None:
    config = UMT5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    twin = skeleton(UMT5EncoderModel, config)
    assert set(unbound(twin)) == set(model.state_dict())
    bind(twin, model.state_dict())
    ids = torch.arange(5)[None]
    assert torch.equal(twin(ids).last_hidden_state, model(ids).last_hidden_state)


def test_binding_copies_nothing() -> None:
    block = skeleton(WanTransformerBlock, BLOCK)
    weight = torch.randn(24, 24, dtype=torch.bfloat16)
    bind(block, {"attn1.to_q.weight": weight})
    assert block.attn1.to_q.weight.data_ptr() == weight.data_ptr()
    assert "attn1.to_q.weight" not in unbound(block)
    assert "attn1.to_k.weight" in unbound(block)


def test_one_block_skeleton_serves_all_blocks() -> None:
    model = tiny_transformer()
    block = skeleton(WanTransformerBlock, BLOCK)
    for real in model.blocks:
        with bound(block, real.state_dict()) as current:
            assert unbound(current) == ()
            assert torch.equal(current.ffn.net[2].weight, real.ffn.net[2].weight)


def test_unbinding_lets_the_memory_go() -> None:
    block = skeleton(WanTransformerBlock, BLOCK)
    tensors = {"attn1.to_q.weight": torch.randn(24, 24), "scale_shift_table": torch.randn(1, 6, 24)}
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in tensors.values()]
    bind(block, tensors)
    del tensors
    assert all(storage() is not None for storage in storages)
    unbind(block)
    assert all(storage() is None for storage in storages)
    assert set(unbound(block)) == set(block.state_dict())


def test_unbinding_keeps_what_no_checkpoint_brings_back() -> None:
    model = skeleton(WanTransformer3DModel, TINY)
    unbind(model)
    assert not model.rope.freqs_cos.is_meta


def test_bound_unbinds_after_an_error() -> None:
    block = skeleton(WanTransformerBlock, BLOCK)
    with pytest.raises(ZeroDivisionError), bound(block, {"attn1.to_q.weight": torch.ones(24, 24)}):
        raise ZeroDivisionError
    assert "attn1.to_q.weight" in unbound(block)


def test_a_replaced_linear_takes_its_own_names() -> None:
    block = skeleton(WanTransformerBlock, BLOCK)
    block.attn1.to_q = Int8Linear(24, 24)
    weight = torch.randint(-9, 9, (24, 24), dtype=torch.int8)
    scale = torch.rand(24, 1)
    bind(block, {"attn1.to_q.weight": weight, "attn1.to_q.weight_scale": scale})
    assert torch.equal(block.attn1.to_q(torch.eye(24)), (weight * scale).T)
    unbind(block)
    assert {"attn1.to_q.weight", "attn1.to_q.weight_scale"} <= set(unbound(block))
    with pytest.raises(TensorMismatch, match=r"attn1\.to_q\.bias"):
        bind(block, {"attn1.to_q.bias": torch.zeros(24)})


@pytest.mark.parametrize("name", ["nonsense", "attn1.nonsense", "attn9.to_q.weight", "attn1.to_q"])
def test_an_unknown_name_is_refused(name: str) -> None:
    block = skeleton(WanTransformerBlock, BLOCK)
    with pytest.raises(TensorMismatch, match=name):
        bind(block, {name: torch.zeros(1)})


def test_a_buffer_that_no_checkpoint_carries_is_no_name() -> None:
    model = skeleton(WanTransformer3DModel, TINY)
    with pytest.raises(TensorMismatch, match=r"rope\.freqs_cos"):
        bind(model, {"rope.freqs_cos": model.rope.freqs_cos})


def test_misfits_are_counted_and_nothing_is_bound() -> None:
    block = skeleton(WanTransformerBlock, BLOCK)
    tensors = {
        "attn1.to_q.weight": torch.zeros(24, 24),
        "attn1.to_k.weight": torch.zeros(24, 12),
        "extra": torch.zeros(1),
    }
    with pytest.raises(TensorMismatch) as error:
        bind(block, tensors)
    assert "2 of 3 tensors" in str(error.value)
    assert "attn1.to_k.weight" in str(error.value)
    assert "(24, 24)" in str(error.value)
    assert "(24, 12)" in str(error.value)
    assert "attn1.to_q.weight" in unbound(block)
