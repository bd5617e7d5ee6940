"""Wan in the planner's terms: the numbers in its configs and the bytes in its headers.

Names follow the configs of diffusers and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.profiles.manifest import LoraSpec, Storage, Weights


@dataclass(frozen=True)
class TransformerSpec:
    """The DiT (`WanTransformer3DModel` config). ``cross_block_bytes`` are the cross-attention K/V
    projections, which are applied once a prompt and are not part of ``weights.block_bytes``;
    ``context_storage`` is how they are stored (None: as the blocks); ``pos_embed`` is
    ``pos_embed_seq_len``, the image tokens that a model of two pictures tells apart (0: one)."""

    weights: Weights
    cross_block_bytes: tuple[int, ...]
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    patch_size: tuple[int, int, int]
    image_dim: int | None = None
    pos_embed: int = 0
    storage: Storage = Storage()
    context_storage: Storage | None = None
    lora: LoraSpec = LoraSpec()

    @property
    def inner_dim(self) -> int:
        """Width of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class TextSpec:
    """The text encoder (`UMT5EncoderModel` config); the embedding table is not in ``weights``."""

    weights: Weights
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    storage: Storage = Storage()


@dataclass(frozen=True)
class ImageSpec:
    """The image encoder (`CLIPVisionModel` config)."""

    weights: Weights
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    storage: Storage = Storage()

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class VaeSpec:
    """The causal 3D VAE (`AutoencoderKLWan` config); encoder and decoder are loaded apart.

    Attributes:
        decoder_dim: ``decoder_base_dim``; 0: as ``base_dim``.
        residual: ``is_residual``: Wan2.2's.
        patch: ``patch_size``: pixels of the video in one of the picture that is convolved.
    """

    encoder: Weights
    decoder: Weights
    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    decoder_dim: int = 0
    residual: bool = False
    patch: int = 1

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent, each way."""
        return self.patch << (len(self.dim_mult) - 1)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's up blocks, the lowest first."""
        return tuple((self.decoder_dim or self.base_dim) * each for each in self.dim_mult[::-1])

    @property
    def colours(self) -> int:
        """Channels of the picture that is convolved."""
        return 3 * self.patch**2

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame (after the first)."""
        return 1 << sum(self.temporal_downsample)


@dataclass(frozen=True)
class WanSpec:
    """A whole model; ``image`` is None for one that shows no picture to an encoder. ``second`` is
    the transformer for little noise, where ``transformer`` is for much: the one computes while
    timesteps are ``boundary`` of all or more (None: as the makers have it), the other below."""

    transformer: TransformerSpec
    text: TextSpec
    vae: VaeSpec
    image: ImageSpec | None = None
    second: TransformerSpec | None = None
    boundary: float | None = None

    @property
    def tokenwise(self) -> bool:
        """Whether a given picture is the first latent frame itself, at a timestep of its own."""
        return self.vae.residual

    @property
    def seen(self) -> int:
        """Pictures that the image encoder sees."""
        if self.image is None:
            return 0
        return 2 if self.transformer.pos_embed else 1

    @property
    def image_tokens(self) -> int:
        """That the image encoder gives, of all pictures."""
        return 0 if self.image is None else self.seen * self.image.tokens
