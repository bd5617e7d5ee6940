"""CPU time of the lean forward beside diffusers' own, at equal precision on the CPU.

One model (by default one block of the 1.3B model's width, image-to-video, 4,050 tokens) is run by
both in turn, and each pair gives a ratio; what is reported is the median. ``step`` is one denoising
step, for which cross-attention K/V and time embedding are already there; ``first`` computes them
too. ``activation_share`` is the step's peak of live activation bytes over that of diffusers'
forward (weights, inputs and what a prompt keeps excepted), counted on fake tensors of the same
shapes. The last line on stdout is JSON.

    python -m benchmarks.lean_forward [--chunk 1350] [--rounds 5] [--threads 1] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.engine.families.wan import forward
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS
from tests.meter import StorageMeter

CONFIG: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "ffn_dim": 8960,
    "image_dim": 1280,
    "added_kv_proj_dim": 1536,
}
LATENT = (5, 60, 54)
TIMESTEP = torch.tensor([713])


class Case:
    """A random model and its inputs, and the three forwards to compare."""

    def __init__(self, layers: int, dtype: torch.dtype, chunk_tokens: int) -> None:
        torch.manual_seed(0)
        model = WanTransformer3DModel(**CONFIG, num_layers=layers).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model, self.chunk_tokens = model, chunk_tokens
        self.latents = torch.randn(1, CONFIG["in_channels"], *LATENT).to(dtype)
        self.text = torch.randn(1, TEXT_TOKENS, model.config.text_dim).to(dtype)
        self.image = torch.randn(1, 257, CONFIG["image_dim"]).to(dtype)
        self.prepare()

    def prepare(self) -> None:
        context = forward.prepare_context(self.model, self.text, self.image)
        self.cross = [forward.cross_kv(block.attn2, context) for block in self.model.blocks]
        self.modulation = forward.step_modulation(self.model, TIMESTEP, self.latents.dtype)[0]
        self.rope = forward.rope_tables(self.model, LATENT, self.latents.device)

    def step(self) -> Tensor:
        return forward.denoise_forward(
            self.model,
            enumerate(self.model.blocks),
            self.latents,
            [self.cross],
            self.modulation,
            self.rope,
            self.chunk_tokens,
        )[0]

    def first(self) -> Tensor:
        self.prepare()
        return self.step()

    @torch.no_grad()
    def diffusers(self) -> Tensor:
        sample: Tensor = self.model(self.latents, TIMESTEP, self.text, self.image).sample
        return sample


def activation_bytes(layers: int, dtype: torch.dtype, chunk_tokens: int) -> tuple[int, int]:
    """Peaks of ours and of diffusers', without computing anything."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        case = Case(layers, dtype, chunk_tokens)
        weights = [*case.model.parameters(), *case.model.buffers()]
        given = [*weights, case.latents, case.text, case.image]
        kept = [tensor for block in case.cross for tensor in vars(block).values()]
        kept += [*vars(case.modulation).values(), *vars(case.rope).values()]
        kept = [each for each in kept if isinstance(each, Tensor)]  # others are none, or numbers
        with StorageMeter([*given, *kept]) as ours:
            case.step()
        with StorageMeter(given) as theirs:
            case.diffusers()
    return ours.peak, theirs.peak


def seconds(work: Callable[[], Tensor]) -> float:
    """CPU seconds of all threads: on a machine that does other work too, wall time is not ours."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--chunk", type=int, default=1350)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    ours_bytes, theirs_bytes = activation_bytes(options.layers, dtype, options.chunk)
    case = Case(options.layers, dtype, options.chunk)
    difference = (case.step() - case.diffusers()).abs().max().item()  # both are warm after this
    rounds = [
        (seconds(case.diffusers), seconds(case.step), seconds(case.first))
        for _ in range(options.rounds)
    ]
    report = {
        **vars(options),
        "tokens": LATENT[0] * LATENT[1] * LATENT[2] // 4,
        "max_difference": difference,
        "activation_bytes": ours_bytes,
        "diffusers_activation_bytes": theirs_bytes,
        "activation_share": round(ours_bytes / theirs_bytes, 3),
        "diffusers_cpu_seconds": round(statistics.median(row[0] for row in rounds), 3),
        "step_ratio": round(statistics.median(row[1] / row[0] for row in rounds), 3),
        "step_ratios": [round(row[1] / row[0], 3) for row in rounds],
        "first_ratio": round(statistics.median(row[2] / row[0] for row in rounds), 3),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
