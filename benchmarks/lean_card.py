"""The lean forward beside diffusers' own on a card: seconds and bytes, all weights in VRAM.

Some blocks of the 14B model's true widths with random bf16 weights, one branch, 720x1280x81. Each
row of ``lean`` is a chunk of tokens: seconds a forward, the allocator's peak of tensors above what
lay there before, and how far the result is from diffusers'. ``ratio`` is of the last seconds, for
the first forwards load kernels. The last line on stdout is JSON.

    python -m benchmarks.lean_card [--blocks 4] [--rounds 2]
    python -m benchmarks.lean_card --dry-run        # tiny, on the CPU
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from benchmarks.fake_dit import I2V_14B, SHAPES
from penstock.engine.families.wan import forward
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS

TINY: dict[str, Any] = {"num_attention_heads": 2, "ffn_dim": 64, "added_kv_proj_dim": 256}
CHUNKS = (1024, 2048, 4096, 8192, 16384, 1 << 20)


class Case:
    """A random model on a device, and the forwards to compare."""

    def __init__(self, blocks: int, device: torch.device, *, tiny: bool) -> None:
        config = I2V_14B | (TINY if tiny else {}) | {"num_layers": blocks}
        self.device, self.latent = device, (2, 8, 8) if tiny else SHAPES["720x1280x81"]
        with device:
            self.model = WanTransformer3DModel(**config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        self.latents = self._random(config["in_channels"], *self.latent)
        self.text = self._random(TEXT_TOKENS, config["text_dim"])
        self.image = self._random(257, config["image_dim"])
        self.timestep = torch.tensor([713.0], device=device)
        context = forward.prepare_context(self.model, self.text, self.image)
        self.cross = [forward.cross_kv(block.attn2, context) for block in self.model.blocks]
        self.modulation = forward.step_modulation(self.model, self.timestep, torch.bfloat16)[0]
        self.rope = forward.rope_tables(self.model, self.latent, device)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(1, *shape, device=self.device, dtype=torch.bfloat16)

    def lean(self, chunk_tokens: int) -> Tensor:
        return forward.denoise_forward(
            self.model, enumerate(self.model.blocks), self.latents, [self.cross],
            self.modulation, self.rope, chunk_tokens,
        )[0]  # fmt: skip

    @torch.no_grad()
    def diffusers(self) -> Tensor:
        sample: Tensor = self.model(self.latents, self.timestep, self.text, self.image).sample
        return sample


def measured(work: Callable[[], Tensor], device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of some forwards, and the peak of tensors above what was there."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        output = work()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    return {"output": output, "seconds": seconds, "activation_bytes": peak}


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    case = Case(options.blocks, device, tiny=options.dry_run)
    theirs = measured(case.diffusers, device, options.rounds + 1)
    expected = theirs.pop("output").float()
    rows = {}
    for chunk in CHUNKS:
        found = measured(partial(case.lean, chunk), device, options.rounds)
        error = found.pop("output").float() - expected
        found["ratio"] = found["seconds"][-1] / theirs["seconds"][-1]
        found["largest_difference"] = float(error.abs().max())
        found["relative_difference"] = float(error.norm() / expected.norm())
        rows[str(chunk)] = found
    told = {"blocks": options.blocks, "latent": case.latent, "diffusers": theirs, "lean": rows}
    card = "dry run" if options.dry_run else torch.cuda.get_device_name(device)
    print(json.dumps({"benchmark": "lean_card", "card": card, **told}))


if __name__ == "__main__":
    main()
