"""What the planner knows of a model: the numbers in its configs and the bytes in its headers.

Plain values, free of torch, made from a folder's headers (`penstock.engine.model.files`) or from a
built-in description. Names follow the configs of diffusers and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCRATCH = "dequantisation scratch"
"""Label of the buffer that matrices are decoded into, in plans."""

ComputePath = Literal["plain", "dequant", "fp8", "int8"]
"""How matrices multiply: as they are, decoded first, or in 8 bits."""


@dataclass(frozen=True)
class Weights:
    """Bytes of one component as they are held in memory.

    Attributes:
        rest_bytes: all that is not in a block: one aligned run, and what is cast or decoded of it.
        block_bytes: one entry a block, each an aligned run.
        itemsize: bytes of one activation element (the compute dtype), 2 or 4.
    """

    rest_bytes: int
    block_bytes: tuple[int, ...]
    itemsize: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole component."""
        return self.rest_bytes + sum(self.block_bytes)


@dataclass(frozen=True)
class Storage:
    """How the matrices of a network's blocks are stored, where that is not the compute dtype.

    Attributes:
        format: its name.
        scratch_bytes: the largest matrix in the compute dtype: each is decoded there before use.
        workspace_bytes: what decoding takes besides, for a moment.
        decoded_bytes: written when all matrices of a block are decoded once.
        eight_bit_bytes: temporaries of 8-bit matrix products, where some layers compute so.
        cast_bytes: other tensors of a block that are cast or decoded for a visit.
        path: of most matrices, as a device was found to allow; None: the planner's rates decide.
    """

    format: str = "bf16"
    scratch_bytes: int = 0
    workspace_bytes: int = 0
    decoded_bytes: int = 0
    eight_bit_bytes: int = 0
    cast_bytes: int = 0
    path: ComputePath | None = None

    @property
    def items(self) -> tuple[tuple[str, int], ...]:
        """``(label, bytes)`` of all that computing with the stored matrices takes besides them."""
        named = (
            (SCRATCH, self.scratch_bytes),
            ("dequantisation workspace", self.workspace_bytes),
            ("8-bit workspace", self.eight_bit_bytes),
            ("cast tensors", self.cast_bytes),
        )
        return tuple((label, count) for label, count in named if count)


@dataclass(frozen=True)
class LoraSpec:
    """LoRAs beside the weights of the DiT; their bytes are in its `Weights`.

    Attributes:
        rank: the largest: activations of a token between the two matrices of a pair.
        elements: of the matrices that each token meets in one pass over all blocks.
    """

    rank: int = 0
    elements: int = 0


@dataclass(frozen=True)
class TransformerSpec:
    """The DiT (`WanTransformer3DModel` config). ``cross_block_bytes`` are the cross-attention K/V
    projections, which are applied once a prompt and are not part of ``weights.block_bytes``;
    ``context_storage`` is how they are stored (None: as the blocks)."""

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
    """The causal 3D VAE (`AutoencoderKLWan` config); encoder and decoder are loaded apart."""

    encoder: Weights
    decoder: Weights
    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent, each way."""
        return 1 << (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame (after the first)."""
        return 1 << sum(self.temporal_downsample)


@dataclass(frozen=True)
class ModelManifest:
    """A whole model; ``image`` is None for a text-to-video model."""

    transformer: TransformerSpec
    text: TextSpec
    vae: VaeSpec
    image: ImageSpec | None = None


@dataclass(frozen=True)
class VideoShape:
    """Size of a video in pixels and frames, and what follows from it."""

    width: int
    height: int
    frames: int

    def latent(self, vae: VaeSpec) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        return (
            (self.frames - 1) // vae.temporal_factor + 1,
            self.height // vae.spatial_factor,
            self.width // vae.spatial_factor,
        )
