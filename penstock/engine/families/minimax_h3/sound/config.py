"""The config of `AutoencoderKLMiniMaxH3Audio`, as far as it decodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.family.naming import ShapesOf
from penstock.engine.files.fields import Field, check_fields, flag, maybe, number, several, whole
from penstock.errors import CheckpointError

AUDIO: Mapping[str, Any] = MappingProxyType({
    "latent_dim": 2048, "latent_channels": 32, "decoder_dim": 1024,
    "decoder_rates": (5, 5, 2, 2, 2, 2, 2), "decoder_kernel_sizes": (9, 9, 4, 4, 4, 4, 4),
    "resblock_kernel_sizes": (3, 7, 11),
    "resblock_dilation_sizes": ((1, 3, 5), (1, 3, 5), (1, 3, 5)), "sampling_rate": 32000,
    "latents_mean": None, "latents_std": None, "folded": False,
})  # fmt: skip
"""Defaults of diffusers' class. ``folded`` is ours: weights are stored as they multiply, not as
directions and lengths."""

_SIZES = several(whole(1, 64), 1, 16)
_REAL = number(-1e6, 1e6)
_FIELDS: Mapping[str, Field] = MappingProxyType({
    "latent_dim": whole(1, 1 << 16), "latent_channels": whole(1, 4096),
    "decoder_dim": whole(2, 1 << 16), "decoder_rates": _SIZES, "decoder_kernel_sizes": _SIZES,
    "resblock_kernel_sizes": _SIZES,
    "resblock_dilation_sizes": several(several(whole(1, 64), 1, 16), 1, 16),
    "sampling_rate": whole(1, 1_000_000), "latents_mean": maybe(several(_REAL, 1, 4096)),
    "latents_std": maybe(several(number(1e-6, 1e6), 1, 4096)), "folded": flag(),
})  # fmt: skip


def check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a config of which a value is not what it must be.

    Raises:
        CheckpointError: names the entry.
    """
    check_fields(config, _FIELDS, where)
    known = {**AUDIO, **config}
    rates, kernels = known["decoder_rates"], known["decoder_kernel_sizes"]
    channels = known["latent_channels"]
    pairs = zip(kernels, rates, strict=False)
    needs = [
        (len(rates) == len(kernels), f"{len(rates)} decoder_kernel_sizes"),
        (all(k >= r and (k - r) % 2 == 0 for k, r in pairs), "kernels that fit their rates"),
        (known["decoder_dim"] % (1 << len(rates)) == 0, "a decoder_dim that halves at each rate"),
        (
            len(known["resblock_kernel_sizes"]) == len(known["resblock_dilation_sizes"]),
            "dilations for each of resblock_kernel_sizes",
        ),
        (all(k % 2 for k in known["resblock_kernel_sizes"]), "odd resblock_kernel_sizes"),
    ]
    for name in ("latents_mean", "latents_std"):
        given = known[name]
        needs.append((given is None or len(given) == channels, f"{channels} entries of {name}"))
    for fits, told in needs:
        if not fits:
            raise CheckpointError(
                f"{where} is not an audio VAE of MiniMax-H3",
                expected=told,
                found="other values",
                remedy="The config is damaged, or of another model: copy it again",
            )


def derive(shapes: ShapesOf) -> dict[str, Any]:
    """Return the config that shapes tell: as the published one, but for its widths.

    Raises:
        CheckpointError: the file has no statistics of its latents beside it.
    """
    end = "weight" if "decoder.conv_pre.weight" in shapes else "weight_v"
    dim, latent_dim, _ = shapes.of(f"decoder.conv_pre.{end}", 3)
    return {
        "latent_dim": latent_dim,
        "latent_channels": shapes.of("dec_in_proj.weight", 3)[1],
        "decoder_dim": dim,
        "folded": end == "weight",
    }


def hop_of(config: Mapping[str, Any]) -> int:
    """Return samples a latent."""
    return math.prod({**AUDIO, **config}["decoder_rates"])


def statistics(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return the mean and deviation of each latent channel."""
    channels = config["latent_channels"]
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    return list(mean or [0.0] * channels), list(deviation or [1.0] * channels)


def title(config: Mapping[str, Any]) -> str:
    """Return the audio VAE's name for people."""
    dim = {**AUDIO, **config}["decoder_dim"]
    return "MiniMax-H3 audio VAE" if dim == 1024 else f"MiniMax-H3 audio VAE ({dim} wide)"
