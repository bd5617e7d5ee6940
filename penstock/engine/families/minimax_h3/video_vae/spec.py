"""The video VAE in the planner's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from penstock.engine.families.minimax_h3.video_vae import config as configs
from penstock.engine.families.minimax_h3.video_vae import kind as kinds
from penstock.engine.families.minimax_h3.video_vae.tiles import Tiling
from penstock.formats.tags import ITEM_BYTES
from penstock.profiles.manifest import Storage, Weights

if TYPE_CHECKING:
    from penstock.engine.model.component import Component
    from penstock.quant.paths import Computing


@dataclass(frozen=True)
class ClipVaeSpec:
    """The VAE (`AutoencoderKLMiniMaxH3` config); its halves are loaded apart.

    Attributes:
        encoder: of it; all of it is in fp32.
        decoder: of its blocks, and what is outside them.
        widths, temporal, spatial: of the encoder's levels.
        width, heads, ffn_mult, registers: of the decoder.
        turned: channels of a head that are turned by place.
        clip_length, token_drop: how a video is cut along time.
        storage: how the decoder's blocks are stored.
    """

    encoder: Weights
    decoder: Weights
    z_dim: int
    widths: tuple[int, ...]
    layers: int
    temporal: tuple[int, ...]
    spatial: tuple[int, ...]
    width: int
    heads: int
    ffn_mult: int
    registers: int
    turned: int
    clip_length: int
    token_drop: int
    storage: Storage = Storage()

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent, each way."""
        return prod(self.spatial)

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame, within a clip."""
        return prod(self.temporal)

    @property
    def factor_volume(self) -> int:
        """Pixels of one colour that a latent stands for."""
        return self.temporal_factor * self.spatial_factor**2

    def tiling(self, latent: tuple[int, int, int]) -> Tiling:
        """Return the tiles of a video with so many latent frames, rows and columns.

        Raises:
            UsageError: they are no whole number of clips.
        """
        config = {
            "temporal_downsample_factors": self.temporal,
            "spatial_downsample_factors": self.spatial,
            "clip_length": self.clip_length,
            "token_drop": self.token_drop,
        }
        return Tiling.of(config, latent)


def of(components: Mapping[str, Component], computing: Computing) -> ClipVaeSpec:
    """Return the halves as the planner knows them."""
    device = computing.scratch.device_type
    encoder, decoder = components[kinds.ENCODER], components[kinds.DECODER]
    return _spec(
        decoder.config,
        encoder.weights(device),
        decoder.weights(device),
        decoder.storage(computing),
    )


def _spec(
    config: Mapping[str, Any], encoder: Weights, decoder: Weights, storage: Storage
) -> ClipVaeSpec:
    known = {**configs.VAE, **config}
    return ClipVaeSpec(
        encoder=encoder,
        decoder=decoder,
        z_dim=known["latent_channels"],
        widths=tuple(known["block_out_channels"]),
        layers=known["layers_per_block"],
        temporal=tuple(known["temporal_downsample_factors"]),
        spatial=tuple(known["spatial_downsample_factors"]),
        width=kinds.width_of(known),
        heads=known["decoder_num_attention_heads"],
        ffn_mult=known["decoder_ffn_mult"],
        registers=known["decoder_num_register_tokens"],
        turned=configs.rope_width(known),
        clip_length=known["clip_length"],
        token_drop=known["token_drop"],
        storage=storage,
    )


def true_vae() -> ClipVaeSpec:
    """Return the published VAE without its files, in bf16 but what stays in fp32."""
    from penstock.engine.families.minimax_h3.stored import typed_run

    known = dict(configs.VAE)
    encoder = {f"encoder.{k}": v for k, v in kinds.encoder_shapes(known).items()}
    rest = kinds.rest_shapes(known)
    encoder |= {k: v for k, v in rest.items() if k.startswith("quant_conv.")}
    outside = {k: v for k, v in rest.items() if k not in encoder}
    block = typed_run(kinds.block_shapes(known), kinds.keeps_single)
    item = ITEM_BYTES["BF16"]
    return _spec(
        known,
        Weights(typed_run(encoder, kinds.keeps_single), (), item),
        Weights(
            typed_run(outside, kinds.keeps_single), (block,) * known["decoder_num_layers"], item
        ),
        Storage(),
    )
