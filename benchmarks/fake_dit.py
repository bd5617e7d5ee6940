"""Activation memory of the Wan2.1 I2V 14B transformer at its true shapes, without its weights.

Fake tensors have shapes and storages but no bytes, so the 14B model at 720p runs in seconds on any
machine. Counted is every storage that an operation makes, weights excepted:

- ``lean``: our forward with one and with two branches, and how much of it is cross-attention K/V
  (kept for a whole prompt instead of the projections' weights);
- ``diffusers``: the forward of `WanTransformer3DModel` for one branch, then with its weights.

The last line on stdout is JSON, in GiB.

    python -m benchmarks.fake_dit [--blocks 40] [--chunk 2048]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.engine.families.wan import forward
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS
from penstock.units import GIB
from tests.meter import StorageMeter

I2V_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
SHAPES = {"720x1280x81": (21, 90, 160), "528x960x77": (20, 66, 120), "480x832x81": (21, 60, 104)}
DTYPE = torch.bfloat16


def fake_transformer(blocks: int) -> Any:
    """The I2V 14B transformer in bf16 with that many blocks; call it under a `FakeTensorMode`."""
    model = WanTransformer3DModel(**(I2V_14B | {"num_layers": blocks}))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPE)
    return model.eval().requires_grad_(False)


def fake_inputs(latent: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Model input, text states and image states; call it under a `FakeTensorMode`."""
    return (
        torch.empty(1, I2V_14B["in_channels"], *latent, dtype=DTYPE),
        torch.empty(1, TEXT_TOKENS, I2V_14B["text_dim"], dtype=DTYPE),
        torch.empty(1, 257, I2V_14B["image_dim"], dtype=DTYPE),
    )


def lean_bytes(
    latent: tuple[int, int, int], chunk_tokens: int, branches: int, blocks: int
) -> tuple[int, int]:
    """Peak above the weights of a forward, and the part of it that is cross-attention K/V."""
    with FakeTensorMode(), torch.no_grad():
        model = fake_transformer(blocks)
        latents, text, image = fake_inputs(latent)
        with StorageMeter([*model.parameters(), *model.buffers()]) as meter:
            step = forward.step_modulation(model, torch.zeros(1, dtype=torch.int64), DTYPE)[0]
            kept = cross_kv_of_branches(model, text, image, branches)
            cross_bytes, meter.peak = meter.live, 0
            rope = forward.rope_tables(model, latent, latents.device)
            forward.denoise_forward(
                model, enumerate(model.blocks), latents, kept, step, rope, chunk_tokens
            )
    return meter.peak, cross_bytes


def cross_kv_of_branches(
    model: Any, text: Tensor, image: Tensor, branches: int
) -> list[list[forward.CrossKV]]:
    """All blocks' cross-attention K/V, the image's computed once."""
    context = forward.prepare_context(model, text, image)
    first = [forward.cross_kv(block.attn2, context) for block in model.blocks]
    pairs = list(zip(model.blocks, first, strict=True))
    others = [
        [forward.cross_kv(block.attn2, context, same) for block, same in pairs]
        for _ in range(branches - 1)
    ]
    return [first, *others]


def diffusers_bytes(latent: tuple[int, int, int], blocks: int) -> tuple[int, int]:
    """Peak of diffusers' own forward above the weights, and the weights."""
    with FakeTensorMode(), torch.no_grad():
        model = fake_transformer(blocks)
        latents, text, image = fake_inputs(latent)
        weights = [*model.parameters(), *model.buffers()]
        with StorageMeter(weights) as meter:
            model(latents, torch.zeros(1, dtype=torch.int64), text, image)
    return meter.peak, sum(tensor.nbytes for tensor in weights)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--blocks", type=int, default=2)
    arguments.add_argument("--chunk", type=int, default=2048)
    options = arguments.parse_args()
    report: dict[str, Any] = {"unit": "GiB", "blocks": options.blocks, "chunk": options.chunk}
    for name, latent in SHAPES.items():
        theirs, weights = diffusers_bytes(latent, options.blocks)
        row = {"diffusers": theirs, "diffusers_with_weights": theirs + weights}
        for branches in (1, 2):
            peak, cross = lean_bytes(latent, options.chunk, branches, options.blocks)
            row |= {f"lean_{branches}": peak, f"lean_{branches}_cross_kv": cross}
        report[name] = {key: round(count / GIB, 3) for key, count in row.items()}
        print(name, report[name])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
