"""A diffusers Wan pipeline under a byte budget, and its own models back afterwards.

    python examples/attach_pipeline.py [MODEL_FOLDER]

MODEL_FOLDER is a Wan 2.1 model in diffusers' layout; without one a random model of a few MB is
made, whose videos are noise.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import WanPipeline

import penstock
from penstock.engine.families.wan.tiny import write_tiny_model


def main(folder: Path) -> None:
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def video() -> torch.Tensor:
        noise = torch.Generator().manual_seed(7)
        return pipe(
            prompt="a red circle moves to the right",
            height=48,
            width=64,
            num_frames=5,
            num_inference_steps=3,
            generator=noise,
            output_type="pt",
        ).frames

    plain = video()

    # A pipeline that is loaded already: its weights go to disk and stream from there.
    with penstock.attach(pipe, vram="64MiB", ram="64MiB") as attached:
        under_budget = video()
        report = attached.report
    print(f"peak {report.peak_vram_bytes:,} of {report.vram_limit_bytes:,} bytes of VRAM")
    print("the same video:", torch.equal(plain, under_budget))
    print("and after detaching:", torch.equal(plain, video()))

    # A pipeline that never holds the weights whole.
    lazy = penstock.load_pipeline(folder, vram="64MiB", ram="64MiB")
    lazy.set_progress_bar_config(disable=True)
    frames = lazy("a blue square", height=48, width=64, num_frames=5, num_inference_steps=3).frames
    print("opened lazily:", frames.shape)
    penstock.detach(lazy)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(write_tiny_model(Path(made) / "tiny", image_to_video=False))
