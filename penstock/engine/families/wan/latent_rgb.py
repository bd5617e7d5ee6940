"""How the latents of the Wan2.1 VAE look, by a linear map, as published.

Source: ComfyUI, ``comfy/latent_formats.py``, class ``Wan21``: ``latent_rgb_factors`` and
``latent_rgb_factors_bias``. They take latents as the transformer sees them (each channel normalised
by the VAE's mean and deviation) to red, green and blue in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FACTORS = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
BIAS = (-0.1835, -0.0868, -0.3360)

_PUBLISHED_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 2}
_FIRST_MEAN = -0.7571  # of the sixteen latents_mean in the published config


def is_published_vae(config: Mapping[str, Any]) -> bool:
    """Return whether a VAE is the published one (or a fine-tune of it), by its config."""
    shape = {name: _plain(config.get(name)) for name in _PUBLISHED_VAE}
    return shape == _PUBLISHED_VAE and list(config["latents_mean"])[0] == _FIRST_MEAN


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
