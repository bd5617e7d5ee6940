"""What hidden states in fp32 gain and cost: error and CPU time of one bf16 forward.

``error``: one forward of random weights, computed in bf16 with the hidden states in bf16 and in
fp32, beside the same weights computed in fp32 throughout, as rms over rms, at growing depth.
``time``: both in turn, in one process, on one block of the 1.3B model's width; each pair gives a
ratio, and what is reported is the median. The last line on stdout is JSON.

    python -m benchmarks.residual [--rounds 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.lean_forward import Case
from penstock.engine.families.wan import forward
from tests.tiny_transformer import inputs, tiny_transformer

DEPTHS = (2, 8, 24, 40)
LATENT = (3, 16, 16)
SMALL: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "in_channels": 16,
    "out_channels": 16, "text_dim": 64, "freq_dim": 64,
}  # fmt: skip
CHUNK_TOKENS = 1350
RESIDUALS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def errors(layers: int, seed: int = 0) -> dict[str, float]:
    """Of a forward in bf16, by what its hidden states are in, to the same weights in fp32."""
    model = tiny_transformer(seed, num_layers=layers, **SMALL)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    latents, text, _ = inputs(model, LATENT, torch.bfloat16, seed=seed)
    exact = one_pass(model, latents.float(), text.float(), torch.float32)
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    found = {name: one_pass(model, latents, text, dtype) for name, dtype in RESIDUALS.items()}
    return {name: float((x.float() - exact).norm() / exact.norm()) for name, x in found.items()}


@torch.no_grad()
def one_pass(model: Any, latents: Tensor, text: Tensor, residual: torch.dtype) -> Tensor:
    """The prediction (1, c, t, h, w) at one step, in the dtype of the latents."""
    context = forward.prepare_context(model, text, None)
    return forward.denoise_forward(
        model,
        enumerate(model.blocks),
        latents,
        [[forward.cross_kv(block.attn2, context) for block in model.blocks]],
        forward.step_modulation(model, torch.tensor([713]), latents.dtype, residual)[0],
        forward.rope_tables(model, LATENT, latents.device),
        10**6,
        residual=residual,
    )[0]


class Pair(Case):
    """A block of the 1.3B model's width in bf16, with hidden states in either."""

    def __init__(self) -> None:
        super().__init__(1, torch.bfloat16, CHUNK_TOKENS)
        self.steps = {
            name: forward.step_modulation(self.model, torch.tensor([713]), torch.bfloat16, dtype)[0]
            for name, dtype in RESIDUALS.items()
        }

    def seconds(self, residual: str) -> float:
        """CPU seconds of all threads for one forward."""
        started = time.process_time()
        forward.denoise_forward(
            self.model,
            enumerate(self.model.blocks),
            self.latents,
            [self.cross],
            self.steps[residual],
            self.rope,
            self.chunk_tokens,
            residual=RESIDUALS[residual],
        )
        return time.process_time() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    found = {layers: errors(layers) for layers in DEPTHS}
    pair = Pair()
    for name in RESIDUALS:
        pair.seconds(name)  # warm
    rounds = [(pair.seconds("bf16"), pair.seconds("fp32")) for _ in range(options.rounds)]
    ratios = [wide / narrow for narrow, wide in rounds]
    report = {
        "benchmark": "residual",
        **vars(options),
        "error": {str(layers): each for layers, each in found.items()},
        "bf16_cpu_seconds": round(statistics.median(row[0] for row in rounds), 3),
        "fp32_cpu_seconds": round(statistics.median(row[1] for row in rounds), 3),
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratios": [round(ratio, 3) for ratio in ratios],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
