"""What the files of a pack are called."""

from __future__ import annotations

FILE_NAMES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
}

PROGRESS_SUFFIX = ".progress"
"""Of the runs that are finished, beside a pack in the making."""

ORIGIN_SUFFIX = ".source"
"""Of what a pack was made from, beside it."""
