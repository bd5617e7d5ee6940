"""The audio VAE in the planner's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.engine.families.minimax_h3.sound import config as configs
from penstock.engine.families.minimax_h3.sound import kind as kinds
from penstock.formats.tags import ITEM_BYTES
from penstock.profiles.manifest import Weights

if TYPE_CHECKING:
    from penstock.engine.model.component import Component
    from penstock.quant.paths import Computing


@dataclass(frozen=True)
class AudioSpec:
    """The half of the audio VAE that decodes (`AutoencoderKLMiniMaxH3Audio` config); in fp32.

    Attributes:
        channels: of the latents.
        hop: samples a latent.
        rate: samples a second.
        wide: channels that latents are widened to.
        width: of the decoder's first stage, halved with each of ``rates``.
        kernels: of each rate's convolution.
        block_kernels: of the blocks after it.
        folded: weights are stored as they multiply.
    """

    weights: Weights
    channels: int
    hop: int
    rate: int
    wide: int
    width: int
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    block_kernels: tuple[int, ...]
    folded: bool = False


def of(components: Mapping[str, Component], computing: Computing) -> AudioSpec:
    """Return the network as the planner knows it."""
    found = components[kinds.AUDIO.name]
    return _spec(found.config, found.weights(computing.scratch.device_type))


def _spec(config: Mapping[str, Any], weights: Weights) -> AudioSpec:
    known = {**configs.AUDIO, **config}
    return AudioSpec(
        weights=weights,
        channels=known["latent_channels"],
        hop=configs.hop_of(known),
        rate=known["sampling_rate"],
        wide=known["latent_dim"],
        width=known["decoder_dim"],
        rates=tuple(known["decoder_rates"]),
        kernels=tuple(known["decoder_kernel_sizes"]),
        block_kernels=tuple(known["resblock_kernel_sizes"]),
        folded=known["folded"],
    )


def true_audio() -> AudioSpec:
    """Return the published audio VAE without its files."""
    from penstock.engine.families.minimax_h3.stored import plain_run

    known = dict(configs.AUDIO)
    return _spec(known, Weights(plain_run(kinds.shapes(known), "F32"), (), ITEM_BYTES["F32"]))
