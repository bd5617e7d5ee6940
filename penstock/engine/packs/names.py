"""What the files of a pack are called."""

from __future__ import annotations

FILE_NAMES = {
    "diffusers": "diffusion_pytorch_model.safetensors",
    "transformers": "model.safetensors",
}
"""By the library that would read the file."""

PROGRESS_SUFFIX = ".progress"
"""Of the runs that are finished, beside a pack in the making."""

ORIGIN_SUFFIX = ".source"
"""Of what a pack was made from, beside it."""
