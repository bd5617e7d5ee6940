"""LTX-2 and HunyuanVideo 1.5 rehearsed at their true shapes, without their weights.

    python -m benchmarks.true_shapes [--only ltx2|hunyuan] [--vram 12GiB]

The pipelines' networks are made on the meta device from the classes' own defaults (which are the
published models' configs) and called with the sizes that their makers give; text comes as states,
so that no tokenizer is needed, and two steps are made. A VAE that goes over ``--vram`` decodes in
tiles. Given are CPU seconds, and in GiB what lives
at most beside weights while each network works. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from penstock.units import GIB, parse_bytes


def main() -> None:
    """Rehearse, print."""
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    parser = argparse.ArgumentParser(description="Activations at true shapes")
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--vram", type=parse_bytes, default=12 * GIB)
    asked = parser.parse_args()
    only, limit = asked.only, asked.vram
    found = {name: measured(make, limit) for name, make in CASES.items() if only in (None, name)}
    print(json.dumps({"benchmark": "true_shapes", **found}))


def measured(make: Any, limit: int) -> dict[str, Any]:
    """One pipeline's networks, and the CPU seconds of making and of rehearsing them."""
    from penstock.engine.attach.foreign import modules_of
    from penstock.engine.attach.rehearsal import rehearse

    begun = time.process_time()
    pipe, call = make()
    made = time.process_time()
    seen = rehearse(modules_of(pipe), call, limit=limit)
    ended = time.process_time()
    names = dict.fromkeys(visit.component for visit in seen.visits)
    return {
        "made_cpu_s": round(made - begun, 2),
        "rehearsed_cpu_s": round(ended - made, 2),
        "peak_gib": {name: round(seen.peak_of(name) / GIB, 3) for name in names},
        "tiled": seen.tiled,
        "calls": {name: seen.calls_of(name) for name in names},
    }


def bare(cls: Any, **config: Any) -> Any:
    """A network without weights, in bf16."""
    import torch

    from penstock.engine.model.binding import skeleton

    return skeleton(cls, config).to(torch.bfloat16)


def ltx2() -> tuple[Any, Any]:
    """768 x 512, 121 frames with sound, as by default: three calls a step."""
    import diffusers
    import torch
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    pipe = diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), tokenizer=None, text_encoder=None,
        vae=bare(diffusers.AutoencoderKLLTX2Video),
        audio_vae=bare(diffusers.AutoencoderKLLTX2Audio),
        connectors=bare(LTX2TextConnectors),
        transformer=bare(diffusers.LTX2VideoTransformer3DModel), vocoder=bare(LTX2Vocoder),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    width = 3840 * 49  # every hidden state of Gemma 3 12B, side by side

    def call() -> Any:
        def states() -> Any:
            return torch.zeros(1, 1024, width, dtype=torch.bfloat16)

        mask = torch.ones(1, 1024, dtype=torch.long)
        return pipe(
            prompt_embeds=states(), prompt_attention_mask=mask, negative_prompt_embeds=states(),
            negative_prompt_attention_mask=mask, num_inference_steps=2, output_type="pt",
        )  # fmt: skip

    return pipe, call


def hunyuan() -> tuple[Any, Any]:
    """848 x 480, 121 frames."""
    import diffusers
    import torch

    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=bare(
            diffusers.HunyuanVideo15Transformer3DModel, task_type="t2v", target_size=640
        ),
        vae=bare(diffusers.AutoencoderKLHunyuanVideo15),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def call() -> Any:
        def states(tokens: int, width: int) -> Any:
            return torch.zeros(1, tokens, width, dtype=torch.bfloat16)

        text, glyphs = torch.ones(1, 1000), torch.zeros(1, 256)
        return pipe(
            prompt_embeds=states(1000, 3584), prompt_embeds_mask=text,
            prompt_embeds_2=states(256, 1472), prompt_embeds_mask_2=glyphs,
            negative_prompt_embeds=states(1000, 3584), negative_prompt_embeds_mask=text,
            negative_prompt_embeds_2=states(256, 1472), negative_prompt_embeds_mask_2=glyphs,
            height=480, width=848, num_frames=121, num_inference_steps=2, output_type="pt",
        )  # fmt: skip

    return pipe, call


CASES = {"ltx2": ltx2, "hunyuan": hunyuan}

if __name__ == "__main__":
    main()
